"""DGL: the encoders feel the losses of their own modality only, and the fusion the joint loss only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mla_ext import ConcatModel, MultimodalData
from mla_ext.multimodal.late import per_modality_loss
from mla_ext.multimodal.model import Step

from .common import Built, Setting, head_of


class DGL(ConcatModel):
    """Disentangled gradient learning (Wei et al., ICCV 2025), on concatenation.

    Loss: CE(z) + α Σ_m CE(z_m). The first is cut off from the encoders and the second from the head. z_m is what the
    modality says through its columns of the head. The paper gives no rule for α; the authors' code takes 4.
    """

    def __init__(self, encoders: dict[str, nn.Module], head: nn.Linear, alpha: float) -> None:
        super().__init__(encoders, head)
        self.alpha = alpha

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        parts, present = self.features(data, step.indices)
        labels = self.labels(data, step.indices)
        self.head.requires_grad_(False)
        unimodal = self.unimodal(parts, present)
        self.head.requires_grad_(True)
        joint = self.joint([part.detach() for part in parts], present)
        return F.cross_entropy(joint, labels) + self.alpha * per_modality_loss(unimodal, present, labels)


def build_dgl(data: MultimodalData, s: Setting) -> Built:
    model = DGL(s.encoders(data), head_of(data, s.width * len(data.modalities)), alpha=s.own)
    return model, s.sgd(model)
