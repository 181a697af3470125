"""Plain PyTorch on any device: `mla_ext.reference`, written into the given tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference import Hyperparameters, entropy_fusion, feature_mean

__all__ = ["entropy_fusion", "feature_mean", "head_step_", "rls_update_", "unusable"]


def unusable(device: torch.device) -> str | None:
    return None


def rls_update_(projection: Tensor, feature_mean: Tensor, alpha: float, forget: float, normalize: bool) -> None:
    projection.copy_(reference.rls_update(projection, feature_mean, alpha, forget, normalize))


def head_step_(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    projection: Tensor,
    feature_mean: Tensor | None,
    step: Tensor,
    hyper: Hyperparameters,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    if grad_scale is not None:
        grad = grad.to(projection.dtype) / grad_scale
    after = reference.head_step(weight, grad, momentum_buffer, projection, feature_mean, step, hyper)
    for old, new in zip((weight, momentum_buffer, projection, step), (*after, step + 1), strict=True):
        if old is not None:
            old.copy_(new if found_inf is None else torch.where(found_inf != 0, old, new))
