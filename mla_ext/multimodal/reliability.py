"""How reliable a model's probabilities are on a split, before and after the temperatures of `mla_ext.calibrate`."""

from __future__ import annotations

import torch

from .data import MultimodalData
from .evaluate import predict
from .metrics import Reliability, reliability
from .model import MultimodalModel, SharedHeadModel

__all__ = ["FUSED", "reliability_of"]

FUSED = "fused"


def reliability_of(
    model: MultimodalModel, data: MultimodalData, split: str = "test", *, workers: int = 0, amp: str | None = None
) -> dict[str, dict[str, Reliability]]:
    """By modality, on the samples that have it, and "fused", on those that have any: "before" and "after".

    Before is with T = 1: f_m, and the mean of the logits; after: f_m / T_m, and calibrated fusion. A model without
    temperatures has no "after", and one that predicts jointly has that prediction as "fused". No entry for a modality
    that no sample has. ValueError for a split without samples.
    """
    indices = data.indices(split)
    if len(indices) == 0:
        raise ValueError(f"split: expected one with samples, got {split!r}, which has none")
    found, labels = predict(model, data, indices, workers=workers, amp=amp), data.labels[indices]
    unimodal, present = found.unimodal.cpu(), found.present.cpu()
    temperatures = model.temperatures.cpu() if isinstance(model, SharedHeadModel) else None
    result = {}
    for i, name in enumerate(model.modalities):
        here = present[i]
        if here.any():
            result[name] = {"before": reliability(unimodal[i, here], labels[here])}
            if temperatures is not None:
                result[name]["after"] = reliability(unimodal[i, here] / temperatures[i], labels[here])
    some = present.any(dim=0)
    fusions = {"before": "joint" if "joint" in found.fusions else "mean", "after": "calibrated"}
    result[FUSED] = {
        when: reliability(found.fusions[fusion].cpu()[some], labels[some])
        for when, fusion in fusions.items()
        if fusion in found.fusions and torch.any(some)
    }
    return result
