"""What a head has been fed since its last step: the running feature mean h̄ and the number of rows behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops


@dataclass
class Observation:
    """mean h̄ (s,) of `count` feature rows; every micro-batch since the last step counts by its rows."""

    mean: Tensor
    count: int

    def add(self, mean: Tensor, count: int) -> None:
        self.count += count
        self.mean = self.mean.lerp(mean, count / self.count)


def observe(features: Tensor, dtype: torch.dtype, backend: str) -> Observation:
    """The observation of one batch (N, s), its mean in `dtype`."""
    return Observation(ops.feature_mean(features.detach(), backend=backend).to(dtype), len(features))


def average_over_ranks(
    observations: list[Observation | None], projections: list[Tensor], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Every rank's observations joined, weighted by their counts, in one all-reduce: a feature mean (s,) each.

    `projections` (s, s), one per observation, give size, dtype and device where this rank observed nothing: a rank
    with an empty batch takes part with count 0. Where no rank observed anything the mean is NaN, which no backend
    absorbs; so the host need not wait to learn the count.
    """
    parts = []
    for observation, P in zip(observations, projections, strict=True):
        sums = P.new_zeros(len(P) + 1)
        if observation is not None:
            sums[:-1] = observation.mean * observation.count
            sums[-1] = observation.count
        parts.append(sums)
    joined = torch.cat(parts)
    dist.all_reduce(joined, group=group)
    split = joined.split([len(part) for part in parts])
    return [(sums[:-1] / sums[-1]).to(P.dtype) for sums, P in zip(split, projections, strict=True)]
