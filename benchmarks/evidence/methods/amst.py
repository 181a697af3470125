"""AMST: alternation in which the stronger modalities skip steps."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from mla_ext import MultimodalData
from mla_ext.multimodal.model import Step

from .alternation import MeanFused
from .common import Built, Setting, head_of

KEEP = 0.9  # of the running mean of the losses


class AMST(MeanFused):
    """Alternating multimodal skip training (Silva et al., ECML 2025), its alternating form: one shared head.

    All modalities but the weakest take every `factor`-th of their steps. Prediction: the mean of the logits.

    The authors set a factor for each modality and data set by hand, after how fast it converges alone, and skip whole
    epochs. Here the weakest is the modality with the highest running mean of the training loss when the epoch begins,
    one factor serves the others, and batches are skipped, as often; the first that is taken is drawn anew each epoch.
    Before every modality has stepped, nothing is skipped.
    """

    def __init__(self, encoders: dict[str, nn.Module], head: nn.Linear, factor: int) -> None:
        super().__init__(encoders, head)
        self.factor = factor
        self.register_buffer("losses", torch.full((len(encoders),), torch.nan))

    def skipping(self) -> set[str]:
        """The modalities that skip steps."""
        if self.losses.isnan().any():
            return set()
        return set(self.modalities) - {self.modalities[int(self.losses.argmax())]}

    def steps(self, data: MultimodalData, batch_size: int, order: str, generator: torch.Generator) -> list[Step]:
        steps, skipping, kept = super().steps(data, batch_size, order, generator), self.skipping(), []
        first = int(torch.randint(self.factor, (), generator=generator, device=generator.device))
        turn = Counter(dict.fromkeys(self.modalities, -first))
        for step in steps:
            (modality,) = step.modalities
            if modality not in skipping or turn[modality] % self.factor == 0:
                kept.append(step)
            turn[modality] += 1
        return kept

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        loss = super().loss(data, step)
        i, value = self.modalities.index(*step.modalities), loss.detach()
        self.losses[i] = value if self.losses[i].isnan() else KEEP * self.losses[i] + (1 - KEEP) * value
        return loss


def build_amst(data: MultimodalData, s: Setting) -> Built:
    model = AMST(s.encoders(data), head_of(data, s.width), factor=max(1, int(s.own)))
    return model, s.sgd(model)
