"""What the next step is, checked before anything moves: gathering changes no weight, no momentum and no P."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from . import backends, bias, checks, head_state, ops
from .backends import Backend
from .observation import Observation, average_over_ranks
from .reference import Hyperparameters, accumulate_dtype
from .rules import AdamW
from .sharding import local_shards
from .step import HeadStep, PlainStep

if TYPE_CHECKING:
    from .projected import ProjectedOptimizer
    from .recording import Recorder

__all__ = ["HYPERPARAMETERS", "Gathered", "Gatherer", "hyperparameters"]

HYPERPARAMETERS = tuple(Hyperparameters.__dataclass_fields__)
MAY_CHANGE = {"lr", "alpha"}  # Schedulers write these. A head's checked step holds with any value of them.
NO_STATE: Mapping[str, Any] = {}


@dataclass(slots=True)
class Gathered:
    """All steps of an optimizer's step: the plain parameters of each group, and every head with its backend."""

    plain: list[tuple[dict[str, Any], PlainStep]]
    heads: list[tuple[HeadStep, Backend]]
    biased: list[tuple[Tensor, Tensor, Tensor]]  # [W | b] of a head's step, W and b
    used: list[tuple[Recorder, Observation]]  # whose memory is free after the step
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def run_at_once(self, name: str) -> bool:
        """Whether the backend of this name made all steps in one call. If not, nothing has changed."""
        if self.found_inf is not None or self.grad_scale is not None or torch.compiler.is_compiling() or self.biased:
            return False
        plain = [step for _, step in self.plain if step.params]
        heads = [step for step, _ in self.heads]
        moved = [param for step in plain for param in step.params] + [step.weight for step in heads]
        if not moved or any(group["foreach"] or group["fused"] for group, _ in self.plain):
            return False
        backend = self.heads[0][1] if heads else backends.choose(name, moved[0].device)
        if any(other is not backend for _, other in self.heads) or any(step.rule is not None for step in heads):
            return False
        done = backend.step_(plain, heads)
        if done and not torch.is_inference_mode_enabled():
            increment_version(moved)  # as any in-place op does; what autograd saved is then known to be stale
        return done

    def check(self, optimizer: ProjectedOptimizer) -> None:
        """Raises what would make one of the steps fail halfway."""
        for group, step in self.plain:
            optimizer._check_plain(group, step.params)
        for head, _ in self.heads:
            checks.check_tensor("grad", head.grad, head.weight.shape, (head.weight.dtype,), head.weight.device)
            checks.check_scaling(head.grad_scale, head.found_inf, head.weight.device)

    def run(self, optimizer: ProjectedOptimizer) -> None:
        """Makes the steps one by one."""
        for group, step in self.plain:
            optimizer._step_plain(group, step.params, self.grad_scale, self.found_inf)
        for head, backend in self.heads:
            ops.run_head_step_(head, backend)
        for joined in self.biased:
            bias.write_back(*joined)


@dataclass(slots=True)
class Part:
    """The parameters of a group, with the states they had when they were told apart."""

    params: list[Tensor]
    plain: list[tuple[Tensor, Mapping[str, Any]]]
    heads: list[Tensor]

    def holds(self, group: dict[str, Any]) -> bool:
        """Whether they are still those of `group`, and no projection has been put into a plain one's state."""
        return _are_same(group["params"], self.params) and not any(
            len(state) > 1 and head_state.has_projection(state)  # it has a momentum buffer at most
            for _, state in self.plain
        )


@dataclass(slots=True)
class Checked:
    """A head's step that was checked, and whose it was. The next one needs a look at the gradient only, if `holds`."""

    step: HeadStep
    backend: Backend
    name: str  # of the backend, as it was asked for
    state: list[Any]
    place: tuple[Any, ...]

    def holds(
        self, weight: Tensor, state: dict[str, Any], group: dict[str, Any], hyper: Hyperparameters, backend: str
    ) -> bool:
        """Whether the weight lies where it lay, state and hyperparameters are the same, and so is `backend`."""
        if not (self.name == backend and _are_same(state.values(), self.state) and self.place == _place(weight)):
            return False
        if self.step.hyper is not hyper:
            names = (name for name in HYPERPARAMETERS if name not in MAY_CHANGE)
            if any(getattr(hyper, name) is not getattr(self.step.hyper, name) for name in names):
                return False
            if not head_state.is_scaled_by(self.step.projection, group):
                return False
            self.step.hyper = hyper
        return True


