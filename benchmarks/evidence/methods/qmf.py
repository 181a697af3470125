"""QMF: modalities are weighted by a confidence that is trained to follow the losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_ext import MultimodalData
from mla_ext.multimodal.late import per_modality_loss
from mla_ext.multimodal.model import Step

from .common import Built, Setting, heads_of
from .fusion import Sum


class QMF(Sum):
    """Quality-aware fusion (Zhang et al. 2023): z = Σ_m c_m z_m with c_m = logsumexp(z_m) / 10.

    Loss: CE(z) + Σ_m CE(z_m) + λ Σ_m rank(c_m). The rank term compares each sample with the next of the batch: the
    one whose cross entropy, summed over training and scaled to [0, 1], is lower should be the more confident.
    """

    def __init__(self, encoders: dict[str, nn.Module], heads: list[nn.Linear], weight: float, samples: int) -> None:
        super().__init__(encoders, heads)
        self.weight = weight
        self.register_buffer("history", torch.zeros(len(encoders), samples))

    def joint(self, parts: list[Tensor], present: Tensor) -> Tensor:
        z = self.unimodal(parts, present).masked_fill(~present.unsqueeze(-1), 0.0)
        return (confidence(z).unsqueeze(-1) * z).sum(dim=0)

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        parts, present = self.features(data, step.indices)
        labels = self.labels(data, step.indices)
        z = self.unimodal(parts, present)
        loss = F.cross_entropy(self.joint(parts, present), labels) + per_modality_loss(z, present, labels)
        for z_m, has, history in zip(z, present, self.history, strict=True):
            indices = step.indices[has]
            if len(indices) > 1:
                history[indices] += F.cross_entropy(z_m[has].detach(), labels[has], reduction="none")
                loss = loss + self.weight * rank_loss(confidence(z_m[has]), history[indices], history)
        return loss


def confidence(z: Tensor) -> Tensor:
    return z.logsumexp(dim=-1) / 10


def rank_loss(c: Tensor, losses: Tensor, history: Tensor) -> Tensor:
    """A margin ranking of confidences c (N,) between neighbours, by their running cross entropies `losses` (N,)."""
    losses = (losses - history.min()) / (history.max() - history.min()).clamp(min=1e-12)
    difference = losses - losses.roll(-1)
    return F.margin_ranking_loss(c, c.roll(-1) + difference, -difference.sign())


def build_qmf(data: MultimodalData, s: Setting) -> Built:
    model = QMF(s.encoders(data), heads_of(data, s.width), weight=s.own, samples=len(data))
    return model, s.sgd(model)
