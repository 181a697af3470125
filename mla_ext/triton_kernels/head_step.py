"""One step of the shared head (eq. 4-6): W ← W − γ · SGD(G P), and P ← P − k kᵀ/d.

Launches, each a kernel of this file: `product` makes k = P h̄, parts of h̄ᵀk and |h̄|², and Z = G P, with which it steps
the weights at once when the step projects with P_{t-1} ("after"). `finish` absorbs h̄ into P and ν; otherwise ("before")
further programs of it correct Z to G P_t and step the weights. They do so too where torch.mm makes Z, as for many
classes.
Between them, only to normalize, `norm` sums the squares of the P that `finish` will make. Whichever of `product` and
`finish` does not step the weights advances `step`, so that no program reads it in the launch that changes it. All sums
run in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import NU_RATE, Hyperparameters
from .launch import next_nu, numbers_and_tensors, on, read
from .sgd import NO_HEAD, WEIGHT_COLUMNS, Head, advance, is_skipped, read_forget, read_sgd, sgd, step_class

__all__ = ["MM_FROM", "head_step_", "rls_update_"]

# Of P that a program holds at a time: 8 or 16 a thread, which leaves room for the other operands.
TILE = 2048
# With 4 warps a float64 product spills registers.
PRODUCT_WARPS = 8
# Programs that fill a GPU: about as many as it has multiprocessors.
PROGRAMS = 128
# Up to so many classes, Z is summed class by class. tl.dot would fill its tile of 16 classes with zeros.
SUMMED_CLASSES = 8
# tl.dot needs at least 16 rows of P for a program, so from so many features on it fills a GPU.
DOT_ROWS = 16
DOT_FROM = PROGRAMS * DOT_ROWS
# torch.mm makes Z from so many classes on, and wherever there are too many to sum and too few features for tl.dot.
MM_FROM = 32
# Rows of P that a program updates. Few, so that a P of 512 rows still occupies a GPU.
UPDATE_ROWS = 4
UPDATE_COLUMNS = TILE // UPDATE_ROWS


@triton.jit
def rank_one(
    sums, parts, alpha, alpha_tensor, SCALED: tl.constexpr, RATE: tl.constexpr, PARTS: tl.constexpr, dtype: tl.constexpr
):
    """What makes P − sign(d) u uᵀ with u = k / root: whether d is absorbed at all, sign(d), root = √|d|, and the ν in
    it. sums: the parts of h̄ᵀk, those of |h̄|², then the ν so far; SCALED: there is one."""
    index = tl.arange(0, PARTS)
    scale = tl.full((), 1.0, dtype)
    if SCALED:
        squares = tl.sum(tl.load(sums + parts + index, index < parts, other=0.0))
        scale = next_nu(tl.load(sums + 2 * parts), squares, RATE)
    d = read(alpha, alpha_tensor, dtype) * scale + tl.sum(tl.load(sums + index, index < parts, other=0.0))
    size = tl.abs(d)
    return (size > 0) & (size < float("inf")), tl.where(d < 0, -1.0, 1.0).to(dtype), tl.sqrt(size), scale


@triton.jit
def frobenius_norm(squares, parts, PARTS: tl.constexpr, dtype: tl.constexpr):
    norm = tl.full((), 1.0, dtype)
    if squares is not None:
        index = tl.arange(0, PARTS)
        norm = tl.sqrt(tl.sum(tl.load(squares + index, index < parts, other=0.0)))
    return norm


@triton.jit
def updated_tile(projection, k, rows, columns, s, sign, root, keep, forget, dtype: tl.constexpr):
    """(1−ρ)(P − sign(d) u uᵀ) + ρI on a tile, where it lies, and which of it exists."""
    offsets = rows.to(tl.int64)[:, None] * s + columns[None, :]
    mask = (rows < s)[:, None] & (columns < s)[None, :]
    P = tl.load(projection + offsets, mask, other=0.0)
    u_rows = tl.load(k + rows, rows < s, other=0.0) / root
    u_columns = tl.load(k + columns, columns < s, other=0.0) / root
    # The same product at (i, j) and (j, i), so P stays symmetric to the last bit, contracted to an fma or not.
    P -= (sign * u_rows)[:, None] * u_columns[None, :]
    on_diagonal = rows[:, None] == columns[None, :]
    P = P * keep + tl.where(on_diagonal, forget, 0.0)
    return offsets, mask, P


@triton.jit
def product_kernel(
    projection,
    k,
    sums,
    nu,
    found_inf,
    head,
    feature_mean,
    step,
    projected,
    C,
    s,
    lr: tl.float64,
    momentum: tl.float64,
    dampening: tl.float64,
    weight_decay: tl.float64,
    tensors,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMMED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """k, and Z from the rows of P, which are its columns. Stores Z, or steps the weights where `projected` is None."""
    if is_skipped(found_inf):
        return
    if projected is not None:
        advance(step, tl.program_id(0) == 0)
    dtype: tl.constexpr = projection.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    classes = tl.arange(0, BLOCK_C)
    if SUMMED:
        class_products = tl.zeros((BLOCK_C, BLOCK_J, BLOCK_I), dtype)
    else:
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
        if head.grad is not None:
            offsets = classes.to(tl.int64)[:, None] * s + columns[None, :]
            G = tl.load(head.grad + offsets, (classes < C)[:, None] & inside, other=0.0).to(dtype)
            if SUMMED:
                class_products += G[:, None, :] * P[None, :, :]
            else:
                Z = tl.dot(G, tl.trans(P), Z, input_precision=PRECISION, out_dtype=dtype)

    if feature_mean is not None:
        own_k = tl.sum(products, axis=1)
        h = tl.load(feature_mean + rows, rows < s, other=0.0)
        tl.store(k + rows, own_k, rows < s)
        tl.store(sums + tl.program_id(0), tl.sum(own_k * h))
        if nu is not None:
            parts = tl.cdiv(s, BLOCK_J)
            tl.store(sums + parts + tl.program_id(0), tl.sum(h * h))
            if tl.program_id(0) == 0:
                tl.store(sums + 2 * parts, tl.load(nu))  # `finish` changes it
    if head.grad is not None:
        if SUMMED:
            Z = tl.sum(class_products, axis=2)
        offsets = classes.to(tl.int64)[:, None] * s + rows[None, :]
        mask = (classes < C)[:, None] & (rows < s)[None, :]
        if projected is not None:
            tl.store(projected + offsets, Z, mask)
        else:
            rates = read_sgd(lr, momentum, dampening, weight_decay, tensors, dtype)
            sgd(head, offsets, mask, Z, tl.load(step) == 0, rates, NESTEROV, MAXIMIZE)


@triton.jit
def norm_kernel(
    projection,
    k,
    sums,
    nu,
    found_inf,
    squares,
    parts,
    s,
    alpha: tl.float64,
    forget: tl.float64,
    tensors,
    RATE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if is_skipped(found_inf):
        return
    dtype: tl.constexpr = projection.dtype.element_ty
    _absorbed, sign, root, _nu = rank_one(sums, parts, alpha, tensors.alpha, nu is not None, RATE, PARTS, dtype)
    keep, rho = read_forget(forget, tensors.forget, dtype)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    products = tl.zeros((ROWS, COLUMNS), dtype)
    for first in range(0, s, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        _offsets, mask, P = updated_tile(projection, k, rows, columns, s, sign, root, keep, rho, dtype)
        products += tl.where(mask, P * P, 0.0)
    tl.store(squares + tl.program_id(0), tl.sum(products))


@triton.jit
def finish_kernel(
    projection,
    k,
    sums,
    nu,
    found_inf,
    head,
    step,
    projected,
    squares,
    parts,
    row_parts,
    s,
    lr: tl.float64,
    momentum: tl.float64,
    dampening: tl.float64,
    weight_decay: tl.float64,
    alpha: tl.float64,
    forget: tl.float64,
    tensors,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    CORRECT: tl.constexpr,
    RATE: tl.constexpr,
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
    dtype: tl.constexpr = projection.dtype.element_ty
    keep, rho = read_forget(forget, tensors.forget, dtype)
    absorbed = False
    sign = tl.full((), 1.0, dtype)
    root = tl.full((), 1.0, dtype)
    if k is not None:
        absorbed, sign, root, new_nu = rank_one(sums, parts, alpha, tensors.alpha, nu is not None, RATE, PARTS, dtype)
        if nu is not None:
            tl.store(nu, new_nu, absorbed & (program == 0))
    norm = frobenius_norm(squares, row_parts, ROW_PARTS, dtype)
    if program < row_parts:
        if absorbed:
            rows = program * ROWS + tl.arange(0, ROWS)
            for first in range(0, s, COLUMNS):
                columns = first + tl.arange(0, COLUMNS)
                offsets, mask, P = updated_tile(projection, k, rows, columns, s, sign, root, keep, rho, dtype)
                if squares is not None:
                    P = P / norm
                tl.store(projection + offsets, P, mask)
    elif projected is not None:
        rates = read_sgd(lr, momentum, dampening, weight_decay, tensors, dtype)
        update = (absorbed, sign, root, norm, keep, rho)
        first_step = tl.load(step) == 1  # `product` has advanced it
        step_class(
            program - row_parts,
            head,
            projected,
            k,
            s,
            first_step,
            update,
            rates,
            CORRECT,
            NESTEROV,
            MAXIMIZE,
            WEIGHT_COLUMNS,
        )


def product_precision() -> str:
    """How G P is multiplied, as by torch.mm: in TF32, which only NVIDIA always has, unless "highest" forbids it."""
    try:
        is_exact = torch.get_float32_matmul_precision() == "highest" or torch.version.cuda is None
    except RuntimeError:  # the user set it through the newer interface, and torch refuses to answer in the older terms
        is_exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if is_exact else "tf32"


def product_by_mm(C: int, s: int) -> bool:
    """Whether torch.mm makes Z."""
    return C >= MM_FROM or (C > SUMMED_CLASSES and s < DOT_FROM)


def product_tile(C: int, s: int, itemsize: int) -> tuple[int, int, int]:
    """Classes, rows and columns that a program of `product` holds at a time; C = 0: only k is made."""
    if C > SUMMED_CLASSES:
        return max(triton.next_power_of_2(C), 16), DOT_ROWS, TILE // DOT_ROWS
    BLOCK_C = triton.next_power_of_2(max(C, 1))
    BLOCK_J = min(max(triton.next_power_of_2(s // PROGRAMS), 4), 16)  # more read G less often
    # A sum for each class and element of the tile: at most 64 registers of a thread.
    return BLOCK_C, BLOCK_J, min(TILE, 64 * 32 * PRODUCT_WARPS // (BLOCK_C * itemsize // 4)) // BLOCK_J


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
    nu: Tensor | None = None,
) -> None:
    """`backends.triton.head_step_` with a dense P; without weight, grad and step it is the update of P alone."""
    s = len(projection)
    device = projection.device
    C = 0 if grad is None else len(grad)
    absorbs = feature_mean is not None
    corrects = absorbs and grad is not None and hyper.absorb == "before"
    by_mm = product_by_mm(C, s)
    is_late = corrects or by_mm
    like: dict[str, Any] = {"dtype": projection.dtype, "device": device}

    BLOCK_C, BLOCK_J, BLOCK_I = product_tile(0 if by_mm else C, s, projection.itemsize)
    parts, row_parts = triton.cdiv(s, BLOCK_J), triton.cdiv(s, UPDATE_ROWS) if absorbs else 0
    k = torch.empty(s, **like) if absorbs else None
    sums = torch.empty(2 * parts + 1, **like) if absorbs else None
    squares = torch.empty(row_parts, **like) if absorbs and hyper.normalize else None
    projected = torch.empty(C, s, **like) if is_late else None

    of_all = (projection, k, sums, nu, found_inf)  # arguments of all three kernels
    head = Head(weight, grad, momentum_buffer, grad_scale)
    numbers, tensors = numbers_and_tensors(hyper, device)
    flags = (hyper.nesterov, hyper.maximize)
    PARTS, ROW_PARTS = triton.next_power_of_2(parts), triton.next_power_of_2(max(row_parts, 1))

    with on(device):
        if absorbs or grad is not None:
            product_kernel[(parts if absorbs or not by_mm else 1,)](
                *of_all,
                NO_HEAD if by_mm else head,
                feature_mean,
                step,
                projected,
                C,
                s,
                *numbers[:4],
                tensors,
                *flags,
                product_precision(),
                C <= SUMMED_CLASSES,
                BLOCK_C,
                BLOCK_J,
                BLOCK_I,
                num_warps=PRODUCT_WARPS,
            )
        if by_mm:
            assert grad is not None
            torch.mm(grad.to(projection.dtype), projection, out=projected)
        if squares is not None:
            norm_kernel[(row_parts,)](
                *of_all,
                squares,
                parts,
                s,
                *numbers[4:],
                tensors,
                NU_RATE,
                PARTS,
                UPDATE_ROWS,
                UPDATE_COLUMNS,
            )
        finish_kernel[(max(row_parts + (C if is_late else 0), 1),)](
            *of_all,
            head if is_late else NO_HEAD,
            step,
            projected,
            squares,
            parts,
            row_parts,
            s,
            *numbers,
            tensors,
            *flags,
            corrects,
            NU_RATE,
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
