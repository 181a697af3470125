"""Plain PyTorch on any device: `mla_ext.reference`, written into the given tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..step import HeadStep
from .base import Backend

__all__ = ["Reference"]


class Reference(Backend):
    name = "reference"
    preference = 10

    def unusable(self, device: torch.device) -> str | None:
        return None

    def feature_mean(self, features: Tensor) -> Tensor:
        return reference.feature_mean(features)

    def rls_update_(
        self, projection: Tensor, feature_mean: Tensor, alpha: float | Tensor, forget: float | Tensor, normalize: bool
    ) -> None:
        projection.copy_(reference.rls_update(projection, feature_mean, alpha, forget, normalize))

    def head_step_(self, step: HeadStep) -> None:
        P = step.projection.base
        assert P is not None
        self.settle_(step.projection)
        grad = step.grad if step.grad_scale is None else step.grad.to(P.dtype) / step.grad_scale
        after = reference.head_step(
            step.weight, grad, step.momentum_buffer, P, step.feature_mean, step.step, step.hyper
        )
        found_inf = step.found_inf
        targets = (step.weight, step.momentum_buffer, P, step.step)
        for old, new in zip(targets, (*after, step.step + 1), strict=True):
            if old is not None and new is not None:
                old.copy_(new if found_inf is None else torch.where(found_inf != 0, old, new))

    def entropy_fusion(self, logits: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        return reference.entropy_fusion(logits, present)
