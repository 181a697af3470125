"""IGM: alternation whose head gradient is scaled direction by direction, by what the other modalities feed in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_ext import MultimodalData, SharedHeadModel
from mla_ext.multimodal.model import Logits, Step

from .common import Built, Setting, head_of


class IGM(SharedHeadModel):
    """Interactive learning by flat gradient modification (Jiang et al., IJCAI 2025): G ← G P, P = V exp(−τ σ̂) Vᵀ.

    V and σ are the singular vectors and values of Σ h̄ h̄ᵀ over the steps of the other modalities so far, and
    σ̂ = (σ − σ_min) / (σ_max − σ_min): no direction is shut, the strongest keeps exp(−τ). Prediction: the mean of the
    softmaxes.

    The authors train a modality for many epochs, then the next, with a head for each, and project every linear layer
    whose shape fits; here the turns and the shared head are MLA's, and the head is projected, so that the rows differ
    in the projector alone. Their sharpness-aware part is left out: their settings perturb by 1e-10 or less. So is
    their mixup, which any row could have. τ is 0.4 in their settings.
    """

    def __init__(self, encoders: dict[str, nn.Module], head: nn.Linear, temperature: float) -> None:
        super().__init__(encoders, head)
        self.temperature = temperature
        self.register_buffer("moments", torch.zeros(len(encoders), head.in_features, head.in_features))
        self.turn, self.mean = 0, torch.zeros(head.in_features)

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        (modality,) = step.modalities
        features = self.encoders[modality](self.inputs(data, modality, step.indices))
        self.turn, self.mean = self.modalities.index(modality), features.detach().mean(dim=0)
        return F.cross_entropy(self.head(features), self.labels(data, step.indices))

    @torch.no_grad()
    def modify(self, *_: object) -> None:
        """A hook that runs before the optimizer's step."""
        others = self.moments.sum(dim=0) - self.moments[self.turn]
        self.head.weight.grad.copy_(self.head.weight.grad @ softened(others, self.temperature))
        self.moments[self.turn] += torch.outer(self.mean, self.mean)

    def logits(self, data: MultimodalData, indices: Tensor) -> Logits:
        logits = super().logits(data, indices)
        probabilities = logits.unimodal.softmax(dim=-1).masked_fill(~logits.present.unsqueeze(-1), 0.0)
        return logits._replace(joint=(probabilities.sum(dim=0) / logits.present.sum(dim=0).unsqueeze(-1)).log())


def softened(moment: Tensor, temperature: float) -> Tensor:
    """V exp(−τ σ̂) Vᵀ of a symmetric matrix (s, s); the identity where all singular values are the same."""
    values, vectors = torch.linalg.eigh(moment)
    spread = values[-1] - values[0]
    scaled = (values - values[0]) / spread if spread > 0 else torch.zeros_like(values)
    return (vectors * torch.exp(-temperature * scaled)) @ vectors.T


def build_igm(data: MultimodalData, s: Setting) -> Built:
    model = IGM(s.encoders(data), head_of(data, s.width), temperature=s.own)
    optimizer = s.sgd(model)
    optimizer.register_step_pre_hook(model.modify)
    return model, optimizer
