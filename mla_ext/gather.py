"""What the next step is, checked before anything moves: gathering changes no weight, no momentum and no P."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import backends, checks, head_state
from .backends import Backend
from .observation import average_over_ranks
from .plain import check_plain_step
from .reference import Hyperparameters, accumulate_dtype
from .sharding import local_shards
from .step import HeadStep

if TYPE_CHECKING:
    from .optimizer import ProjectedSGD

__all__ = ["HYPERPARAMETERS", "Gatherer"]

HYPERPARAMETERS = tuple(Hyperparameters.__dataclass_fields__)


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


class Gatherer:
    """Gathers the steps of an optimizer, and keeps what it has checked for the next time."""

    def __init__(self) -> None:
        self.hypers: dict[int, tuple[list[Any], Hyperparameters]] = {}
        self.heads: dict[Tensor, Gathered] = {}

    def __reduce__(self) -> tuple[type[Gatherer], tuple[()]]:
        return Gatherer, ()  # a copy checks anew

    def gather(
        self, optimizer: ProjectedSGD, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[list[tuple[HeadStep, Backend]], list[tuple[dict[str, Any], list[Tensor]]]]:
        """Every head's checked step and its backend, and the plain parameters of each group."""
        states, attached = optimizer.state, optimizer._attached
        heads: list[tuple[dict[str, Any], Hyperparameters, Tensor]] = []
        plain: list[tuple[dict[str, Any], list[Tensor]]] = []
        for index, group in enumerate(optimizer.param_groups):
            hyper = self.hyper(index, group)
            params: list[Tensor] = []
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param in attached or head_state.has_projection(states.get(param, {})):
                    heads.append((group, hyper, param))
                else:
                    params.append(param)
            check_plain_step(states, group, params)
            plain.append((group, params))

        observations = [optimizer._observed.get(weight) for *_, weight in heads]
        means = [None if observation is None else observation.mean for observation in observations]
        ranks = optimizer.process_group
        if heads and not isinstance(ranks, str) and dist.is_available() and dist.is_initialized():
            means = [*average_over_ranks(observations, [weight for *_, weight in heads], ranks)]

        scaling = grad_scale, found_inf
        steps = [
            self.head_step(weight, states[weight], group, hyper, mean, scaling, optimizer.backend)
            for (group, hyper, weight), mean in zip(heads, means, strict=True)
        ]
        if not torch.compiler.is_compiling():
            for (*_, weight), mean in zip(heads, means, strict=True):
                reference = None if mean is not None else attached.get(weight)
                recorder = None if reference is None else reference()
                if recorder is not None:  # else fed by hand, or the handle was removed
                    recorder.starve()
        return steps, plain

    def hyper(self, index: int, group: dict[str, Any]) -> Hyperparameters:
        """The group's hyperparameters, checked anew when one of them is another object than at the last step."""
        values = [group[name] for name in HYPERPARAMETERS]
        if torch.compiler.is_compiling():  # where a check would compile the numbers in
            return Hyperparameters(*values)
        known = self.hypers.get(index)
        if known is None or not all(map(operator.is_, values, known[0])):
            hyper = Hyperparameters(*values)
            checks.check_hyperparameters(hyper)
            known = self.hypers[index] = values, hyper
        return known[1]

    def head_step(
        self,
        weight: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        hyper: Hyperparameters,
        mean: Tensor | None,
        scaling: tuple[Tensor | None, Tensor | None],
        backend: str,
    ) -> tuple[HeadStep, Backend]:
        """The checked step of `weight` with its gradient and feature mean."""
        grad = weight.grad
        assert grad is not None  # only such weights are gathered
        dtype = accumulate_dtype(weight.dtype)
        if mean is not None and (mean.dtype != dtype or mean.device != weight.device):  # the model was converted since
            mean = mean.to(weight.device, dtype)
        last = self.heads.get(weight)
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
            self.heads[weight] = Gathered(nothing, chosen, backend, [*state.values()], _place(weight))
        return step, chosen
