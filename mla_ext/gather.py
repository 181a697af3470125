"""What a head's next step is, checked before anything moves: gathering changes no weight, no momentum and no P."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, checks, head_state
from .backends import Backend
from .reference import Hyperparameters, accumulate_dtype
from .sharding import local_shards
from .step import HeadStep

__all__ = ["Gathered", "gather_head_step"]


@dataclass(slots=True)
class Gathered:
    """A step that was checked, and whose it was. The next one needs a look at the gradient only, if `holds`."""

    step: HeadStep
    backend: Backend
    name: str  # of the backend, as it was asked for
    state: list[Any]
    place: tuple[Any, ...]

    def holds(self, weight: Tensor, state: dict[str, Any], hyper: Hyperparameters, backend: str) -> bool:
        """Whether the weight lies where it lay, state and hyperparameters are the same, and so is `backend`."""
        return (
            self.step.hyper is hyper
            and self.name == backend
            and len(state) == len(self.state)
            and all(map(operator.is_, state.values(), self.state))
            and self.place == _place(weight)
        )


def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.dtype, weight.device, weight.shape, weight.stride()


def gather_head_step(
    known: dict[Tensor, Gathered],
    weight: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    hyper: Hyperparameters,
    mean: Tensor | None,
    scaling: tuple[Tensor | None, Tensor | None],
    backend: str,
) -> tuple[HeadStep, Backend]:
    """The step of `weight` with its gradient and feature mean; `known` holds what was gathered for earlier steps."""
    grad = weight.grad
    assert grad is not None  # only such weights are gathered
    dtype = accumulate_dtype(weight.dtype)
    if mean is not None and (mean.dtype != dtype or mean.device != weight.device):  # the model was converted since
        mean = mean.to(weight.device, dtype)
    last = known.get(weight)
    if last is not None and last.holds(weight, state, hyper, backend):
        checks.check_tensor("grad", grad, weight.shape, (weight.dtype,), weight.device)
        checks.check_scaling(*scaling, weight.device)
        same = last.step
        step = HeadStep(weight, grad, same.momentum_buffer, same.projection, mean, same.step, hyper, *scaling)
        return step, last.backend

    chosen = backends.choose(backend, weight.device)
    P = head_state.prepare(state, weight, group, hyper, chosen)
    momentum_buffer = state["momentum_buffer"] if checks.has_momentum(hyper.momentum) else None
    W, G, M = local_shards(weight, grad, momentum_buffer)
    # A step without momentum is none that the buffer has seen.
    count = torch.zeros_like(state["step"]) if momentum_buffer is None else state["step"]
    step = HeadStep(W, G, M, P, mean, count, hyper, *scaling)
    checks.check_head_step(step)
    if type(weight) is nn.Parameter and not torch.compiler.is_compiling() and weight.device.type != "meta":
        nothing = HeadStep(W, W, M, P, None, count, hyper)  # keeps no gradient and no mean alive
        known[weight] = Gathered(nothing, chosen, backend, [*state.values()], _place(weight))
    return step, chosen
