"""One step of the shared head in the rank form, P = βI − KᵀK: no matrix (s, s) anywhere, and no decision of the host.

Launches, each a kernel: `rows_product` makes t = [G; h̄] Kᵀ, in parts of columns. `rank_finish` makes Z = βG − tK, with
which the weights step at once when the step projects with P_{t-1} ("after"), k = P h̄, and parts of h̄ᵀk, |k|² and |h̄|².
`absorb` writes the new row of K; otherwise ("before") further programs of it correct Z to G P_t and step the weights.
They do so too where torch.mm makes Z, as for many classes. `count_rows` has one program. It changes β, ν, `count`
and `step`, which all others read. When K is full, `absorb` and `count_rows` also do what a compression needs, and
`rotate` ends it (compress.py); else `rotate` returns at once. All sums run in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import NU_RATE, RANK_NOISE
from ..step import HeadStep
from .compress import gram, rotate_kernel, strongest
from .eigen import ANGLES, PAIRS
from .head_step import MM_FROM
from .launch import next_nu, numbers_and_tensors, on, read
from .sgd import NO_HEAD, WEIGHT_COLUMNS, Head, advance, is_skipped, read_forget, read_sgd, sgd, step_class

__all__ = ["rank_step_"]

# t is summed over at most so many parts: each program of `rank_finish` reads them all.
PARTS = 16
# Parts that are read at a time.
PARTS_AT_ONCE = 8
# Columns and rows of K that a program holds at a time.
BLOCK_S = 32
BLOCK_R = 64
WARPS = 8
# Numbers of the Gram matrix's parts that are summed at a time.
GRAM_BLOCK = 64


@triton.jit
def stacked(grad, feature_mean, vectors, columns, C, s, dtype: tl.constexpr):
    """A tile of [G; h̄], of which either may be absent."""
    inside = columns < s
    X = tl.zeros((vectors.shape[0], columns.shape[0]), dtype)
    if grad is not None:
        offsets = vectors.to(tl.int64)[:, None] * s + columns[None, :]
        X = tl.load(grad + offsets, (vectors < C)[:, None] & inside[None, :], other=0.0).to(dtype)
    if feature_mean is not None:
        h = tl.load(feature_mean + columns, inside, other=0.0)
        X = tl.where((vectors == C)[:, None], h[None, :], X)
    return X


@triton.jit
def used_tile(rows, r, columns, count, s):
    """A tile of K. Nobody reads a row that is not in use."""
    mask = (r < count)[:, None] & (columns < s)[None, :]
    return tl.load(rows + r.to(tl.int64)[:, None] * s + columns[None, :], mask, other=0.0)


@triton.jit
def rows_product_kernel(
    grad,
    feature_mean,
    rows,
    count,
    found_inf,
    products,
    C,
    s,
    R,
    span,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """products (parts, C + 1, R): [G; h̄] Kᵀ of each part's columns."""
    if is_skipped(found_inf):
        return
    dtype: tl.constexpr = rows.dtype.element_ty
    part = tl.program_id(0)
    vectors = tl.arange(0, BLOCK_X)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    used = tl.load(count)
    t = tl.zeros((BLOCK_X, BLOCK_R), dtype)
    for first in range(part * span, (part + 1) * span, BLOCK_S):
        columns = first + tl.arange(0, BLOCK_S)
        X = stacked(grad, feature_mean, vectors, columns, C, s, dtype)
        K = used_tile(rows, r, columns, used, s)
        t = tl.dot(X, tl.trans(K), t, input_precision="ieee", out_dtype=dtype)
    offsets = (part * (C + 1) + vectors)[:, None] * R + r[None, :]
    tl.store(products + offsets, t, (vectors <= C)[:, None] & (r < R)[None, :])


