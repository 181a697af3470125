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
        P = step.projection
        like = P.base if P.base is not None else P.beta
        assert like is not None
        grad = step.grad if step.grad_scale is None else step.grad.to(like.dtype) / step.grad_scale
        arguments = step.weight, grad, step.momentum_buffer
        if P.base is not None:
            self.settle_(P)
            new = reference.head_step(*arguments, P.base, step.feature_mean, step.step, step.hyper)
            old = step.weight, step.momentum_buffer, P.base
        else:
            assert P.beta is not None and P.rows is not None and P.count is not None
            K, capacity = P.rows[: int(P.count)], len(P.rows)
            *new, beta, K = reference.rank_head_step(
                *arguments, P.beta, K, capacity, step.feature_mean, step.step, step.hyper
            )
            rows = torch.cat([K, K.new_zeros(capacity - len(K), K.shape[1])])
            new = *new, beta, rows, torch.full_like(P.count, len(K))
            old = step.weight, step.momentum_buffer, P.beta, P.rows, P.count
        for before, after in zip((*old, step.step), (*new, step.step + 1), strict=True):
            if before is not None and after is not None:
                before.copy_(after if step.found_inf is None else torch.where(step.found_inf != 0, before, after))

    def entropy_fusion(self, logits: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        return reference.entropy_fusion(logits, present)
