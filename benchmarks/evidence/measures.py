"""What is measured of a trained model beside its accuracy: the modality gap, and the worth of its entropies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mla_ext import MultimodalData
from mla_ext.multimodal.evaluate import Prediction
from mla_ext.multimodal.model import MultimodalModel

BINS = 10


def unit_features(model: MultimodalModel, data: MultimodalData, split: str) -> dict[str, Tensor]:
    """Each modality's head inputs on a split, scaled to length 1: {modality: (n, s)}."""
    model.eval()
    with torch.no_grad():
        return {
            m: torch.nn.functional.normalize(model.encoders[m](model.inputs(data, m, indices)), dim=1)
            for m in model.modalities
            if len(indices := data.indices(split, m))
        }


def modality_gap(features: dict[str, Tensor], seed: int) -> dict[str, float]:
    """distance: of the centroids of two modalities' unit features, the mean over pairs (Liang et al. 2022);
    separability: how often a linear classifier tells on held-out halves which modality a feature is of."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    centroids = torch.stack([f.mean(dim=0) for f in features.values()])
    x = torch.cat(list(features.values())).double().numpy()
    modality = np.concatenate([np.full(len(f), i) for i, f in enumerate(features.values())])
    order = np.random.default_rng(seed).permutation(len(x))
    separability = cross_val_score(LogisticRegression(max_iter=500), x[order], modality[order], cv=2).mean()
    return {"distance": torch.pdist(centroids).mean().item(), "separability": float(separability)}


def entropy(logits: Tensor) -> Tensor:
    """−Σ p log p over the classes, divided by log C: from 0, certain, to 1."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1) / np.log(logits.shape[-1])


def accuracy_by_entropy(logits: Tensor, labels: Tensor) -> dict[str, list[int]]:
    """Of (N, C) logits: in each of `BINS` equal bins of the entropy, how many samples and how many of them right."""
    right = logits.argmax(dim=-1) == labels
    index = (entropy(logits) * BINS).long().clamp(max=BINS - 1)
    return {
        "samples": torch.bincount(index, minlength=BINS).tolist(),
        "right": torch.bincount(index[right], minlength=BINS).tolist(),
    }


def right_pick(unimodal: Tensor, present: Tensor, labels: Tensor) -> dict[str, int]:
    """The assumption of the fusion: of two modalities of which exactly one is right, that one has the lower entropy."""
    entropies = entropy(unimodal)
    right = (unimodal.argmax(dim=-1) == labels) & present
    cases = picks = 0
    for a in range(len(unimodal)):
        for b in range(a + 1, len(unimodal)):
            differ = (right[a] != right[b]) & present[a] & present[b]
            cases += int(differ.sum())
            picks += int(((entropies[a] < entropies[b]) == right[a])[differ].sum())
    return {"cases": cases, "picks": picks}


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The expected calibration error: the mean of |accuracy − confidence| over bins of confidence, by their samples."""
    confidence, predicted = logits.softmax(dim=-1).max(dim=-1)
    right = (predicted == labels).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double).index_add_(0, index, right - confidence.double())
    return (gaps.abs().sum() / len(labels)).item()


def trust(prediction: Prediction, labels: Tensor, modalities: tuple[str, ...]) -> dict[str, object]:
    """All that is said of the entropies of one prediction."""
    rows = zip(modalities, prediction.unimodal, prediction.present, strict=True)
    return {
        "by_entropy": {m: accuracy_by_entropy(z[has], labels[has]) for m, z, has in rows},
        "right_pick": right_pick(prediction.unimodal, prediction.present, labels),
        "calibration_error": {name: calibration_error(z, labels) for name, z in prediction.fusions.items()},
    }
