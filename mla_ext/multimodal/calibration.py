"""`calibrate` finds one temperature for each modality on the validation split."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..ops import calibrated_fusion
from .data import MultimodalData
from .evaluate import Prediction, check_model_and_data, check_positive, check_workers, predict
from .model import FUSIONS, MultimodalModel, SharedHeadModel

__all__ = ["calibrate"]

PREFERRED = ("entropy", "calibrated", "mean")
LIMIT = math.log(100.0)  # of |log T|: on a split without errors the best T is 0


def calibrate(
    model: MultimodalModel,
    data: MultimodalData,
    batch_size: int = 512,
    *,
    workers: int = 0,
    amp: str | None = None,
) -> Tensor:
    """Temperatures (M,), float32 on the CPU, that minimise the cross entropy of `calibrated_fusion` on validation.

    L-BFGS over log T, with T between 1/100 and 100. All ones if that is no better than T = 1 on that split. A modality
    that no sample there has keeps T = 1. They make the fused probabilities right, not those of one modality alone.

    A `SharedHeadModel` keeps the result as its buffer `temperatures`, and as `fusion` the one with the highest accuracy
    on that split (of equal ones "entropy", then "calibrated"). Nothing else about the model changes. Other arguments
    are as of `predict`.

    ValueError if the validation split has no samples.
    """
    check_model_and_data(model, data)
    check_positive("batch_size", batch_size)
    check_workers(workers)
    indices = data.indices("validation")
    present = torch.stack([data.present(m)[indices] for m in model.modalities])
    indices = indices[present.any(dim=0)]
    if len(indices) == 0:
        raise ValueError("data: expected samples in the validation split, got none")
    prediction = predict(model, data, indices, batch_size, workers=workers, amp=amp)
    temperatures = _fitted(prediction.unimodal.double().cpu(), prediction.present.cpu(), data.labels[indices])
    if isinstance(model, SharedHeadModel):
        with torch.no_grad():
            model.temperatures.copy_(temperatures)
            model.fusion_index.fill_(FUSIONS.index(_best(model, prediction, data.labels[indices])))
    return temperatures


def _best(model: SharedHeadModel, prediction: Prediction, labels: Tensor) -> str:
    """The fusion with the highest accuracy."""
    calibrated, _ = calibrated_fusion(prediction.unimodal, prediction.present, temperatures=model.temperatures)
    fusions = prediction.fusions | {"calibrated": calibrated}
    right = {name: int((fusions[name].argmax(dim=-1).cpu() == labels).sum()) for name in PREFERRED}
    return max(right, key=right.__getitem__)  # the first of equal ones


def _fitted(logits: Tensor, present: Tensor, labels: Tensor) -> Tensor:
    """logits float64 (M, N, C), present bool (M, N), labels int64 (N,) -> float32 (M,)."""
    free = torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

    def loss_of(temperatures: Tensor) -> Tensor:
        return F.cross_entropy(reference.calibrated_fusion(logits, present, temperatures)[0], labels)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = loss_of(_bounded(free))
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    found = _bounded(free.detach()).float()
    ones = torch.ones_like(found)
    return found if loss_of(found) < loss_of(ones) else ones


def _bounded(free: Tensor) -> Tensor:
    return (LIMIT * torch.tanh(free / LIMIT)).exp()
