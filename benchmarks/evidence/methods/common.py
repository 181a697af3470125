"""What every method is built with: the run's settings, encoders, heads, plain SGD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, Optimizer

from mla_ext import MultimodalData
from mla_ext.multimodal.encoders import build_encoder
from mla_ext.multimodal.model import MultimodalModel

MOMENTUM = 0.9
ALPHA = 0.1  # of the rows that do not choose it, as in the package
BATCH_SIZE = 64


@dataclass(frozen=True)
class Setting:
    """What one training run is told. `own` is the value of the method's own hyperparameter, if it has one."""

    lr: float
    weight_decay: float
    own: float | None
    seed: int
    epochs: int
    width: int

    def encoders(self, data: MultimodalData) -> dict[str, nn.Module]:
        return {m: build_encoder("small", data.features[m].shape[1:], self.width) for m in data.modalities}

    def sgd(self, model: nn.Module) -> SGD:
        return SGD(model.parameters(), lr=self.lr, momentum=MOMENTUM, weight_decay=self.weight_decay)


Built = tuple[MultimodalModel, Optimizer]
Build = Callable[[MultimodalData, Setting], Built]


def head_of(data: MultimodalData, width: int) -> nn.Linear:
    return nn.Linear(width, len(data.classes))


def heads_of(data: MultimodalData, width: int, shared: bool = False) -> list[nn.Linear]:
    if shared:
        return [head_of(data, width)] * len(data.modalities)
    return [head_of(data, width) for _ in data.modalities]
