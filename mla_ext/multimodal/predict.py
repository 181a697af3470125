"""What a model says about each sample of a split, as a table: written as CSV or `.npz`, and read again from CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checkpoint
from .data import SPLITS, MultimodalData
from .evaluate import check_fusion, predict, standing
from .model import MultimodalModel, SharedHeadModel

__all__ = ["Predictions", "predict_split", "read_classes", "write"]


@dataclass(frozen=True)
class Predictions:
    """N samples, M modalities. Where a sample lacks a modality, its class is -1 and the numbers are 0."""

    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    sample: Tensor  # int64 (N,), its number in the data
    label: Tensor  # int64 (N,)
    fused_class: Tensor  # int64 (N,), of the fusion that stands for the model
    fused_probability: Tensor  # (N,), of that class
    modality_class: Tensor  # int64 (M, N)
    modality_probability: Tensor  # (M, N)
    entropy: Tensor  # (M, N), of the modality's prediction
    weight: Tensor  # (M, N), λ of the entropy fusion


def predict_split(
    model: MultimodalModel,
    data: MultimodalData,
    split: str,
    *,
    fusion: str = "auto",
    workers: int = 0,
    amp: str | None = None,
) -> Predictions:
    """The predictions for a split, or for "all" samples; `fusion` is as for `evaluate`, `workers` and `amp` for `fit`.

    ValueError for another split, or one without samples.
    """
    if split not in (*SPLITS, "all"):
        raise ValueError(f"split: expected one of {(*SPLITS, 'all')}, got {split!r}")
    check_fusion(model, fusion)
    indices = torch.arange(len(data)) if split == "all" else data.indices(split)
    if len(indices) == 0:
        raise ValueError(f"split: expected one with samples, got {split!r}, which has none")
    found = predict(model, data, indices, workers=workers, amp=amp)
    unimodal, present = found.unimodal.double().softmax(dim=-1).cpu(), found.present.cpu()
    if fusion == "auto":
        fusion = standing(found.fusions, model.fusion if isinstance(model, SharedHeadModel) else "entropy")
    fused = found.fusions[fusion].double().softmax(dim=-1).max(dim=-1)
    alone = unimodal.max(dim=-1)
    entropy = torch.special.entr(unimodal).sum(dim=-1)
    return Predictions(
        model.modalities,
        data.classes,
        indices,
        data.labels[indices],
        fused.indices.cpu(),
        fused.values.cpu(),
        alone.indices.masked_fill(~present, -1),
        alone.values.masked_fill(~present, 0),
        entropy.masked_fill(~present, 0),
        found.weights.double().cpu(),
    )


def write(predictions: Predictions, path: Path) -> None:
    """To a `.csv` file, one line for each sample, or a `.npz` one with an array for each field; whole or not at all.

    In CSV classes have their names, and what a missing modality would say is empty. ValueError for another suffix.
    """
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {name: _array(value) for name, value in vars(predictions).items()}
        checkpoint.write_atomic(path, lambda file: np.savez(file, **arrays))
    elif path.suffix == ".csv":
        checkpoint.write_text(path, _csv(predictions))
    else:
        raise ValueError(f"out: expected a file that ends in .csv or .npz, got {path}")


def read_classes(path: Path) -> tuple[list[str], list[str]]:
    """The true and the predicted class of each sample in a CSV file of `write`. ValueError for another file."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"label", "predicted"} <= rows[0].keys():
        raise ValueError(f"{path}: expected a file of predictions, with columns label and predicted")
    return [row["label"] for row in rows], [row["predicted"] for row in rows]


def _array(value: Tensor | tuple[str, ...]) -> np.ndarray:
    return value.numpy() if isinstance(value, Tensor) else np.array(value)


def _csv(p: Predictions) -> str:
    names = ("class", "probability", "weight", "entropy")
    header = ["sample", "label", "predicted", "probability"]
    header += [f"{modality} {name}" for modality in p.modalities for name in names]
    columns = list(
        zip(*(t.tolist() for t in (p.modality_class, p.modality_probability, p.weight, p.entropy)), strict=True)
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    fused = zip(*(t.tolist() for t in (p.sample, p.label, p.fused_class, p.fused_probability)), strict=True)
    for i, (sample, label, predicted, probability) in enumerate(fused):
        row = [sample, p.classes[label], p.classes[predicted], f"{probability:.6g}"]
        for classes, *numbers in columns:
            if classes[i] < 0:
                row += [""] * len(names)
            else:
                row += [p.classes[classes[i]], *(f"{values[i]:.6g}" for values in numbers)]
        writer.writerow(row)
    return out.getvalue()
