"""Fusion of the modalities' logits by their certainty (eq. 7-9), in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulate_dtype
from .launch import on

__all__ = ["entropy_fusion"]

# Logits that a program of 128 threads holds at a time: four a thread. With more, registers spill.
TILE = 512


@triton.jit
def load_logits(logits, temperatures, m, samples, classes, N, C, mask, other, dtype: tl.constexpr):
    """The tile (samples, classes) of modality m, over its temperature."""
    rows = (m * N.to(tl.int64) + samples) * C
    x = tl.load(logits + rows[:, None] + classes[None, :], mask, other=other).to(dtype)
    if temperatures is not None:
        x *= 1.0 / tl.load(temperatures + m)
    return x


@triton.jit
def entropy_of(logits, temperatures, m, samples, present, N, C, BLOCK_C: tl.constexpr, dtype: tl.constexpr):
    """log Σ e^(x−max) − Σ e^(x−max) (x−max) / Σ e^(x−max) of each row, in one pass over its classes."""
    maximum = tl.full(samples.shape, -float("inf"), dtype)
    total = tl.zeros(samples.shape, dtype)  # Σ e^(x−maximum)
    weighted = tl.zeros(samples.shape, dtype)  # Σ e^(x−maximum) (x−maximum)
    for first in range(0, C, BLOCK_C):
        classes = first + tl.arange(0, BLOCK_C)
        mask = present[:, None] & (classes < C)[None, :]
        x = load_logits(logits, temperatures, m, samples, classes, N, C, mask, -float("inf"), dtype)
        larger = tl.maximum(maximum, tl.max(x, axis=1))
        # Sums of nothing stay 0, whatever the old maximum was; −∞ − (−∞) must not make them NaN.
        # At −10⁴ the scale is 0; without that bound a shift of −∞ times it is NaN.
        shift = tl.where(total > 0, tl.maximum(maximum - larger, -1e4), 0.0)
        scale = tl.exp(shift)
        weighted = (weighted + shift * total) * scale
        total *= scale
        maximum = larger
        below = x - tl.where(larger == -float("inf"), 0.0, larger)[:, None]
        e = tl.exp(below)
        total += tl.sum(e, axis=1)
        weighted += tl.sum(tl.where(e > 0, e * below, 0.0), axis=1)  # p = 0 contributes 0
    return tl.log(total) - weighted / total


@triton.jit(do_not_specialize=["M", "N"])
def entropy_fusion_kernel(
    logits,
    present,
    temperatures,
    fused,
    weights,
    M,
    N,
    C,
    EQUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype: tl.constexpr = weights.dtype.element_ty
    samples = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    modalities = tl.arange(0, BLOCK_M)

    pairs = modalities.to(tl.int64)[None, :] * N + samples[:, None]
    inside = (samples < N)[:, None] & (modalities < M)[None, :]
    here = inside
    if present is not None:
        here = inside & (tl.load(present + pairs, inside, other=0) != 0)
    if EQUAL:
        certainty = here.to(dtype)
    else:
        entropies = tl.full((BLOCK_N, BLOCK_M), float("inf"), dtype)
        for m in range(M):
            chosen = (modalities == m)[None, :] & here
            has_m = tl.max(chosen.to(tl.int32), axis=1) > 0
            entropy = entropy_of(logits, temperatures, m, samples, has_m, N, C, BLOCK_C, dtype)
            entropies = tl.where(chosen, entropy[:, None], entropies)
        certainty = tl.where(here, tl.exp(tl.min(entropies, axis=1)[:, None] - entropies), 0.0)

    # λ = softmax(−entropy), or equal, over the modalities that are there; 0 for all where none is.
    total = tl.sum(certainty, axis=1)[:, None]
    own_weights = tl.where(here, certainty / tl.where(total == 0, 1.0, total), 0.0)
    tl.store(weights + pairs, own_weights, inside)

    for first in range(0, C, BLOCK_C):
        classes = first + tl.arange(0, BLOCK_C)
        sums = tl.zeros((BLOCK_N, BLOCK_C), dtype)
        for m in range(M):
            chosen = (modalities == m)[None, :] & here
            has_m = tl.max(chosen.to(tl.int32), axis=1) > 0
            mask = has_m[:, None] & (classes < C)[None, :]
            x = load_logits(logits, temperatures, m, samples, classes, N, C, mask, 0.0, dtype)
            sums += tl.sum(tl.where(chosen, own_weights, 0.0), axis=1)[:, None] * x
        mask = (samples < N)[:, None] & (classes < C)[None, :]
        tl.store(fused + samples[:, None] * C + classes[None, :], sums, mask)


def entropy_fusion(
    logits: Tensor, present: Tensor | None, temperatures: Tensor | None = None, equal: bool = False
) -> tuple[Tensor, Tensor]:
    M, N, C = logits.shape
    fused = torch.empty((N, C), dtype=logits.dtype, device=logits.device)
    weights = torch.empty((M, N), dtype=accumulate_dtype(logits.dtype), device=logits.device)
    if N == 0:
        return fused, weights
    # Whole rows where they fit, and as many samples as then fill the tile, but few enough to leave several programs.
    BLOCK_C = min(triton.next_power_of_2(C), TILE)
    BLOCK_N = min(TILE // BLOCK_C, 32)
    with on(logits.device):
        entropy_fusion_kernel[(triton.cdiv(N, BLOCK_N),)](
            logits,
            present,
            temperatures,
            fused,
            weights,
            M,
            N,
            C,
            equal,
            triton.next_power_of_2(M),
            BLOCK_N,
            BLOCK_C,
        )
    return fused, weights
