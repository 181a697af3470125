"""The settings that the command line and the demo train with, and what they make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from ..optimizer import ProjectedSGD
from .data import MultimodalData
from .encoders import WIDTHS, build_encoder, takes_tokens
from .late import LateFusionModel
from .model import ConcatModel, MultimodalModel, SharedHeadModel

__all__ = ["METHODS", "SCHEDULES", "Settings", "build", "build_scheduler", "standardized"]

METHODS = {
    "mla": "alternating steps, the head's gradient projected",
    "alternating": "alternating steps, plain SGD",
    "concat": "joint training on concatenated features, plain SGD",
    "late": "a model for each modality, plain SGD; the mean of their logits",
}
SCHEDULES = ("none", "cosine", "step")


@dataclass(frozen=True)
class Settings:
    """What decides the result of a training run, beside its data.

    The defaults do well on all three of: images and spectrograms, vectors, the demo data.

    encoder: of images and spectrograms, one of `encoders.ENCODERS` or a name of `library`; encoders: of single
    modalities, where it is another one; width: features that every encoder gives. schedule: of the learning rate, by
    epoch: "cosine" down to 0 in the last, or "step", times `gamma` every `step_size`. alpha_scale, absorb, forget,
    normalize, rank: as ProjectedSGD's, like alpha. The others are named as in SGD and `fit`.
    """

    method: str = "mla"
    encoder: str = "small"
    encoders: Mapping[str, str] = field(default_factory=dict)
    width: int = WIDTHS["small"]
    missing: float = 0.0

    lr: float = 0.01
    momentum: float = 0.9
    dampening: float = 0.0
    weight_decay: float = 1e-4
    nesterov: bool = False
    alpha: float = 0.1
    alpha_scale: str | None = "features"
    absorb: str = "after"
    forget: float = 0.0
    normalize: bool = False
    rank: int | str | None = "auto"

    epochs: int = 20
    batch_size: int = 64
    seed: int = 0
    order: str = "given"
    schedule: str = "none"
    step_size: int = 70
    gamma: float = 0.1
    label_smoothing: float = 0.0
    clip_grad_norm: float | None = None
    reset_projection: bool = False
    amp: str | None = None

    def fixed(self) -> dict[str, Any]:
        """What a run must be resumed with: all but the number of epochs, unless the schedule depends on it."""
        values = asdict(self)
        if self.schedule != "cosine":
            del values["epochs"]
        return values

    @classmethod
    def of_run(cls, saved: Mapping[str, Any]) -> Settings:
        """Those that a checkpoint holds; what its version did not know is as it was then.

        ValueError for a run that was not made with Settings.
        """
        missing = _FIRST - saved.keys()
        if missing:
            raise ValueError(f"expected a run of `mla-ext train`, got one without {', '.join(sorted(missing))}")
        saved = {"alpha_scale": None} | dict(saved)
        return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})


# What the first version saved.
_FIRST = {"method", "batch_size", "seed", "lr", "momentum", "weight_decay", "alpha", "encoder", "width", "missing"}


def build(data: MultimodalData, settings: Settings) -> tuple[MultimodalModel, Optimizer]:
    """The untrained model, its weights drawn with `settings.seed`, and its optimizer.

    The global random generator stays as it was. ValueError for an unknown method or encoder, settings that another
    method needs, or a modality of a shape that encoders do not take; ImportError where an encoder's library is missing.
    """
    if settings.method not in METHODS:
        raise ValueError(f"method: expected one of {tuple(METHODS)}, got {settings.method!r}")
    if settings.reset_projection and settings.method != "mla":
        raise ValueError(f"reset_projection: expected method 'mla', which has a projection, got {settings.method!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = _model(data, settings)
    plain: dict[str, Any] = {
        name: getattr(settings, name) for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    }
    if settings.method != "mla":
        return model, SGD(model.parameters(), **plain)
    projection: dict[str, Any] = {
        name: getattr(settings, name) for name in ("alpha", "alpha_scale", "absorb", "forget", "normalize", "rank")
    }
    optimizer = ProjectedSGD(model.parameters(), **plain, **projection)
    head = model.head
    assert isinstance(head, nn.Linear)
    optimizer.attach(head)
    return model, optimizer


def build_scheduler(optimizer: Optimizer, settings: Settings) -> LRScheduler | None:
    """The schedule of the learning rate, stepped after every epoch. ValueError for an unknown one."""
    if settings.schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {SCHEDULES}, got {settings.schedule!r}")
    if settings.schedule == "cosine":
        return CosineAnnealingLR(optimizer, settings.epochs)
    return StepLR(optimizer, settings.step_size, settings.gamma) if settings.schedule == "step" else None


def standardized(data: MultimodalData, settings: Settings) -> MultimodalData:
    """The data as the encoders want them: token ids as they are, all else standardised over the training split."""
    tokens = {m for m in data.modalities if takes_tokens(_encoder(settings, m), data.shape(m))}
    for modality in tokens:
        dtype = data.read(modality, data.present(modality).nonzero().flatten()[:1]).dtype
        if dtype.is_floating_point:
            name = _encoder(settings, modality)
            raise ValueError(f"encoder: expected token ids, integers, in x_{modality} for {name!r}, got {dtype}")
    return data.standardized([m for m in data.modalities if m not in tokens])


def _encoder(settings: Settings, modality: str) -> str:
    return settings.encoders.get(modality, settings.encoder)


def _model(data: MultimodalData, settings: Settings) -> MultimodalModel:
    unknown = set(settings.encoders) - set(data.modalities)
    if unknown:
        raise ValueError(f"encoder: expected modalities of {data.modalities}, got {', '.join(sorted(unknown))}")
    modalities, width, classes = data.modalities, settings.width, len(data.classes)
    encoders = {m: build_encoder(_encoder(settings, m), data.shape(m), width) for m in modalities}
    if settings.method == "late":
        return LateFusionModel(encoders, [nn.Linear(width, classes) for _ in modalities])
    if settings.method == "concat":
        return ConcatModel(encoders, nn.Linear(width * len(modalities), classes))
    return SharedHeadModel(encoders, nn.Linear(width, classes))
