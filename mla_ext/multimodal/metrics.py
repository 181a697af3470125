"""Accuracy and macro F1 of predicted classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Score", "macro_f1", "score", "score_classes"]


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
