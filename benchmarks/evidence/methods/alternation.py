"""Alternation through one shared head: alone, with MLA's projection, and as the released code has it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import SGD

from mla_ext import MultimodalData, ProjectedSGD, SharedHeadModel
from mla_ext.multimodal.model import Logits

from ...released import project_as_released
from .common import ALPHA, BATCH_SIZE, MOMENTUM, Built, Setting, head_of

ROWS = 64  # of P in the rank form


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


def build_mla(data: MultimodalData, s: Setting, head_decay: float | None = None, **projection: object) -> Built:
    """P is dense and alpha fixed, as the paper's, unless `projection` says otherwise."""
    model = SharedHeadModel(s.encoders(data), head_of(data, s.width))
    head = {"params": model.head.parameters(), "weight_decay": s.weight_decay if head_decay is None else head_decay}
    fixed = {"alpha": s.own, "alpha_scale": None, "rank": None}
    options = fixed | {"weight_decay": s.weight_decay} | projection
    groups = [{"params": model.encoders.parameters()}, head]
    optimizer = ProjectedSGD(groups, lr=s.lr, momentum=MOMENTUM, **options)
    optimizer.attach(model.head)
    return model, optimizer


def build_mla_rank(data: MultimodalData, s: Setting) -> Built:
    return build_mla(data, s, rank=ROWS)


def build_mla_before(data: MultimodalData, s: Setting) -> Built:
    return build_mla(data, s, absorb="before")


def build_mla_forget(data: MultimodalData, s: Setting) -> Built:
    return build_mla(data, s, alpha=ALPHA, forget=s.own)


def build_mla_undecayed(data: MultimodalData, s: Setting) -> Built:
    """Weight decay comes after the projection: it shrinks what is protected, too, and no G P can restore that."""
    return build_mla(data, s, head_decay=0.0)


def build_released(data: MultimodalData, s: Setting) -> Built:
    model = SharedHeadModel(s.encoders(data), head_of(data, s.width))
    optimizer = s.sgd(model)
    steps_per_epoch = len(model.steps(data, BATCH_SIZE, "given", torch.Generator()))
    project_as_released(optimizer, model.head, steps_per_epoch)
    return model, optimizer
