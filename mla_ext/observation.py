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
) -> list[Observation | None]:
    """Every rank's observations joined, weighted by their counts, in one all-reduce.

    `projections` (s, s), one per observation, give size, dtype and device where this rank observed nothing: a rank
    with an empty batch takes part with count 0. Where no rank observed anything the result is None.
    """
    parts = []
    for observation, P in zip(observations, projections, strict=True):
        sums = P.new_zeros(len(P) + 1)
        if observation is not None:
            sums[:-1] = observation.mean * observation.count
            sums[-1] = observation.count
        parts.append(sums)
    flat = torch.cat(parts)
    dist.all_reduce(flat, group=group)
    joined: list[Observation | None] = []
    for sums, P in zip(flat.split([len(part) for part in parts]), projections, strict=True):
        count = int(sums[-1])
        joined.append(Observation((sums[:-1] / count).to(P.dtype), count) if count else None)
    return joined