def hyperparameters(group: dict[str, Any]) -> Hyperparameters:
    """Those of a parameter group, unchecked. What it lacks, as AdamW lacks momentum, has its default."""
    return Hyperparameters(**{name: group[name] for name in HYPERPARAMETERS if name in group})


def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.dtype, weight.device, weight.shape, weight.stride()


def _are_same(objects: Iterable[Any], kept: list[Any]) -> bool:
    """Whether they are the very same objects: without a look into them, and without the hash of a tensor."""
    objects = [*objects]
    return len(objects) == len(kept) and all(map(operator.is_, objects, kept))


class Gatherer:
    """Gathers the steps of an optimizer, and keeps what it has found out for the next time."""

    def __init__(self) -> None:
        self.hypers: dict[int, tuple[list[Any], Hyperparameters]] = {}
        self.heads: dict[Tensor, Checked] = {}
        self.parts: list[Part] = []
        self.states: list[Any] = []
        self.attached = 0

    def __reduce__(self) -> tuple[type[Gatherer], tuple[()]]:
        return Gatherer, ()  # a copy checks anew

    def gather(self, optimizer: ProjectedOptimizer, grad_scale: Tensor | None, found_inf: Tensor | None) -> Gathered:
        """Every head's step and its backend, and the plain step of each group. Heads are checked but for their grad."""
        attached = optimizer._attached
        plain: list[tuple[dict[str, Any], PlainStep]] = []
        heads: list[tuple[dict[str, Any], Hyperparameters, Tensor]] = []
        for index, (group, part) in enumerate(zip(optimizer.param_groups, self.tell_apart(optimizer), strict=True)):
            hyper = self.hyper(index, group)
            step = PlainStep([], [], [], False, hyper)
            has_momentum = checks.has_momentum(hyper.momentum)
            for param, state in part.plain:
                grad = param.grad
                if grad is not None:
                    step.params.append(param)
                    step.grads.append(grad)
                    if has_momentum:
                        step.momentum_buffers.append(state.get("momentum_buffer"))
            plain.append((group, step))
            heads += [(group, hyper, weight) for weight in part.heads if weight.grad is not None]

        observations = [optimizer._observed.get(weight) for *_, weight in heads]
        means = [None if observation is None else observation.mean for observation in observations]
        ranks = optimizer.process_group
        if heads and not isinstance(ranks, str) and dist.is_available() and dist.is_initialized():
            means = [*average_over_ranks(observations, [weight for *_, weight in heads], ranks)]

        steps = [
            self.head_step(optimizer, weight, group, hyper, mean, (grad_scale, found_inf))
            for (group, hyper, weight), mean in zip(heads, means, strict=True)
        ]
        used: list[tuple[Recorder, Observation]] = []
        if not torch.compiler.is_compiling():
            for (*_, weight), observation, mean in zip(heads, observations, means, strict=True):
                reference = attached.get(weight)
                recorder = None if reference is None else reference()
                if recorder is not None and observation is not None:
                    used.append((recorder, observation))
                elif recorder is not None and mean is None:
                    recorder.starve()
        biased = []
        if optimizer._biases:
            for (*_, weight), (made, _) in zip(heads, steps, strict=True):
                if weight in optimizer._biases:
                    biased.append((made.weight, weight, optimizer._biases[weight]))
        return Gathered(plain, steps, biased, used, grad_scale, found_inf)

    def tell_apart(self, optimizer: ProjectedOptimizer) -> list[Part]:
        """The plain parameters and the heads of each group."""
        states, attached, groups = optimizer.state, optimizer._attached, optimizer.param_groups
        if (
            len(groups) == len(self.parts)
            and len(attached) == self.attached
            and _are_same(states.values(), self.states)
            and all(map(Part.holds, self.parts, groups))
        ):
            return self.parts
        parts, biases = [], [*optimizer._biases.values()]
        for group in groups:
            part = Part([*group["params"]], [], [])
            for param in part.params:
                state = states.get(param, NO_STATE)
                if param in attached or head_state.has_projection(state):
                    part.heads.append(param)
                elif not any(param is bias for bias in biases):  # which steps with its weight
                    part.plain.append((param, state))
            parts.append(part)
        if any(part.heads for part in parts):  # torch.distributed.checkpoint then asks for the state of all others too
            for part in parts:
                part.plain = [(param, states[param]) for param, _ in part.plain]
        if not torch.compiler.is_compiling():
            self.parts, self.states, self.attached = parts, [*states.values()], len(attached)
            self.heads.clear()  # keeps nothing alive that is gone
        return parts

    def hyper(self, index: int, group: dict[str, Any]) -> Hyperparameters:
        """The group's hyperparameters, checked anew when one of them is another object than at the last step."""
        known = self.hypers.get(index)
        if known is not None and _are_same(group.values(), known[0]):
            return known[1]
        hyper = hyperparameters(group)
        if not torch.compiler.is_compiling():  # where a check would compile the numbers in
            checks.check_hyperparameters(hyper)
            checks.check_alpha_scale(group["alpha_scale"])
            self.hypers[index] = [*group.values()], hyper
        return hyper

    def head_step(
        self,
        optimizer: ProjectedOptimizer,
        weight: Tensor,
        group: dict[str, Any],
        hyper: Hyperparameters,
        mean: Tensor | None,
        scaling: tuple[Tensor | None, Tensor | None],
    ) -> tuple[HeadStep, Backend]:
        """The checked step of `weight` with its gradient and feature mean."""
        grad, state, backend = weight.grad, optimizer.state[weight], optimizer.backend
        assert grad is not None  # only such weights are gathered
        own = optimizer._biases.get(weight) if optimizer._biases else None
        if own is not None:
            bias.join_moments(state, optimizer.state[own], weight)
            weight, grad = bias.join(weight, own), bias.join_grads(weight, own)
            mean = None if mean is None else torch.cat([mean, mean.new_ones(1)])  # the feature that b is multiplied by
        dtype = accumulate_dtype(weight.dtype)
        if mean is not None and (mean.dtype != dtype or mean.device != weight.device):  # the model was converted since
            mean = mean.to(weight.device, dtype)
        rule = optimizer._rule(weight, state, group, hyper)
        last = self.heads.get(weight)
        if last is not None and last.holds(weight, state, group, hyper, backend):
            same = last.step
            step = HeadStep(weight, grad, same.momentum_buffer, same.projection, mean, same.step, hyper, *scaling, rule)
            return step, last.backend

        chosen = backends.choose(backend, weight.device)
        P = head_state.prepare(state, weight, group, hyper, chosen)
        momentum_buffer = state["momentum_buffer"] if checks.has_momentum(hyper.momentum) else None
        W, G, M = local_shards(weight, grad, momentum_buffer)
        # A step without momentum is none that the buffer has seen.
        is_seen = momentum_buffer is not None or isinstance(rule, AdamW)
        count = state["step"] if is_seen else torch.zeros_like(state["step"])
        step = HeadStep(W, G, M, P, mean, count, hyper, *scaling, rule)
        checks.check_head_step(ops.as_matrices(step))
        if type(weight) is nn.Parameter and not torch.compiler.is_compiling() and weight.device.type != "meta":
            nothing = HeadStep(W, W, M, P, None, count, hyper)  # keeps no gradient and no mean alive
            self.heads[weight] = Checked(nothing, chosen, backend, [*state.values()], _place(weight))
        return step, chosen
