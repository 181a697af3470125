"""Plain PyTorch on any device: `mla_ext.reference`, written into the given tensors; on a CPU `mla_ext.inplace`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .. import inplace, reference
from ..step import HeadStep
from .base import Backend

__all__ = ["Reference"]


class Reference(Backend):
    name = "reference"
    preference = 10
    dense_up_to = 256  # as of the CPU's kernels, so that P has one form with them and without

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
        if P.base is not None:
            self.settle_(P)  # rows may wait for it from another backend
        # inplace reads numbers on the host: not in a graph, nor of tensors that have none.
        if (
            step.weight.device.type == "cpu"
            and type(step.weight) in (Tensor, nn.Parameter)
            and not torch.compiler.is_compiling()
        ):
            return inplace.head_step_(step)
        like = P.base if P.base is not None else P.beta
        assert like is not None
        grad = step.grad if step.grad_scale is None else step.grad.to(like.dtype) / step.grad_scale
        changes: list[tuple[Tensor | None, Tensor | None]] = [(step.step, step.step + 1)]
        hyper = step.hyper
        if P.nu is not None and step.feature_mean is not None:
            nu = reference.next_nu(P.nu, step.feature_mean)
            alpha = hyper.alpha * nu
            hyper = dataclasses.replace(hyper, alpha=alpha)
            # h̄ᵀk is at most ‖h̄‖², so d is finite too, except just below infinity.
            changes += [(P.nu, torch.where(alpha.isfinite(), nu, P.nu))]
        before, after = (step.weight, grad, step.momentum_buffer), (step.feature_mean, step.step, hyper)
        if P.base is not None:
            weight, momentum_buffer, base = reference.head_step(*before, P.base, *after)
            changes += [(P.base, base)]
        else:
            assert P.beta is not None and P.rows is not None and P.count is not None
            capacity = len(P.rows)
            weight, momentum_buffer, beta, K = reference.rank_head_step(
                *before, P.beta, P.rows[: int(P.count)], capacity, *after
            )
            rows = torch.cat([K, K.new_zeros(capacity - len(K), K.shape[1])])
            changes += [(P.beta, beta), (P.rows, rows), (P.count, torch.full_like(P.count, len(K)))]
        for old, made in [*changes, (step.weight, weight), (step.momentum_buffer, momentum_buffer)]:
            if old is not None and made is not None:
                old.copy_(made if step.found_inf is None else torch.where(step.found_inf != 0, old, made))

    def entropy_fusion(
        self, logits: Tensor, present: Tensor | None, temperatures: Tensor | None, equal: bool
    ) -> tuple[Tensor, Tensor]:
        fusion = reference.calibrated_fusion if equal else reference.entropy_fusion
        return fusion(logits, present, temperatures)
