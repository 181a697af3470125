"""Alternation through one shared head: alone, with MLA's projection, and as the released code has it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from mla_ext import MultimodalData, ProjectedAdamW, ProjectedSGD, SharedHeadModel
from mla_ext.multimodal.model import Logits

from ...released import project_as_released
from .common import ALPHA, BATCH_SIZE, MOMENTUM, Built, Setting, head_of

ROWS = 16  # of P in the rank form, a quarter of the features
ADAM = 0.1  # AdamW's learning rate, times that of the rows with SGD


class MeanFused(SharedHeadModel):
    """Alternation whose prediction is the plain mean of the logits, also where the epoch is chosen."""

    def logits(self, data: MultimodalData, indices: Tensor) -> Logits:
        logits = super().logits(data, indices)
        return logits._replace(joint=logits.unimodal.sum(dim=0) / logits.present.sum(dim=0).unsqueeze(-1))


def build_alternating(data: MultimodalData, s: Setting) -> Built:
    model = SharedHeadModel(s.encoders(data), head_of(data, s.width))
    return model, s.sgd(model)


def build_slow_head(data: MultimodalData, s: Setting) -> Built:
    """No projection; the head's learning rate is `own` times that of the encoders."""
    model = SharedHeadModel(s.encoders(data), head_of(data, s.width))
    groups = [{"params": model.encoders.parameters()}, {"params": model.head.parameters(), "lr": s.own * s.lr}]
    return model, SGD(groups, lr=s.lr, momentum=MOMENTUM, weight_decay=s.weight_decay)


def build_adamw(data: MultimodalData, s: Setting) -> Built:
    model = SharedHeadModel(s.encoders(data), head_of(data, s.width))
    return model, AdamW(model.parameters(), lr=ADAM * s.lr, weight_decay=s.weight_decay)


def build_mla(data: MultimodalData, s: Setting, **projection: object) -> Built:
    """P is dense and alpha in units of the features' scale, as in the package, unless `projection` says otherwise."""
    model = SharedHeadModel(s.encoders(data), head_of(data, s.width))
    options = {"alpha": s.own, "alpha_scale": "features", "rank": None} | projection
    optimizer = ProjectedSGD(
        model.parameters(), lr=s.lr, momentum=MOMENTUM, weight_decay=s.weight_decay, heads=[model.head], **options
    )
    return model, optimizer


def build_mla_fixed(data: MultimodalData, s: Setting) -> Built:
    """The alpha of the paper, whatever the scale of the features."""
    return build_mla(data, s, alpha_scale=None)


def build_mla_update(data: MultimodalData, s: Setting) -> Built:
    """Momentum and weight decay are projected, too."""
    return build_mla(data, s, project="update")


def build_mla_adamw(data: MultimodalData, s: Setting) -> Built:
    model = SharedHeadModel(s.encoders(data), head_of(data, s.width))
    options = {"lr": ADAM * s.lr, "weight_decay": s.weight_decay, "alpha": s.own}
    return model, ProjectedAdamW(model.parameters(), rank=None, heads=[model.head], **options)


def build_mla_rank(data: MultimodalData, s: Setting) -> Built:
    return build_mla(data, s, rank=ROWS)


def build_mla_before(data: MultimodalData, s: Setting) -> Built:
    return build_mla(data, s, absorb="before")


def build_mla_forget(data: MultimodalData, s: Setting) -> Built:
    return build_mla(data, s, alpha=ALPHA, forget=s.own)


def build_released(data: MultimodalData, s: Setting) -> Built:
    model = SharedHeadModel(s.encoders(data), head_of(data, s.width))
    optimizer = s.sgd(model)
    steps_per_epoch = len(model.steps(data, BATCH_SIZE, "given", torch.Generator()))
    project_as_released(optimizer, model.head, steps_per_epoch)
    return model, optimizer
