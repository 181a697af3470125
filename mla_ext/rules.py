"""What is multiplied by P: the gradient, or what the optimizer is about to add to the weight.

With project="gradient" the kernels do all of the step: they take G P for the gradient and do SGD with it. Momentum and
weight decay come after the product then, and move W along what P protects. With project="update" a rule makes the
update X (C, s) of the gradient, and the same kernels make W ← W − γ X P of it: nothing leaks. A rule is elementwise, so
it works on a shard of the rows, and it reads no number on the host.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import reference
from .reference import accumulate_dtype
from .step import HeadStep

__all__ = ["SGD", "AdamW", "Rule", "operand_step"]


class Rule(Protocol):
    def update(self, step: HeadStep, grad: Tensor) -> Tensor:
        """X (C, s) for the unscaled gradient (C, s), both in the dtype of P. The optimizer's moments move on."""


class SGD:
    """torch.optim.SGD's update, with the momentum buffer and the hyperparameters of the step."""

    def update(self, step: HeadStep, grad: Tensor) -> Tensor:
        X, momentum_buffer = reference.sgd_update(step.weight, grad, step.momentum_buffer, step.step, step.hyper)
        _keep(step, step.momentum_buffer, momentum_buffer)
        return X


@dataclass(slots=True)
class AdamW:
    """torch.optim.AdamW's update. exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq (C, s) in the dtype of P."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    betas: tuple[float | Tensor, float | Tensor]
    eps: float

    def update(self, step: HeadStep, grad: Tensor) -> Tensor:
        moments = (self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq)
        X, new = reference.adamw_update(step.weight, grad, moments, step.step, step.hyper, self.betas, self.eps)
        for old, made in zip(moments, new, strict=True):
            _keep(step, old, made)
        return X


def operand_step(step: HeadStep) -> HeadStep:
    """The step that a kernel makes for `step`: the same, or where there is a rule, one along the rule's update.

    A weight in half precision is then stepped in a float32 copy, `weight` of what is returned, which the caller writes
    back: the update is not rounded before it is projected.
    """
    rule = step.rule or (SGD() if step.hyper.project == "update" else None)
    if rule is None:
        return step
    dtype = accumulate_dtype(step.weight.dtype)
    grad = step.grad.to(dtype)
    X = rule.update(step, grad if step.grad_scale is None else grad / step.grad_scale)
    hyper = dataclasses.replace(
        step.hyper, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False, project="gradient"
    )
    return dataclasses.replace(
        step, weight=step.weight.to(dtype), grad=X, momentum_buffer=None, hyper=hyper, grad_scale=None, rule=None
    )


def _keep(step: HeadStep, old: Tensor | None, new: Tensor | None) -> None:
    """Write what a rule has made into its tensor, unless the step overflowed."""
    if old is not None and new is not None:
        old.copy_(new if step.found_inf is None else torch.where(step.found_inf != 0, old, new))
