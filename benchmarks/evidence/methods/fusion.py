"""Joint training: the fusions of the paper's Table 1, and what is built of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_ext import ConcatModel, MultimodalData
from mla_ext.multimodal.late import LateFusionModel, per_modality_loss
from mla_ext.multimodal.model import JointModel, Step

from .common import Build, Built, Setting, head_of, heads_of


class Sum(LateFusionModel):
    """z = Σ_m (W_m h_m + b_m), over the modalities that a sample has, learnt by its own loss."""

    def joint(self, parts: list[Tensor], present: Tensor) -> Tensor:
        return self.summed(parts, present)

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        return JointModel.loss(self, data, step)


class ProbedModel(JointModel):
    """Where no part of the head belongs to one modality: a linear probe on each encoder's features says what it knows.

    The probes learn beside the model, on features that are detached: nothing else feels them.
    """

    def __init__(self, encoders: dict[str, nn.Module], width: int, classes: int) -> None:
        super().__init__(encoders)
        self.out = nn.Linear(width, classes)
        self.probes = nn.ModuleList(nn.Linear(width, classes) for _ in encoders)

    def unimodal(self, parts: list[Tensor], present: Tensor) -> Tensor:
        return torch.stack([probe(part.detach()) for probe, part in zip(self.probes, parts, strict=True)])

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        parts, present = self.features(data, step.indices)
        labels = self.labels(data, step.indices)
        probes = per_modality_loss(self.unimodal(parts, present), present, labels)
        return F.cross_entropy(self.joint(parts, present), labels) + probes


class FiLM(ProbedModel):
    """z = W_o(γ(a) ⊙ v + β(a)) + b, with a the first modality and v the last; further ones modulate v in turn."""

    def __init__(self, encoders: dict[str, nn.Module], width: int, classes: int) -> None:
        super().__init__(encoders, width, classes)
        self.films = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(len(encoders) - 1))

    def joint(self, parts: list[Tensor], present: Tensor) -> Tensor:
        modulated = parts[-1]
        for film, part in zip(self.films, parts[:-1], strict=True):
            gamma, beta = film(part).chunk(2, dim=1)
            modulated = gamma * modulated + beta
        return self.out(modulated)


class BiGated(ProbedModel):
    """z = W_o(σ(W_x a) ⊙ W_y v) + b, with v the last modality; of more than two, every other one is a gate."""

    def __init__(self, encoders: dict[str, nn.Module], width: int, classes: int) -> None:
        super().__init__(encoders, width, classes)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in encoders)

    def joint(self, parts: list[Tensor], present: Tensor) -> Tensor:
        *gates, gated = (layer(part) for layer, part in zip(self.layers, parts, strict=True))
        for gate in gates:
            gated = gate.sigmoid() * gated
        return self.out(gated)


def build_concat(data: MultimodalData, s: Setting) -> Built:
    model = ConcatModel(s.encoders(data), head_of(data, s.width * len(data.modalities)))
    return model, s.sgd(model)


def build_heads(kind: type[LateFusionModel], shared: bool = False) -> Build:
    """A head for each modality, or one for all."""

    def build(data: MultimodalData, s: Setting) -> Built:
        model = kind(s.encoders(data), heads_of(data, s.width, shared))
        return model, s.sgd(model)

    return build


def build_probed(kind: type[FiLM | BiGated]) -> Build:
    def build(data: MultimodalData, s: Setting) -> Built:
        model = kind(s.encoders(data), s.width, len(data.classes))
        return model, s.sgd(model)

    return build
