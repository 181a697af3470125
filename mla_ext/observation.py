"""What a head has been fed since its last step: the running feature mean h̄ and the number of rows behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends


@dataclass
class Observation:
    """mean h̄ (s,) of `count` feature rows; every micro-batch since the last step counts by its rows."""

    mean: Tensor
    count: int
    features: Tensor | None = None  # (N, s), of a single batch
    output_grad: Tensor | None = None  # (N, C), once a backward pass has reached the head's output

    def add(self, mean: Tensor, count: int) -> None:
        self.count += count
        self.mean = self.mean.lerp(mean, count / self.count)
        self.features = None

    def keep_factors(self, features: Tensor, output: Tensor) -> None:
        """Keep what the weight's gradient is the product of, as long as this batch (N, s) -> (N, C) is the only one."""

        def keep(grad: Tensor) -> None:
            self.output_grad = grad.reshape(-1, grad.shape[-1])

        self.features = features
        output.register_hook(keep)

    def factors_of(self, grad: Tensor) -> tuple[Tensor, Tensor] | None:
        """features (N, s) and output_grad (N, C), if grad (C, s) is their product and nothing else, to the last bit.

        That is what the backward pass of a linear layer leaves, unless there was another loss, another batch, a hook,
        clipping, scaling or an average over ranks.
        """
        features, output_grad = self.features, self.output_grad
        if features is None or output_grad is None or not torch.equal(output_grad.t() @ features, grad):
            return None
        return features.contiguous(), output_grad.contiguous()


def observe(features: Tensor, dtype: torch.dtype, backend: str) -> Observation:
    """The observation of one batch (N, s), which is checked already; its mean in `dtype`."""
    mean = backends.choose(backend, features.device).feature_mean(features.detach().contiguous())
    return Observation(mean.to(dtype), len(features))


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
