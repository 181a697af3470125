"""ReconBoost: each modality in turn learns what the others do not know yet, as in boosting."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_ext import MultimodalData, SharedHeadModel
from mla_ext.multimodal.model import Logits, Step, shuffled_batches

from .common import Built, Setting, head_of


class ReconBoost(SharedHeadModel):
    """Boosting over modalities (Hua et al., ICML 2024) with one shared head; the prediction is the sum of the logits.

    A modality's turn: the mean of (1 − λ p) CE(z_m), with p the probability that the others together give to the right
    class; only this encoder and the head feel it. After the turns comes the global rectification, CE of the sum, which
    all feel. λ is the ratio of the two weights in the authors' code, 0.2.

    The authors take four epochs for a turn and four of rectification after each. Here an epoch is one pass for each
    modality, whole turn after whole turn, and one pass of rectification, so that it has twice the steps on an encoder
    that alternation has. Their consolidation term, a distance to the modality before, is left out: their code detaches
    both sides of it, so it has no gradient. Their factor before the sum is 1.
    """

    def __init__(self, encoders: dict[str, nn.Module], head: nn.Linear, weight: float) -> None:
        super().__init__(encoders, head)
        self.weight = weight

    def steps(self, data: MultimodalData, batch_size: int, order: str, generator: torch.Generator) -> list[Step]:
        mixed = super().steps(data, batch_size, order, generator)
        turns = dict.fromkeys(step.modalities for step in mixed)
        alone = [step for turn in turns for step in mixed if step.modalities == turn]
        batches = shuffled_batches(data.indices("train"), batch_size, generator)
        return alone + [Step(self.modalities, batch) for batch in batches]

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        labels = self.labels(data, step.indices)
        if step.modalities == self.modalities:
            return F.cross_entropy(self.logits(data, step.indices).joint, labels)
        (modality,) = step.modalities
        with torch.no_grad():
            unimodal, present, joint = self.logits(data, step.indices)
            i = self.modalities.index(modality)
            p = (joint - unimodal[i]).softmax(dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)
            p = torch.where(present.sum(dim=0) > 1, p, 0.0)  # where there are no others, they know nothing
        own = F.cross_entropy(self(modality, self.inputs(data, modality, step.indices)), labels, reduction="none")
        return ((1 - self.weight * p) * own).mean()

    def logits(self, data: MultimodalData, indices: Tensor) -> Logits:
        logits = super().logits(data, indices)
        return logits._replace(joint=logits.unimodal.sum(dim=0))


def build_reconboost(data: MultimodalData, s: Setting) -> Built:
    model = ReconBoost(s.encoders(data), head_of(data, s.width), weight=s.own)
    return model, s.sgd(model)
