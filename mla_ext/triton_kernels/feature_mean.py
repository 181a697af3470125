"""h̄, the mean of the features over the batch (eq. 4), in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulate_dtype
from .launch import on

__all__ = ["feature_mean"]

# A program owns few columns, so that a head of 512 features still makes 16 of them; 32 neighbours fill whole sectors.
BLOCK_N, BLOCK_S = 64, 32


@triton.jit(do_not_specialize=["N"])
def feature_mean_kernel(features, mean, N, s, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    dtype: tl.constexpr = mean.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    sums = tl.zeros((BLOCK_N, BLOCK_S), dtype)
    for first in range(0, N, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & (columns < s)[None, :]
        sums += tl.load(features + rows.to(tl.int64)[:, None] * s + columns[None, :], mask, other=0.0).to(dtype)
    tl.store(mean + columns, tl.sum(sums, axis=0) / N, columns < s)


def feature_mean(features: Tensor) -> Tensor:
    N, s = features.shape
    mean = torch.empty(s, dtype=accumulate_dtype(features.dtype), device=features.device)
    with on(features.device):
        feature_mean_kernel[(triton.cdiv(s, BLOCK_S),)](features, mean, N, s, BLOCK_N, BLOCK_S)
    return mean
