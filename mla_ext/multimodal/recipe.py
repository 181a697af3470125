"""The settings that the command line and the demo train with, and what they make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from ..optimizer import ProjectedSGD
from .data import MultimodalData
from .encoders import WIDTHS, build_encoder
from .model import ConcatModel, MultimodalModel, SharedHeadModel

__all__ = ["METHODS", "Settings", "build"]

METHODS = {
    "mla": "alternating steps, the head's gradient projected",
    "alternating": "alternating steps, plain SGD",
    "concat": "joint training on concatenated features, plain SGD",
}


@dataclass(frozen=True)
class Settings:
    """Of one training run. The defaults do well on all three of: images and spectrograms, vectors, the demo data.

    encoder: of images and spectrograms, one of `encoders.ENCODERS`; width: features that every encoder gives.
    """

    method: str = "mla"
    epochs: int = 20
    batch_size: int = 64
    seed: int = 0
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    alpha: float = 0.1
    encoder: str = "small"
    width: int = WIDTHS["small"]
    missing: float = 0.0


def build(data: MultimodalData, settings: Settings) -> tuple[MultimodalModel, Optimizer]:
    """The untrained model, its weights drawn with `settings.seed`, and its optimizer.

    The global random generator stays as it was. ValueError for an unknown method or encoder, or a modality of a shape
    that encoders do not take.
    """
    if settings.method not in METHODS:
        raise ValueError(f"method: expected one of {tuple(METHODS)}, got {settings.method!r}")
    joint = settings.method == "concat"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoders = {m: build_encoder(settings.encoder, data.shape(m), settings.width) for m in data.modalities}
        head = nn.Linear(settings.width * (len(encoders) if joint else 1), len(data.classes))
    model = ConcatModel(encoders, head) if joint else SharedHeadModel(encoders, head)

    plain: dict[str, Any] = {"lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
    if settings.method != "mla":
        return model, SGD(model.parameters(), **plain)
    optimizer = ProjectedSGD(model.parameters(), **plain, alpha=settings.alpha)
    optimizer.attach(head)
    return model, optimizer
