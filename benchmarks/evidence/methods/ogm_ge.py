"""OGM-GE: the stronger modality's gradient is made smaller, and every encoder's gets noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_ext import ConcatModel, MultimodalData
from mla_ext.multimodal.model import Step

from .common import Built, Setting, head_of


class OGMGE(ConcatModel):
    """On-the-fly gradient modulation with generalisation enhancement (Peng et al. 2022), on concatenation.

    s_u = mean_i softmax(z_u)_i[y_i] over the samples that have u; ρ_u = s_u / Σ of the others'; k_u = 1 − tanh(α ρ_u)
    if ρ_u > 1, else 1. Before the step every encoder's gradient becomes k_u g + N(0, (std(g) + 1e-8)²).
    """

    def __init__(self, encoders: dict[str, nn.Module], head: nn.Linear, alpha: float) -> None:
        super().__init__(encoders, head)
        self.alpha = alpha
        self.coefficients: list[Tensor] = []

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        parts, present = self.features(data, step.indices)
        labels = self.labels(data, step.indices)
        with torch.no_grad():
            right = self.unimodal(parts, present).softmax(dim=-1)[:, torch.arange(len(labels)), labels]
            scores = (right * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
            ratios = scores / (scores.sum() - scores).clamp(min=1e-8)
            self.coefficients = list(torch.where(ratios > 1, 1 - torch.tanh(self.alpha * ratios), 1.0))
        return F.cross_entropy(self.joint(parts, present), labels)

    @torch.no_grad()
    def modulate(self, *_: object) -> None:
        """A hook that runs before the optimizer's step."""
        for encoder, k in zip(self.encoders.values(), self.coefficients, strict=True):
            for parameter in encoder.parameters():
                grad = parameter.grad
                grad.copy_(k * grad + torch.randn_like(grad) * (grad.std(correction=0) + 1e-8))


def build_ogm_ge(data: MultimodalData, s: Setting) -> Built:
    model = OGMGE(s.encoders(data), head_of(data, s.width * len(data.modalities)), alpha=s.own)
    optimizer = s.sgd(model)
    optimizer.register_step_pre_hook(model.modulate)
    return model, optimizer
