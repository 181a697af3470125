"""Late fusion: a model of its own for each modality, and the mean of what they say. The strongest simple baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import MultimodalData
from .model import Criterion, JointModel, Step

__all__ = ["LateFusionModel", "per_modality_loss"]


class LateFusionModel(JointModel):
    """z = Σ_m (W_m h_m + b_m) / M over the M modalities that a sample has; each has a head and a loss of its own.

    Args: encoders, {modality: module}, features (N, s_m); heads, nn.Linear(s_m, C) for each, in the same order.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], heads: Sequence[nn.Linear]) -> None:
        super().__init__(encoders)
        if len(heads) != len(encoders):
            raise ValueError(f"heads: expected one for each of {list(encoders)}, got {len(heads)}")
        self.heads = nn.ModuleList(heads)

    def unimodal(self, parts: list[Tensor], present: Tensor) -> Tensor:
        return torch.stack([head(part) for head, part in zip(self.heads, parts, strict=True)])

    def summed(self, parts: list[Tensor], present: Tensor) -> Tensor:
        """The sum of the logits (N, C) over the modalities present."""
        return self.unimodal(parts, present).masked_fill(~present.unsqueeze(-1), 0.0).sum(dim=0)

    def joint(self, parts: list[Tensor], present: Tensor) -> Tensor:
        return self.summed(parts, present) / present.sum(dim=0).unsqueeze(-1)

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        """The sum of the modalities' own losses."""
        parts, present = self.features(data, step.indices)
        unimodal = self.unimodal(parts, present)
        return per_modality_loss(unimodal, present, self.labels(data, step.indices), self.criterion)


def per_modality_loss(
    unimodal: Tensor, present: Tensor, labels: Tensor, criterion: Criterion = F.cross_entropy
) -> Tensor:
    """Σ_m criterion(z_m, y), each over the samples that have the modality. (M, N, C), bool (M, N), int64 (N,) -> ()."""
    losses = [criterion(z[p], labels[p]) for z, p in zip(unimodal, present, strict=True) if p.any()]
    return torch.stack(losses).sum()
