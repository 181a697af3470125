"""`evaluate` scores a model on a split; `predict` gives its predictions for any samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import calibrated_fusion, entropy_fusion
from .batches import Loader
from .data import SPLITS, MultimodalData
from .metrics import Score, score, score_classes
from .model import FUSIONS, MultimodalModel, SharedHeadModel, Step, mode_of
from .precision import Precision

__all__ = [
    "Prediction",
    "Report",
    "Scoring",
    "check_fusion",
    "check_model_and_data",
    "check_positive",
    "check_workers",
    "device_of",
    "evaluate",
    "modality_scores",
    "predict",
    "standing",
    "start_scoring",
]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Logits for N samples, M modalities, C classes, and the weights λ of the entropy fusion."""

    unimodal: Tensor  # (M, N, C), zero where the sample lacks the modality
    present: Tensor  # bool (M, N)
    fusions: dict[str, Tensor]  # (N, C) each: "mean", "entropy"; "calibrated", "joint" if the model has such
    weights: Tensor  # (M, N): 1 for the only modality of a sample, 0 for a missing one


@dataclasses.dataclass(frozen=True)
class Report:
    """How good a model is on one split.

    modalities: each modality alone, on the samples that have it (one that no sample has is left out); fusions: as in
    `Prediction`, on the samples that have any; fused: the fusion that stands for the model (see
    `evaluate`); loss: the mean cross entropy of that fusion.
    """

    split: str
    modalities: dict[str, Score]
    fusions: dict[str, Score]
    fused: str
    loss: float

    @property
    def accuracy(self) -> float:
        return self.fusions[self.fused].accuracy

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def predict(
    model: MultimodalModel,
    data: MultimodalData,
    indices: Tensor,
    batch_size: int = 512,
    *,
    workers: int = 0,
    amp: str | None = None,
) -> Prediction:
    """Predict the samples `indices`, int64 (N,) with N >= 1, in evaluation mode; the model's mode is restored.

    "mean" is the mean of the logits of the modalities present, "entropy" is `entropy_fusion` of them (eq. 7-9),
    "calibrated" is `calibrated_fusion` with the model's temperatures, if it has them (see `mla_ext.calibrate`).
    It is computed where the model is; `workers` and `amp` are as for `fit`.
    """
    device = device_of(model)
    precision = Precision(amp, device)
    with Loader(data, device, workers) as loader:
        return _predict(model, loader, indices, batch_size, precision)


