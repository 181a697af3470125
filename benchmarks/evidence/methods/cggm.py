"""CGGM: classifiers of the single modalities say how far and which way each encoder should go."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_ext import ConcatModel, MultimodalData
from mla_ext.multimodal.late import per_modality_loss
from mla_ext.multimodal.model import Step

from .common import Built, Setting, head_of, heads_of

RATE = 1.3  # ρ, as in the authors' commands


class CGGM(ConcatModel):
    """Classifier-guided gradient modulation (Guo et al., NeurIPS 2024), on concatenation.

    A classifier learns on each encoder's detached features. Δ_m is how much its accuracy rose since the batch before.
    Length: an encoder's gradient is multiplied by B_m = ρ (ΣΔ − Δ_m) / ΣΔ, so that who learns fast steps less.
    Direction: the loss gains λ · mean_m (|B_m| − B_m cos(G_m, U_m)), with G_m the gradient of the head's columns of m
    under the joint loss, and U_m that of the classifier's weight under its own.

    The paper says nothing of gains of different signs, where B_m can be of any size: here (ΣΔ − Δ_m) / ΣΔ is kept
    within [0, 1], and is 1 − 1/M where ΣΔ = 0. The authors' classifiers are transformers with an optimizer of their
    own, and their code compares weights where the paper has gradients, added to the next step's loss; here classifiers
    are linear, and the term is the paper's, of this step. One modality alone has nothing to balance: B = 1.
    """

    def __init__(
        self, encoders: dict[str, nn.Module], head: nn.Linear, classifiers: list[nn.Linear], weight: float
    ) -> None:
        super().__init__(encoders, head)
        self.classifiers, self.weight = nn.ModuleList(classifiers), weight
        self.register_buffer("accuracies", torch.zeros(len(encoders)))
        self.coefficients = torch.ones(len(encoders))

    def unimodal(self, parts: list[Tensor], present: Tensor) -> Tensor:
        return torch.stack([f(part.detach()) for f, part in zip(self.classifiers, parts, strict=True)])

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        parts, present = self.features(data, step.indices)
        labels = self.labels(data, step.indices)
        z, alone = self.joint(parts, present), self.unimodal(parts, present)
        with torch.no_grad():
            right = (alone.argmax(dim=-1) == labels) & present
            accuracies = right.sum(dim=1) / present.sum(dim=1).clamp(min=1)
            self.coefficients = RATE * shares(accuracies - self.accuracies) if len(parts) > 1 else torch.ones(1)
            self.accuracies.copy_(accuracies)
        cosines = []
        for part, alone_m, has in zip(parts, alone.detach(), present, strict=True):
            guide = weight_gradient(alone_m[has], part.detach()[has], labels[has]).flatten()
            cosines.append(F.cosine_similarity(weight_gradient(z, part, labels).flatten(), guide, dim=0))
        direction = (self.coefficients.abs() - self.coefficients * torch.stack(cosines)).mean()
        classifiers = per_modality_loss(alone, present, labels)
        return F.cross_entropy(z, labels) + self.weight * direction + classifiers

    @torch.no_grad()
    def modulate(self, *_: object) -> None:
        """A hook that runs before the optimizer's step."""
        for encoder, coefficient in zip(self.encoders.values(), self.coefficients, strict=True):
            for parameter in encoder.parameters():
                parameter.grad.mul_(coefficient)


def shares(gains: Tensor) -> Tensor:
    """(ΣΔ − Δ_m) / ΣΔ of the gains Δ (M,), within [0, 1]; 1 − 1/M where ΣΔ = 0."""
    total = gains.sum()
    if total == 0:
        return torch.full_like(gains, 1 - 1 / len(gains))
    return ((total - gains) / total).clamp(0, 1)


def weight_gradient(z: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """∂CE/∂W (C, s) of logits z = W h + b (N, C) for features h (N, s): (softmax(z) − y)ᵀ h / N."""
    error = z.softmax(dim=-1) - F.one_hot(labels, z.shape[-1])
    return error.T @ features / max(len(labels), 1)


def build_cggm(data: MultimodalData, s: Setting) -> Built:
    head = head_of(data, s.width * len(data.modalities))
    model = CGGM(s.encoders(data), head, heads_of(data, s.width), weight=s.own)
    optimizer = s.sgd(model)
    optimizer.register_step_pre_hook(model.modulate)
    return model, optimizer
