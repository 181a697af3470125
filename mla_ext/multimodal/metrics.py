"""Accuracy and macro F1 of predicted classes, and how far probabilities agree with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BINS", "Reliability", "Score", "macro_f1", "reliability", "score", "score_classes"]

BINS = 15


@dataclass(frozen=True)
class Score:
    """Fractions in [0, 1], and the number of samples they are of."""

    accuracy: float
    macro_f1: float
    samples: int


def score(logits: Tensor, labels: Tensor) -> Score:
    """logits (N, C), labels int64 (N,) on the same device, N >= 1. A tie goes to the first class."""
    return score_classes(logits.argmax(dim=-1), labels)


def score_classes(predicted: Tensor, labels: Tensor) -> Score:
    """predicted, labels: int64 (N,) on the same device, N >= 1."""
    accuracy = (predicted == labels).double().mean().item()
    return Score(accuracy, macro_f1(predicted, labels), len(labels))


@dataclass(frozen=True)
class Reliability:
    """Of BINS equal bins of the confidence: how many samples, their mean accuracy and mean confidence (0 if none).

    ece: the expected calibration error, Σ_b samples_b / N · |accuracy_b − confidence_b|.
    """

    ece: float
    samples: tuple[int, ...]
    accuracy: tuple[float, ...]
    confidence: tuple[float, ...]


def reliability(logits: Tensor, labels: Tensor) -> Reliability:
    """logits (N, C), labels int64 (N,) on the same device, N >= 1. The confidence is the largest probability."""
    confidence, predicted = logits.double().softmax(dim=-1).max(dim=-1)
    bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)  # bin b: (b / BINS, (b + 1) / BINS]
    counts = bins.bincount(minlength=BINS)
    right, total = (
        values.new_zeros(BINS).index_add_(0, bins, values) for values in ((predicted == labels).double(), confidence)
    )
    ece = ((right - total).abs().sum() / len(labels)).item()
    means = [(sums / counts.clamp(min=1)).tolist() for sums in (right, total)]
    return Reliability(ece, tuple(counts.tolist()), tuple(means[0]), tuple(means[1]))


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """The unweighted mean over classes of F1 = 2 TP / (2 TP + FP + FN); int64 (N,), (N,), N >= 1.

    Classes that occur neither among the labels nor among the predictions are left out.
    """
    classes = int(torch.maximum(predicted, labels).max()) + 1
    in_labels = labels.bincount(minlength=classes)
    in_predicted = predicted.bincount(minlength=classes)
    right = labels[predicted == labels].bincount(minlength=classes)
    seen = in_labels + in_predicted > 0
    return (2 * right[seen].double() / (in_labels + in_predicted)[seen]).mean().item()
