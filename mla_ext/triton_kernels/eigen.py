"""Eigenvalues and eigenvectors of a small symmetric matrix, by one program, with no decision of the host."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ANGLES", "PAIRS", "jacobi"]

# Pairs of rows, and pairs of columns, that are rotated at a time.
PAIRS = 32
# Pairs whose angles are found at a time.
ANGLES = 64
# Nine or ten do for up to 128 rows.
SWEEPS = tl.constexpr(20)


@triton.jit
def pair(index, round, n):
    """Pair `index` of that round of a tournament: in n − 1 rounds each of n rows meets each other one once."""
    first = (round + index) % (n - 1)
    second = (round - index + n - 1) % (n - 1)
    return first, tl.where(index == 0, n - 1, second)


@triton.jit
def jacobi(A, V, cosines, sines, n, PAIRS: tl.constexpr, ANGLES: tl.constexpr):
    """Rotates the symmetric A (n, n), n even, until it is diagonal, and the identity V alike: then row i of V is the
    eigenvector of the value A[i, i]. All are float64 in global memory; cosines and sines have n / 2 elements.

    The pairs of a round have no row in common, so each number is changed by one thread. The barriers are between
    threads that read what others write.
    """
    trace = tl.full((), 0.0, tl.float64)
    for first in range(0, n, ANGLES):
        i = first + tl.arange(0, ANGLES)
        trace += tl.sum(tl.load(A + i * (n + 1), i < n, other=0.0))
    met = tl.full((), float("inf"), tl.float64)  # the squares off the diagonal, as this sweep meets them
    sweep = 0
    while (sweep < SWEEPS) & (met > 1e-24 * trace * trace):
        met = tl.full((), 0.0, tl.float64)
        for round in range(0, n - 1):
            for first in range(0, n // 2, ANGLES):
                index = first + tl.arange(0, ANGLES)
                inside = index < n // 2
                p, q = pair(index, round, n)
                beside = tl.load(A + p * n + q, inside, other=0.0)
                # Rounding stays where it is: turned about, it would take many more sweeps to vanish.
                beside = tl.where(tl.abs(beside) > 1e-16 * trace, beside, 0.0)
                twice = 2.0 * beside
                gap = tl.load(A + q * n + q, inside, other=0.0) - tl.load(A + p * n + p, inside, other=0.0)
                # tan of the smaller of the two angles that make A[p, q] zero
                size = tl.abs(gap) + tl.sqrt(gap * gap + twice * twice)
                tangent = tl.where(size > 0, tl.where(gap < 0, -twice, twice) / tl.where(size > 0, size, 1.0), 0.0)
                cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
                tl.store(cosines + index, cosine, inside)
                tl.store(sines + index, tangent * cosine, inside)
                met += tl.sum(beside * beside)
            tl.debug_barrier()
            for first in range(0, n // 2, PAIRS):
                index = first + tl.arange(0, PAIRS)
                inside = index < n // 2
                p, q = pair(index, round, n)
                p, q = p[:, None] * n, q[:, None] * n
                c = tl.load(cosines + index, inside, other=1.0)[:, None]
                s = tl.load(sines + index, inside, other=0.0)[:, None]
                for other in range(0, n // 2, PAIRS):
                    index = other + tl.arange(0, PAIRS)
                    mask = inside[:, None] & (index < n // 2)[None, :]
                    i, j = pair(index, round, n)
                    i, j = i[None, :], j[None, :]
                    e = tl.load(cosines + index, index < n // 2, other=1.0)[None, :]
                    f = tl.load(sines + index, index < n // 2, other=0.0)[None, :]
                    pi, pj = tl.load(A + p + i, mask, other=0.0), tl.load(A + p + j, mask, other=0.0)
                    qi, qj = tl.load(A + q + i, mask, other=0.0), tl.load(A + q + j, mask, other=0.0)
                    pi, pj, qi, qj = c * pi - s * qi, c * pj - s * qj, s * pi + c * qi, s * pj + c * qj
                    tl.store(A + p + i, e * pi - f * pj, mask)
                    tl.store(A + p + j, f * pi + e * pj, mask)
                    tl.store(A + q + i, e * qi - f * qj, mask)
                    tl.store(A + q + j, f * qi + e * qj, mask)
                for start in range(0, n, 2 * PAIRS):
                    columns = (start + tl.arange(0, 2 * PAIRS))[None, :]
                    mask = inside[:, None] & (columns < n)
                    a, b = tl.load(V + p + columns, mask, other=0.0), tl.load(V + q + columns, mask, other=0.0)
                    tl.store(V + p + columns, c * a - s * b, mask)
                    tl.store(V + q + columns, s * a + c * b, mask)
            tl.debug_barrier()
        sweep += 1
