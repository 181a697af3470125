"""One step of the shared head (eq. 4-6): W ← W − γ · SGD(G P), and P ← P − k kᵀ/d.

Launches, each a kernel of this file: `product` makes k = P h̄, parts of h̄ᵀk, and Z = G P, with which it steps the
weights at once when the step projects with P_{t-1} ("after"). `finish` absorbs h̄ into P; otherwise ("before") further
programs of it correct Z to G P_t and step the weights. Between them, only to normalize, `norm` sums the squares of the
P that `finish` will make. Whichever of `product` and `finish` does not step the weights advances `step`, so that no
program reads it in the launch that changes it. All sums run in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Hyperparameters
from .launch import number_or_pointer, on, read

__all__ = ["head_step_", "rls_update_"]

# Of P that a program holds at a time: 8 or 16 a thread, which leaves room for the other operands.
TILE = 2048
# With 4 warps a float64 product spills registers.
PRODUCT_WARPS = 8
# Rows of P that a program updates. Few, so that a P of 512 rows still occupies a GPU.
UPDATE_ROWS = 4
UPDATE_COLUMNS = TILE // UPDATE_ROWS
WEIGHT_COLUMNS = 1024


@triton.jit
def is_skipped(found_inf):
    skipped = False
    if found_inf is not None:
        skipped = tl.load(found_inf) != 0
    return skipped


@triton.jit
def advance(step, is_chosen):
    if is_chosen:  # one program of the launch
        tl.store(step, tl.load(step) + 1)


@triton.jit
def sgd(
    weight,
    momentum_buffer,
    offsets,
    mask,
    z,
    grad_scale,
    first_step,
    lr,
    momentum,
    undamped,
    weight_decay,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """torch.optim.SGD on the elements at `offsets`, given their projected gradient z."""
    g = z
    if grad_scale is not None:
        g = g / tl.load(grad_scale).to(z.dtype)
    if MAXIMIZE:
        g = -g
    w = tl.load(weight + offsets, mask, other=0.0).to(z.dtype)
    g += weight_decay * w
    if momentum_buffer is not None:
        old = tl.load(momentum_buffer + offsets, mask, other=0.0)
        # The first buffer is the gradient itself; what is in memory then may be anything.
        new = tl.where(first_step, g, momentum * old + undamped * g)
        tl.store(momentum_buffer + offsets, new, mask)
        if NESTEROV:
            g += momentum * new
        else:
            g = new
    tl.store(weight + offsets, w - lr * g, mask)


@triton.jit
def rank_one(mean_dot_k, parts, alpha, alpha_tensor, PARTS: tl.constexpr, dtype: tl.constexpr):
    """What makes P − sign(d) u uᵀ with u = k / root: whether d is absorbed at all, sign(d), and root = √|d|."""
    index = tl.arange(0, PARTS)
    d = read(alpha, alpha_tensor, dtype) + tl.sum(tl.load(mean_dot_k + index, index < parts, other=0.0))
    size = tl.abs(d)
    return (size > 0) & (size < float("inf")), tl.where(d < 0, -1.0, 1.0).to(dtype), tl.sqrt(size)


@triton.jit
def frobenius_norm(squares, parts, PARTS: tl.constexpr, dtype: tl.constexpr):
    norm = tl.full((), 1.0, dtype)
    if squares is not None:
        index = tl.arange(0, PARTS)
        norm = tl.sqrt(tl.sum(tl.load(squares + index, index < parts, other=0.0)))
    return norm


@triton.jit
def updated_tile(projection, k, rows, columns, s, sign, root, forget, dtype: tl.constexpr):
    """(1−ρ)(P − sign(d) u uᵀ) + ρI on a tile, where it lies, and which of it exists."""
    offsets = rows.to(tl.int64)[:, None] * s + columns[None, :]
    mask = (rows < s)[:, None] & (columns < s)[None, :]
    P = tl.load(projection + offsets, mask, other=0.0)
    u_rows = tl.load(k + rows, rows < s, other=0.0) / root
    u_columns = tl.load(k + columns, columns < s, other=0.0) / root
    # The same product at (i, j) and (j, i), so P stays symmetric to the last bit, contracted to an fma or not.
    P -= (sign * u_rows)[:, None] * u_columns[None, :]
    on_diagonal = rows[:, None] == columns[None, :]
    P = P * tl.full((), 1.0 - forget, dtype) + tl.where(on_diagonal, tl.full((), forget, dtype), 0.0)
    return offsets, mask, P


@triton.jit
def product_kernel(
    weight,
    grad,
    momentum_buffer,
    projection,
    feature_mean,
    step,
    grad_scale,
    found_inf,
    projected,
    k,
    mean_dot_k,
    C,
    s,
    lr: tl.float64,
    lr_tensor,
    momentum: tl.float64,
    undamped: tl.float64,
    weight_decay: tl.float64,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """k, and Z from the rows of P, which are its columns. Stores Z, or steps the weights where `projected` is None."""
    if is_skipped(found_inf):
        return
    if projected is not None:
        advance(step, (tl.program_id(0) == 0) & (tl.program_id(1) == 0))
    dtype: tl.constexpr = projection.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    classes = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    Z = tl.zeros((BLOCK_C, BLOCK_J), dtype)
    products = tl.zeros((BLOCK_J, BLOCK_I), dtype)
    for first in range(0, s, BLOCK_I):
        columns = first + tl.arange(0, BLOCK_I)
        inside = (columns < s)[None, :]
        P = tl.load(
            projection + rows.to(tl.int64)[:, None] * s + columns[None, :], (rows < s)[:, None] & inside, other=0.0
        )
        if feature_mean is not None:  # never on tensor cores: k and d keep their full precision
            products += P * tl.load(feature_mean + columns, columns < s, other=0.0)[None, :]
        if grad is not None:
            offsets = classes.to(tl.int64)[:, None] * s + columns[None, :]
            G = tl.load(grad + offsets, (classes < C)[:, None] & inside, other=0.0).to(dtype)
            Z = tl.dot(G, tl.trans(P), Z, input_precision=PRECISION, out_dtype=dtype)

    if feature_mean is not None:
        own_k = tl.sum(products, axis=1)
        own_part = tl.sum(own_k * tl.load(feature_mean + rows, rows < s, other=0.0))
        if tl.program_id(1) == 0:
            tl.store(k + rows, own_k, rows < s)
            tl.store(mean_dot_k + tl.program_id(0), own_part)
    if grad is not None:
        offsets = classes.to(tl.int64)[:, None] * s + rows[None, :]
        mask = (classes < C)[:, None] & (rows < s)[None, :]
        if projected is not None:
            tl.store(projected + offsets, Z, mask)
        else:
            sgd(
                weight,
                momentum_buffer,
                offsets,
                mask,
                Z,
                grad_scale,
                tl.load(step) == 0,
                read(lr, lr_tensor, dtype),
                tl.full((), momentum, dtype),
                tl.full((), undamped, dtype),
                tl.full((), weight_decay, dtype),
                NESTEROV,
                MAXIMIZE,
            )


@triton.jit
def norm_kernel(
    projection,
    found_inf,
    k,
    mean_dot_k,
    squares,
    parts,
    s,
    alpha: tl.float64,
    alpha_tensor,
    forget: tl.float64,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if is_skipped(found_inf):
        return
    dtype: tl.constexpr = projection.dtype.element_ty
    _absorbed, sign, root = rank_one(mean_dot_k, parts, alpha, alpha_tensor, PARTS, dtype)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, COLUMNS), dtype)
    for first in range(0, s, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        _offsets, mask, P = updated_tile(projection, k, rows, columns, s, sign, root, forget, dtype)
        sums += tl.where(mask, P * P, 0.0)
    tl.store(squares + tl.program_id(0), tl.sum(sums))


@triton.jit
def step_class(
    c,
    weight,
    grad,
    momentum_buffer,
    grad_scale,
    projected,
    k,
    squares,
    square_parts,
    s,
    first_step,
    absorbed,
    sign,
    root,
    lr,
    momentum,
    undamped,
    weight_decay,
    keep,
    forget,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SQUARE_PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Steps class c with G P_t = ((1−ρ)(Z − sign(d) (G u) uᵀ) + ρG) / ‖P_t‖, from Z = G P_{t-1}."""
    dtype: tl.constexpr = projected.dtype.element_ty
    start = c.to(tl.int64) * s
    products = tl.zeros((COLUMNS,), dtype)
    for first in range(0, s, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        u = tl.load(k + columns, columns < s, other=0.0) / root
        products += tl.load(grad + start + columns, columns < s, other=0.0).to(dtype) * u
    grad_dot_u = sign * tl.sum(products)

    norm = frobenius_norm(squares, square_parts, SQUARE_PARTS, dtype)
    for first in range(0, s, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = columns < s
        G = tl.load(grad + start + columns, mask, other=0.0).to(dtype)
        Z = tl.load(projected + start + columns, mask, other=0.0)
        u = tl.load(k + columns, mask, other=0.0) / root
        corrected = (Z - grad_dot_u * u) * keep + forget * G
        if squares is not None:
            corrected = corrected / norm
        sgd(
            weight,
            momentum_buffer,
            start + columns,
            mask,
            tl.where(absorbed, corrected, Z),
            grad_scale,
            first_step,
            lr,
            momentum,
            undamped,
            weight_decay,
            NESTEROV,
            MAXIMIZE,
        )


@triton.jit
def finish_kernel(
    weight,
    grad,
    momentum_buffer,
    grad_scale,
    projection,
    step,
    found_inf,
    projected,
    k,
    mean_dot_k,
    squares,
    parts,
    row_parts,
    s,
    lr: tl.float64,
    lr_tensor,
    momentum: tl.float64,
    undamped: tl.float64,
    weight_decay: tl.float64,
    alpha: tl.float64,
    alpha_tensor,
    forget: tl.float64,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    PARTS: tl.constexpr,
    ROW_PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHT_COLUMNS: tl.constexpr,
):
    """The first `row_parts` programs: P ← rls_update(P, h̄), where there is a k. One more a class: its weights, where
    there is a `projected`, with which `product` has left them to this launch."""
    if is_skipped(found_inf):
        return
    program = tl.program_id(0)
    if step is not None and projected is None:
        advance(step, program == 0)
    if k is not None:
        dtype: tl.constexpr = projection.dtype.element_ty
        absorbed, sign, root = rank_one(mean_dot_k, parts, alpha, alpha_tensor, PARTS, dtype)
        if program < row_parts:
            if absorbed:
                norm = frobenius_norm(squares, row_parts, ROW_PARTS, dtype)
                rows = program * ROWS + tl.arange(0, ROWS)
                for first in range(0, s, COLUMNS):
                    columns = first + tl.arange(0, COLUMNS)
                    offsets, mask, P = updated_tile(projection, k, rows, columns, s, sign, root, forget, dtype)
                    if squares is not None:
                        P = P / norm
                    tl.store(projection + offsets, P, mask)
        elif projected is not None:
            step_class(
                program - row_parts,
                weight,
                grad,
                momentum_buffer,
                grad_scale,
                projected,
                k,
                squares,
                row_parts,
                s,
                tl.load(step) == 1,  # `product` has advanced it
                absorbed,
                sign,
                root,
                read(lr, lr_tensor, dtype),
                tl.full((), momentum, dtype),
                tl.full((), undamped, dtype),
                tl.full((), weight_decay, dtype),
                tl.full((), 1.0 - forget, dtype),
                tl.full((), forget, dtype),
                NESTEROV,
                MAXIMIZE,
                ROW_PARTS,
                WEIGHT_COLUMNS,
            )


def product_precision() -> str:
    """How G P is multiplied, as by torch.mm: in TF32, which only NVIDIA always has, unless "highest" forbids it."""
    try:
        is_exact = torch.get_float32_matmul_precision() == "highest" or torch.version.cuda is None
    except RuntimeError:  # the user set it through the newer interface, and torch refuses to answer in the older terms
        is_exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if is_exact else "tf32"


def head_step_(
    weight: Tensor | None,
    grad: Tensor | None,
    momentum_buffer: Tensor | None,
    projection: Tensor,
    feature_mean: Tensor | None,
    step: Tensor | None,
    hyper: Hyperparameters,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """`backends.triton.head_step_`; without weight, grad and step it is the update of P alone."""
    s = len(projection)
    device = projection.device
    C = 0 if grad is None else len(grad)
    absorbs = feature_mean is not None
    is_late = absorbs and grad is not None and hyper.absorb == "before"
    like: dict[str, Any] = {"dtype": projection.dtype, "device": device}

    # A square tile of Z: larger ones read P and G less often, but a few classes would leave them mostly empty.
    BLOCK_C = BLOCK_J = min(max(triton.next_power_of_2(C), 16), 64)
    parts, row_parts = triton.cdiv(s, BLOCK_J), triton.cdiv(s, UPDATE_ROWS)
    k = torch.empty(s, **like) if absorbs else None
    mean_dot_k = torch.empty(parts, **like) if absorbs else None
    squares = torch.empty(row_parts, **like) if absorbs and hyper.normalize else None
    projected = torch.empty(C, s, **like) if is_late else None

    lr = number_or_pointer(hyper.lr, device)
    alpha = number_or_pointer(hyper.alpha, device)
    sgd_numbers = (*lr, float(hyper.momentum), 1.0 - float(hyper.dampening), float(hyper.weight_decay))
    rls_numbers = (*alpha, float(hyper.forget))
    flags = (hyper.nesterov, hyper.maximize)
    PARTS, ROW_PARTS = triton.next_power_of_2(parts), triton.next_power_of_2(row_parts)

    with on(device):
        if absorbs or grad is not None:
            product_kernel[(parts, max(1, triton.cdiv(C, BLOCK_C)))](
                weight,
                grad,
                momentum_buffer,
                projection,
                feature_mean,
                step,
                grad_scale,
                found_inf,
                projected,
                k,
                mean_dot_k,
                C,
                s,
                *sgd_numbers,
                *flags,
                product_precision(),
                BLOCK_C,
                BLOCK_J,
                TILE // BLOCK_J,
                num_warps=PRODUCT_WARPS,
            )
        if squares is not None:
            norm_kernel[(row_parts,)](
                projection,
                found_inf,
                k,
                mean_dot_k,
                squares,
                parts,
                s,
                *rls_numbers,
                PARTS,
                UPDATE_ROWS,
                UPDATE_COLUMNS,
            )
        finish_kernel[((row_parts if absorbs else 1) + (C if is_late else 0),)](
            *((weight, grad, momentum_buffer, grad_scale) if is_late else (None, None, None, None)),
            projection,
            step,
            found_inf,
            projected,
            k,
            mean_dot_k,
            squares,
            parts,
            row_parts,
            s,
            *sgd_numbers,
            *rls_numbers,
            *flags,
            PARTS,
            ROW_PARTS,
            UPDATE_ROWS,
            UPDATE_COLUMNS,
            WEIGHT_COLUMNS,
        )


def rls_update_(
    projection: Tensor, feature_mean: Tensor, alpha: float | Tensor, forget: float | Tensor, normalize: bool
) -> None:
    hyper = Hyperparameters(alpha=alpha, forget=forget, normalize=normalize)
    head_step_(None, None, None, projection, feature_mean, None, hyper)