@triton.jit
def rank_finish_kernel(
    head,
    beta,
    rows,
    count,
    feature_mean,
    step,
    found_inf,
    products,
    parts,
    projected,
    k,
    dots,
    C,
    s,
    R,
    lr: tl.float64,
    momentum: tl.float64,
    dampening: tl.float64,
    weight_decay: tl.float64,
    tensors,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Z and k, of a block of columns. Stores Z, or steps the weights where `projected` is None."""
    if is_skipped(found_inf):
        return
    dtype: tl.constexpr = rows.dtype.element_ty
    program = tl.program_id(0)
    vectors = tl.arange(0, BLOCK_X)
    columns = program * BLOCK_J + tl.arange(0, BLOCK_J)
    used = tl.load(count)
    removed = tl.zeros((BLOCK_X, BLOCK_J), dtype)
    for first in range(0, tl.minimum(used, R).to(tl.int32), BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        t = tl.zeros((BLOCK_X, BLOCK_R), dtype)
        for first_part in range(0, parts, PARTS_AT_ONCE):
            part = first_part + tl.arange(0, PARTS_AT_ONCE)
            offsets = (part[:, None] * (C + 1) + vectors[None, :])[:, :, None] * R + r[None, None, :]
            mask = ((part < parts)[:, None] & (vectors <= C)[None, :])[:, :, None] & (r < R)[None, None, :]
            t += tl.sum(tl.load(products + offsets, mask, other=0.0), axis=0)
        K = used_tile(rows, r, columns, used, s)
        removed = tl.dot(t, K, removed, input_precision="ieee", out_dtype=dtype)
    Z = tl.load(beta) * stacked(head.grad, feature_mean, vectors, columns, C, s, dtype) - removed

    inside = columns < s
    if feature_mean is not None:
        own_k = tl.sum(tl.where((vectors == C)[:, None], Z, 0.0), axis=0)
        tl.store(k + columns, own_k, inside)
        blocks = tl.num_programs(0)
        h = tl.load(feature_mean + columns, inside, other=0.0)
        tl.store(dots + program, tl.sum(own_k * h))
        tl.store(dots + blocks + program, tl.sum(tl.where(inside, own_k * own_k, 0.0)))
        tl.store(dots + 2 * blocks + program, tl.sum(h * h))
    if head.grad is not None:
        offsets = vectors.to(tl.int64)[:, None] * s + columns[None, :]
        mask = (vectors < C)[:, None] & inside[None, :]
        if projected is not None:
            tl.store(projected + offsets, Z, mask)
        else:
            rates = read_sgd(lr, momentum, dampening, weight_decay, tensors, dtype)
            sgd(head, offsets, mask, Z, tl.load(step) == 0, rates, NESTEROV, MAXIMIZE)


@triton.jit
def sum_of(parts, blocks, BLOCKS: tl.constexpr):
    index = tl.arange(0, BLOCKS)
    return tl.sum(tl.load(parts + index, index < blocks, other=0.0))


@triton.jit
def new_row(
    dots,
    blocks,
    beta,
    nu,
    alpha,
    alpha_tensor,
    NOISE: tl.constexpr,
    RATE: tl.constexpr,
    BLOCKS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Whether h̄ is absorbed at all, whether it becomes a row of K, u = k / root, with root = √d, and the ν in d."""
    mean_dot_k = sum_of(dots, blocks, BLOCKS)
    # h̄ᵀk ≥ |k|²/β, as P lies between 0 and βI. The larger one, as rounding may break that where k is almost 0. k is
    # P h̄ only to within ε β |h̄|: a smaller d would let its error make P indefinite.
    least = tl.where(beta > 0, sum_of(dots + blocks, blocks, BLOCKS) / beta, 0.0)
    squares = sum_of(dots + 2 * blocks, blocks, BLOCKS)
    noise = NOISE * beta * squares
    scale = tl.full((), 1.0, dtype)
    if nu is not None:
        scale = next_nu(tl.load(nu), squares, RATE)
    d = tl.maximum(read(alpha, alpha_tensor, dtype) * scale, noise, propagate_nan=tl.PropagateNan.ALL)
    d += tl.maximum(mean_dot_k, least, propagate_nan=tl.PropagateNan.ALL)
    absorbed = (d > 0) & (d < float("inf"))
    becomes_row = absorbed & (mean_dot_k >= noise)  # else P has nothing left along h̄
    return absorbed, becomes_row, tl.where(becomes_row, tl.sqrt(d), float("inf")), scale


@triton.jit
def absorb_kernel(
    head,
    beta,
    nu,
    rows,
    count,
    step,
    found_inf,
    projected,
    k,
    dots,
    blocks,
    products,
    parts,
    s,
    R,
    span,
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
    FORGETS: tl.constexpr,
    NOISE: tl.constexpr,
    RATE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WEIGHT_COLUMNS: tl.constexpr,
):
    """The first `parts` programs: K of a span of columns, and if K is full then products (parts, R, R) of K Kᵀ. One
    more a class: its weights, where there is a `projected`."""
    if is_skipped(found_inf):
        return
    dtype: tl.constexpr = rows.dtype.element_ty
    program = tl.program_id(0)
    keep, rho = read_forget(forget, tensors.forget, dtype)
    absorbed = False
    becomes_row = tl.full((), 0, tl.int1)
    root = tl.full((), 1.0, dtype)
    if k is not None:
        absorbed, becomes_row, root, _nu = new_row(
            dots, blocks, tl.load(beta), nu, alpha, tensors.alpha, NOISE, RATE, BLOCKS, dtype
        )
    if program < parts:
        used = tl.load(count)
        first = program * span
        if absorbed:
            kept = tl.sqrt(keep)
            for start in range(first, first + span, BLOCK_S):
                columns = start + tl.arange(0, BLOCK_S)
                inside = columns < s
                u = tl.load(k + columns, inside, other=0.0) / root
                if FORGETS:
                    u = u * kept
                    for r_first in range(0, tl.minimum(used, R).to(tl.int32), BLOCK_R):
                        r = r_first + tl.arange(0, BLOCK_R)
                        offsets = r.to(tl.int64)[:, None] * s + columns[None, :]
                        K = used_tile(rows, r, columns, used, s)
                        tl.store(rows + offsets, kept * K, (r < used)[:, None] & inside[None, :])
                if becomes_row & (used < R):
                    tl.store(rows + used * s + columns, u, inside)
        if used + becomes_row.to(tl.int64) >= R:
            tl.debug_barrier()  # the rows are written
            gram(rows, products + program * R * R, R, s, first, first + span, BLOCK_R, BLOCK_S)
    elif projected is not None:
        rates = read_sgd(lr, momentum, dampening, weight_decay, tensors, dtype)
        update = (absorbed, 1.0, root, 1.0, keep, rho)
        first_step = tl.load(step) == 0
        step_class(
            program - parts,
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


@triton.jit
def count_rows_kernel(
    beta,
    nu,
    count,
    step,
    found_inf,
    dots,
    blocks,
    products,
    parts,
    workspace,
    factors,
    is_full,
    R,
    n,
    s,
    alpha: tl.float64,
    forget: tl.float64,
    tensors,
    NOISE: tl.constexpr,
    RATE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRS: tl.constexpr,
    ANGLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What all programs of the other launches read: β, ν, `count` and `step`; where K is full, also the factors that
    compress it."""
    if is_skipped(found_inf):
        return
    advance(step, True)
    if dots is not None:
        dtype: tl.constexpr = beta.dtype.element_ty
        number = tl.load(beta)
        absorbed, becomes_row, _root, new_nu = new_row(
            dots, blocks, number, nu, alpha, tensors.alpha, NOISE, RATE, BLOCKS, dtype
        )
        keep, rho = read_forget(forget, tensors.forget, dtype)
        number = tl.where(absorbed, keep * number + rho, number)
        used = tl.load(count) + becomes_row.to(tl.int64)
        full = used >= R
        if full:
            number = strongest(
                products, parts, workspace, factors, number, R, n, s, NOISE, PARTS, PAIRS, ANGLES, BLOCK
            ).to(dtype)
            used = (used * 0 + R) // 2
        tl.debug_barrier()  # every thread has read what now changes
        tl.store(beta, number)
        if nu is not None:
            tl.store(nu, new_nu, absorbed)
        tl.store(count, used)
        tl.store(is_full, full.to(tl.int32))


def rank_step_(step: HeadStep) -> None:
    """`backends.triton.head_step_` with P = βI − KᵀK."""
    weight, grad, feature_mean, hyper = step.weight, step.grad, step.feature_mean, step.hyper
    P = step.projection
    beta, nu, rows, count = P.beta, P.nu, P.rows, P.count
    assert beta is not None and rows is not None and count is not None
    (C, s), R, device = weight.shape, len(rows), weight.device
    absorbs, by_mm = feature_mean is not None, C >= MM_FROM
    corrects = absorbs and hyper.absorb == "before"
    is_late = corrects or by_mm
    like: dict[str, Any] = {"dtype": rows.dtype, "device": device}

    span = max(BLOCK_S, triton.next_power_of_2(triton.cdiv(s, PARTS)))
    parts, blocks = triton.cdiv(s, span), triton.cdiv(s, BLOCK_S)
    classes = 0 if by_mm else C  # of which the first two launches make Z
    BLOCK_X = max(16, triton.next_power_of_2(classes + 1))
    block_r = min(BLOCK_R, max(16, triton.next_power_of_2(R)))
    sums = torch.empty(parts, classes + 1, R, **like) if absorbs or not by_mm else None
    k = torch.empty(s, **like) if absorbs else None
    dots = torch.empty(3, blocks, **like) if absorbs else None
    projected = torch.empty(C, s, **like) if is_late else None

    # Of a compression. n: R, made even.
    n, keep = R + R % 2, R // 2
    products = torch.empty(parts, R, R, dtype=torch.float64, device=device) if absorbs else None
    workspace = torch.empty(2 * n * n + n, dtype=torch.float64, device=device) if absorbs else None
    factors = torch.empty(max(keep, 1), R, **like) if absorbs else None
    is_full = torch.empty((), dtype=torch.int32, device=device) if absorbs else None

    head = Head(weight, grad, step.momentum_buffer, step.grad_scale)
    numbers, tensors = numbers_and_tensors(hyper, device)
    forgets = isinstance(hyper.forget, Tensor) or hyper.forget != 0
    BLOCKS, noise = triton.next_power_of_2(blocks), RANK_NOISE * torch.finfo(rows.dtype).eps

    with on(device):
        if sums is not None:
            own_head = NO_HEAD if by_mm else head
            rows_product_kernel[(parts, triton.cdiv(R, block_r))](
                own_head.grad,
                feature_mean,
                rows,
                count,
                step.found_inf,
                sums,
                classes,
                s,
                R,
                span,
                BLOCK_X,
                block_r,
                BLOCK_S,
            )
            rank_finish_kernel[(blocks,)](
                own_head,
                beta,
                rows,
                count,
                feature_mean,
                step.step,
                step.found_inf,
                sums,
                parts,
                projected,
                k,
                dots,
                classes,
                s,
                R,
                *numbers[:4],
                tensors,
                hyper.nesterov,
                hyper.maximize,
                PARTS_AT_ONCE,
                BLOCK_X,
                block_r,
                BLOCK_S,
                num_warps=WARPS,
            )
        if by_mm:
            P.product(grad, out=projected)
        spans = parts if absorbs else 0
        if absorbs or is_late:
            absorb_kernel[(spans + (C if is_late else 0),)](
                head if is_late else NO_HEAD,
                beta,
                nu,
                rows,
                count,
                step.step,
                step.found_inf,
                projected,
                k,
                dots,
                blocks,
                products,
                spans,
                s,
                R,
                span,
                *numbers,
                tensors,
                hyper.nesterov,
                hyper.maximize,
                corrects,
                forgets,
                noise,
                NU_RATE,
                BLOCKS,
                block_r,
                BLOCK_S,
                WEIGHT_COLUMNS,
                num_warps=WARPS,
            )
        count_rows_kernel[(1,)](
            beta,
            nu,
            count,
            step.step,
            step.found_inf,
            dots,
            blocks,
            products,
            parts,
            workspace,
            factors,
            is_full,
            R,
            n,
            s,
            *numbers[4:],
            tensors,
            noise,
            NU_RATE,
            BLOCKS,
            triton.next_power_of_2(parts),
            PAIRS,
            ANGLES,
            GRAM_BLOCK,
            num_warps=WARPS,
        )
        if absorbs and keep:
            rotate_kernel[(blocks,)](
                rows,
                factors,
                is_full,
                step.found_inf,
                R,
                s,
                max(16, triton.next_power_of_2(keep)),
                16,
                BLOCK_S,
            )
