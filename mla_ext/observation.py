"""What a head has been fed since its last step: the running feature mean h̄ and the number of rows behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from .backends import Backend
from .layers import row_size
from .reference import accumulate_dtype

__all__ = ["Observation", "average_over_ranks", "observe"]


@dataclass(slots=True)
class Observation:
    """mean h̄ (s,) of `count` feature rows; every micro-batch since the last step counts by its rows."""

    mean: Tensor
    count: int
    backend: Backend

    def renewed(self, features: Tensor) -> Observation | None:
        """The observation of another batch (..., s), unchecked, in the memory of this one; None if it cannot be had."""
        count = self.backend.feature_mean_(features, self.mean)
        return Observation(self.mean, count, self.backend) if count else None

    def add(self, other: Observation) -> None:
        self.count += other.count
        self.mean = self.mean.to(other.mean).lerp(other.mean, other.count / self.count)  # the model may have moved


def observe(features: Tensor, dtype: torch.dtype, backend: str) -> Observation:
    """The observation of one batch (N, s), which is checked already; its mean in `dtype`."""
    chosen = backends.choose(backend, features.device)
    mean = chosen.feature_mean(features.detach().contiguous())
    return Observation(mean.to(dtype), len(features), chosen)


def average_over_ranks(
    observations: list[Observation | None], weights: list[Tensor], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Every rank's observations joined, weighted by their counts, in one all-reduce: a feature mean (s,) each.

    `weights` (C, s), one per observation, give size, dtype and device where this rank observed nothing: a rank with an
    empty batch takes part with count 0. Where no rank observed anything the mean is NaN, which no backend absorbs; so
    the host need not wait to learn the count.
    """
    parts = []
    for observation, weight in zip(observations, weights, strict=True):
        sums = torch.zeros(row_size(weight) + 1, dtype=accumulate_dtype(weight.dtype), device=weight.device)
        if observation is not None:
            sums[:-1] = observation.mean * observation.count
            sums[-1] = observation.count
        parts.append(sums)
    joined = torch.cat(parts)
    dist.all_reduce(joined, group=group)
    split = torch.split(joined, [len(part) for part in parts])
    return [(sums[:-1] / sums[-1]).to(part.dtype) for sums, part in zip(split, parts, strict=True)]