def evaluate(
    model: MultimodalModel,
    data: MultimodalData,
    split: str = "test",
    batch_size: int = 512,
    *,
    fusion: str = "auto",
    workers: int = 0,
    amp: str | None = None,
) -> Report:
    """Score the model on a split ("train", "validation" or "test") of `data`. Changes nothing about the model.

    fusion: which one stands for the model: "mean", "entropy", "calibrated", or "auto": "joint" if the model has it, the
    one that `mla_ext.calibrate` chose, or else "entropy". ValueError for one that the model does not have.

    It is computed where the model is, and the host waits once for what comes of it; `workers` and `amp` are as for
    `fit`.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    check_model_and_data(model, data)
    check_fusion(model, fusion)
    check_positive("batch_size", batch_size)
    check_workers(workers)
    device = device_of(model)
    precision = Precision(amp, device)
    with Loader(data, device, workers) as loader:
        scoring = start_scoring(model, loader, split, batch_size, precision, fusion)
        return scoring.report(scoring.numbers.cpu())


@dataclasses.dataclass(frozen=True)
class Scoring:
    """A split that is predicted but not scored: `report` needs `numbers` on the host, which the device may yet compute.

    numbers: float64, the predicted classes (exact), a row of samples for each modality and fusion; then the loss of
    each fusion; then, of a model that has one, the index of its `fusion`.
    """

    split: str
    modalities: tuple[str, ...]
    fusions: tuple[str, ...]
    fusion: str  # as for `evaluate`
    present: Tensor  # bool (M, N), on the host
    labels: Tensor  # int64 (N,), on the host
    numbers: Tensor

    def report(self, host: Tensor) -> Report:
        """The scores. `host` is a copy of `numbers`."""
        labels, present = self.labels, self.present
        count = len(present) + len(self.fusions)
        size = count * len(labels)
        classes, losses = host[:size].long().reshape(count, len(labels)), host[size:]
        own = losses[len(self.fusions) :].tolist()
        fused = standing(self.fusions, FUSIONS[int(own[0])] if own else "entropy")
        fused = fused if self.fusion == "auto" else self.fusion
        rows = zip(self.modalities, classes[: len(present)], present, strict=True)
        fusions = zip(self.fusions, classes[len(present) :], strict=True)
        return Report(
            self.split,
            {m: score_classes(row[having], labels[having]) for m, row, having in rows if having.any()},
            {name: score_classes(row, labels) for name, row in fusions},
            fused,
            losses[self.fusions.index(fused)].item(),
        )


def start_scoring(
    model: MultimodalModel,
    loader: Loader,
    split: str,
    batch_size: int,
    precision: Precision,
    fusion: str = "auto",
) -> Scoring:
    """Predict a split. The host does not wait for the device."""
    data = loader.data
    indices = data.indices(split)
    present = torch.stack([data.present(m)[indices] for m in model.modalities])
    indices, present = indices[present.any(dim=0)], present[:, present.any(dim=0)]
    if len(indices) == 0:
        raise ValueError(f"split: expected one with samples, got {split!r}, which has none")
    prediction = _predict(model, loader, indices, batch_size, precision)
    labels = data.labels[indices]
    there = labels.to(prediction.weights.device, non_blocking=True)
    logits = [*prediction.unimodal, *prediction.fusions.values()]
    losses = [F.cross_entropy(values, there).double().reshape(1) for values in prediction.fusions.values()]
    chosen = [model.fusion_index.double().reshape(1)] if isinstance(model, SharedHeadModel) else []
    numbers = torch.cat([*(values.argmax(dim=-1).double() for values in logits), *losses, *chosen])
    return Scoring(split, tuple(model.modalities), tuple(prediction.fusions), fusion, present, labels, numbers)


@torch.no_grad()
def _predict(
    model: MultimodalModel, loader: Loader, indices: Tensor, batch_size: int, precision: Precision
) -> Prediction:
    steps = [Step(model.modalities, batch) for batch in indices.split(batch_size)]
    with mode_of(model, training=False), precision.autocast():
        batches = [model.logits(data, step.indices) for data, step in zip(loader.read(steps), steps, strict=True)]
    unimodal = torch.cat([b.unimodal for b in batches], dim=1)
    present = torch.cat([b.present for b in batches], dim=1)
    entropy, weights = entropy_fusion(unimodal, present)
    fusions = {"mean": calibrated_fusion(unimodal, present)[0], "entropy": entropy}
    if isinstance(model, SharedHeadModel):
        fusions["calibrated"] = calibrated_fusion(unimodal, present, temperatures=model.temperatures)[0]
    joint = [b.joint for b in batches if b.joint is not None]
    if joint:
        fusions["joint"] = torch.cat(joint)
    return Prediction(unimodal, present, fusions, weights)


def modality_scores(modalities: Sequence[str], prediction: Prediction, labels: Tensor) -> dict[str, Score]:
    """Each modality alone, on the samples that have it; one that no sample has is left out. labels: int64 (N,)."""
    rows = zip(modalities, prediction.unimodal, prediction.present, strict=True)
    return {m: score(logits[present], labels[present]) for m, logits, present in rows if present.any()}


def standing(fusions: Iterable[str], chosen: str) -> str:
    """The one of a prediction's fusions that stands for a model which chose this one: "joint" if there is one."""
    return "joint" if "joint" in fusions else chosen


def check_fusion(model: MultimodalModel, fusion: str) -> None:
    expected = ("auto", *(FUSIONS if isinstance(model, SharedHeadModel) else FUSIONS[:2]))
    if fusion not in expected:
        raise ValueError(f"fusion: expected one of {expected} for a {type(model).__name__}, got {fusion!r}")


def check_model_and_data(model: MultimodalModel, data: MultimodalData) -> None:
    if not isinstance(model, MultimodalModel):
        raise TypeError(f"model: expected a MultimodalModel, such as SharedHeadModel, got {type(model).__name__}")
    if not isinstance(data, MultimodalData):
        raise TypeError(f"data: expected MultimodalData, got {type(data).__name__}")
    model.check(data)


def check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_workers(workers: int) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise TypeError(f"workers: expected an integer, got {workers!r}")
    if workers < 0:
        raise ValueError(f"workers: expected at least 0, got {workers}")


def device_of(model: MultimodalModel) -> torch.device:
    return next(model.parameters()).device
