"""The steps of an optimizer, as data: what goes whole from the optimizer through the op layer to a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .projection import Projection
from .reference import Hyperparameters

if TYPE_CHECKING:
    from .rules import Rule

__all__ = ["HeadStep", "PlainStep"]


@dataclass(slots=True)
class HeadStep:
    """W ← W − γ · SGD(G P), then P absorbs h̄ (eq. 4-6); in place on weight, momentum_buffer, projection and step.

    With a rule, or hyper.project == "update", W ← W − γ X P with the rule's update X; `rules.operand_step` makes of it
    the step above, so a backend meets no rule.

    weight W and grad G (C, s); momentum_buffer (C, s) or None without momentum; projection P; feature_mean h̄ (s,) or
    None when there is nothing to absorb; step, 0-d float32, the updates that momentum_buffer has seen; grad_scale, one
    float32 that divides G; found_inf, one float32: unless it is 0 nothing changes.
    """

    weight: Tensor
    grad: Tensor
    momentum_buffer: Tensor | None
    projection: Projection
    feature_mean: Tensor | None
    step: Tensor
    hyper: Hyperparameters
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    rule: Rule | None = None


@dataclass(slots=True)
class PlainStep:
    """torch.optim.SGD's step of the parameters of one group that have no projection; in place.

    params, and of the same shapes grads and, with momentum, momentum_buffers. first_step: the momentum buffers start as
    the gradients. grad_scale divides the gradients, in place.
    """

    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor | None]
    first_step: bool
    hyper: Hyperparameters
    grad_scale: float = 1.0
