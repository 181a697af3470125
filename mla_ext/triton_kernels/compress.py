"""Half of the rows of P = βI − KᵀK: its strongest directions as they are, the others made one number."""

from __future__ import annotations

import triton
import triton.language as tl

from .eigen import jacobi
from .sgd import is_skipped

__all__ = ["gram", "rotate_kernel", "strongest"]


@triton.jit
def gram(rows, products, R, s, first, last, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """products (R, R) = K Kᵀ of the columns [first, last) of K, in float64."""
    for i_first in range(0, R, BLOCK_R):
        i = i_first + tl.arange(0, BLOCK_R)
        for j_first in range(0, R, BLOCK_R):
            j = j_first + tl.arange(0, BLOCK_R)
            sums = tl.zeros((BLOCK_R, BLOCK_R), tl.float64)
            for start in range(first, last, BLOCK_S):
                columns = start + tl.arange(0, BLOCK_S)
                inside = (columns < s)[None, :]
                left = tl.load(rows + i.to(tl.int64)[:, None] * s + columns[None, :], (i < R)[:, None] & inside, 0.0)
                right = tl.load(rows + j.to(tl.int64)[:, None] * s + columns[None, :], (j < R)[:, None] & inside, 0.0)
                wide = tl.trans(right.to(tl.float64))
                sums = tl.dot(left.to(tl.float64), wide, sums, input_precision="ieee", out_dtype=tl.float64)
            tl.store(products + i[:, None] * R + j[None, :], sums, (i < R)[:, None] & (j < R)[None, :])


@triton.jit
def ordered(A, i, R, n, BLOCK: tl.constexpr):
    """The eigenvalues i, and how many are before each by falling size."""
    values = tl.load(A + i * (n + 1), i < R, other=0.0)
    position = tl.zeros(i.shape, tl.int32)
    for first in range(0, R, BLOCK):
        j = first + tl.arange(0, BLOCK)
        others = tl.load(A + j * (n + 1), j < R, other=-float("inf"))
        before = (others[None, :] > values[:, None]) | (
            (others[None, :] == values[:, None]) & (j[None, :] < i[:, None])
        )
        position += tl.sum(before.to(tl.int32), axis=1)
    return values, position


@triton.jit
def strongest(
    products,
    parts,
    workspace,
    factors,
    beta,
    R,
    n,
    s,
    NOISE: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRS: tl.constexpr,
    ANGLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With K Kᵀ = V Λ Vᵀ, P has the eigenvalue β − λ_i on the direction of V_iᵀ K. The R/2 largest λ stay, and all else
    becomes one number times I, of the same trace: a row is √(number − p_i) times its direction. Returns the number,
    and factors (R/2, R), by which K is to be multiplied. One program; workspace: 2 n² + n float64, n = R, made even."""
    A, V = workspace, workspace + n * n
    cosines, sines = workspace + 2 * n * n, workspace + 2 * n * n + n // 2
    for first in range(0, n * n, BLOCK):
        index = first + tl.arange(0, BLOCK)
        i, j = index // n, index % n
        part = tl.arange(0, PARTS)[:, None]
        mask = (part < parts) & ((i < R) & (j < R))[None, :]
        sums = tl.sum(tl.load(products + part * (R * R) + (i * R + j)[None, :], mask, other=0.0), axis=0)
        tl.store(A + index, sums, index < n * n)
        tl.store(V + index, tl.where(i == j, 1.0, 0.0).to(tl.float64), index < n * n)
    tl.debug_barrier()
    jacobi(A, V, cosines, sines, n, PAIRS, ANGLES)

    keep = R // 2
    wide = beta.to(tl.float64)
    dropped = tl.full((), 0.0, tl.float64)
    for first in range(0, R, BLOCK):
        i = first + tl.arange(0, BLOCK)
        values, position = ordered(A, i, R, n, BLOCK)
        dropped += tl.sum(tl.where((position >= keep) & (i < R), tl.maximum(wide - values, NOISE * wide), 0.0))
    number = wide
    if s > keep:
        number = (dropped + (s - R).to(tl.float64) * wide) / (s - keep).to(tl.float64)
        number = tl.maximum(number, 0.0)  # more rows than s: their sum is 0 to rounding
    for first in range(0, R, BLOCK):
        i = first + tl.arange(0, BLOCK)
        values, position = ordered(A, i, R, n, BLOCK)
        p = tl.maximum(wide - values, NOISE * wide)  # none becomes negative over the compressions
        is_there = (values > 1e-15 * wide) & (number > p)  # a direction that is not there becomes a row of zeros
        factor = tl.where(is_there, tl.sqrt(tl.where(is_there, (number - p) / values, 0.0)), 0.0)
        for start in range(0, R, BLOCK):
            j = start + tl.arange(0, BLOCK)
            mask = ((i < R) & (position < keep))[:, None] & (j < R)[None, :]
            vectors = tl.load(V + i[:, None] * n + j[None, :], mask, other=0.0)
            tl.store(factors + position[:, None] * R + j[None, :], factor[:, None] * vectors, mask)
    return number


@triton.jit
def rotate_kernel(
    rows, factors, is_full, found_inf, R, s, BLOCK_KEEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr
):
    """K ← factors K, where K is full."""
    if is_skipped(found_inf):
        return
    if tl.load(is_full) == 0:
        return
    dtype: tl.constexpr = rows.dtype.element_ty
    keep = R // 2
    i = tl.arange(0, BLOCK_KEEP)
    columns = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    inside = (columns < s)[None, :]
    new = tl.zeros((BLOCK_KEEP, BLOCK_J), dtype)
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        F = tl.load(factors + i[:, None] * R + r[None, :], (i < keep)[:, None] & (r < R)[None, :], other=0.0)
        K = tl.load(rows + r.to(tl.int64)[:, None] * s + columns[None, :], (r < R)[:, None] & inside, other=0.0)
        new = tl.dot(F, K, new, input_precision="ieee", out_dtype=dtype)
    tl.debug_barrier()  # all of the columns has been read
    tl.store(rows + i.to(tl.int64)[:, None] * s + columns[None, :], new, (i < keep)[:, None] & inside)
