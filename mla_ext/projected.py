"""What the optimizers with projections share: heads, their features, P, checkpoints, copies and the step itself."""

from __future__ import annotations

import copy
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from . import backends, checks, head_state, loading
from .bias import check_bias, join_grads
from .gather import Gathered, Gatherer, hyperparameters
from .layers import CANNOT_ATTACH, LAYERS, check_layer, row_size
from .links import see
from .observation import Observation, observe
from .recording import Handles, Link, Recorder
from .reference import Hyperparameters, accumulate_dtype
from .rules import Rule
from .sharding import check_ranks, check_sharding, whole
from .watching import watchable

__all__ = ["ProjectedOptimizer"]


class ProjectedOptimizer(Optimizer, ABC):
    """An optimizer whose attached weights step along what P leaves of the gradient, or of the update.

    A subclass gives the step of the parameters that are not attached, and the rule of those that are.
    """

    _has_loaded = False
    _step_supports_amp_scaling = True  # tells GradScaler to pass its scale on, rather than wait for the overflow check

    def _begin(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        differentiable: bool,
        backend: str,
        process_group: dist.ProcessGroup | str | None,
        heads: Iterable[nn.Module] | None,
    ) -> None:
        """What __init__ does, with the `defaults` of a parameter group."""
        checks.check_options(defaults, differentiable, process_group)
        backends.check_name(backend)
        check_ranks(process_group)
        self.backend = backend
        self.process_group = process_group
        self._attached: dict[Tensor, weakref.ref[Recorder] | None] = {}  # with the hook that should feed it, if any
        self._biases: dict[Tensor, Tensor] = {}  # of the attached weights that they ride with
        self._observed: dict[Tensor, Observation] = {}
        self._gatherer = Gatherer()
        self._link = Link()
        self._link.bind(self)
        Optimizer.__init__(self, params, defaults)
        for head in checks.several(heads):
            self.attach(head)

    @abstractmethod
    def _rule(
        self, weight: Tensor, state: dict[str, Any], group: dict[str, Any], hyper: Hyperparameters
    ) -> Rule | None:
        """The rule that makes the update of an attached weight, with what `state` lacks for it made.

        None: the gradient is projected, and the kernels do SGD.
        """

    def _step_at_once(self, steps: Gathered) -> bool:
        """Whether all steps were made in one call, where there is a kernel for it. If not, nothing has changed."""
        return False

    @abstractmethod
    def _check_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Raises what would make a step of these parameters, which are not attached, fail halfway."""

    @abstractmethod
    def _step_plain(
        self, group: dict[str, Any], params: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Steps parameters of a group that are not attached; all have a gradient."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer; the group's hyperparameters are checked first."""
        merged = self.defaults | (param_group if isinstance(param_group, dict) else {})
        checks.check_number("lr", merged["lr"], ">= 0", lambda lr: lr >= 0)
        checks.check_hyperparameters(hyperparameters(merged))
        checks.check_alpha_scale(merged["alpha_scale"])
        checks.check_rank(merged["rank"], merged["normalize"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["capturable"] and group["params"]:  # a captured graph reads them where they are
            for name in ("lr", "alpha"):
                group[name] = torch.as_tensor(group[name], dtype=torch.float32, device=group["params"][0].device)

    def attach(self, head: nn.Module, bias: bool = False) -> RemovableHandle | Handles:
        """Project the steps of head.weight, and record what the head is fed.

        head is an nn.Linear or an nn.Conv2d, whose features are the patches that it sees: P is (s, s) with
        s = C_in · k · k. Any other module attaches each of those in it, with a P of its own.

        bias: the head's bias rides with its weight, as one more feature that is always 1. It is protected too, P is
        (s + 1, s + 1), and the two step as one, in the parameter group of the weight. Each step then copies both.

        In training mode, with gradients enabled, each forward of `head` (inputs (..., s)) adds to the feature mean of
        the next step, also one whose gradient is thrown away. The returned handle's remove() ends the recording; the
        weight keeps its projection. The head does not keep the optimizer alive.
        """
        if not isinstance(head, LAYERS):
            layers = [m for m in head.modules() if isinstance(m, LAYERS)] if isinstance(head, nn.Module) else []
            if not layers:
                what = type(head).__name__
                raise TypeError(
                    f"head: expected an nn.Linear or nn.Conv2d, got {what} without one in it{CANNOT_ATTACH}"
                )
            for layer in layers:  # all of them before the first is attached
                check_layer(layer)
                self._check_head(layer.weight, "head.weight")
                if bias:
                    self._check_bias(layer)
            return Handles([self.attach(layer, bias) for layer in layers])
        check_layer(head)
        if bias:
            self._check_head(head.weight, "head.weight")
            self._check_bias(head)
            assert head.bias is not None
            self._biases[head.weight] = head.bias
            self._gatherer = Gatherer()  # which parameters are plain has changed
        self._attach(head.weight, "head.weight")
        recorder = Recorder(self._link, head.weight)
        handle = head.register_forward_hook(recorder, with_kwargs=True)
        self._attached[head.weight] = weakref.ref(recorder)
        weakref.finalize(self, handle.remove).atexit = False
        return handle

    def observe(self, weight: Tensor, features: Tensor) -> None:
        """Record features (N, s), the inputs of the head with this weight (C, s), by hand. N counts as its weight.

        Of a convolution's weight (C, C_in, k, k) the features are patches, and s = C_in · k · k.
        """
        checks.check_weight("weight", weight)
        checks.check_tensor("features", features, ("N", row_size(weight)), device=weight.device)
        checks.check_nonempty("features", features)
        self._attach(weight, "weight")
        self._record(weight, features)

    def projection(self, weight: Tensor) -> Tensor:
        """The projection P (s, s) of an attached weight, dense: a copy, in float32 (float64 for float64)."""
        P = head_state.get_projection(self.state.get(weight, {})) if isinstance(weight, Tensor) else None
        if P is None:
            if isinstance(weight, Tensor) and weight in self._attached:
                s = row_size(weight) + (weight in self._biases)
                return torch.eye(s, dtype=accumulate_dtype(weight.dtype), device=weight.device)
            what = checks.describe(weight)
            raise ValueError(f"weight: expected a weight that was attached or observed, got {what} that was not")
        # A copy, as looking changes no later bits; beside the weight, which may have been converted or moved.
        P = P.copy_to(accumulate_dtype(weight.dtype), weight.device)
        backends.choose(self.backend, weight.device).settle_(P)
        return P.dense()

    @torch.no_grad()
    def plasticity(self, weight: Tensor) -> Tensor:
        """‖G P‖ / ‖G‖, 0-d: how much of the gradient in weight.grad passes P, both as they are now.

        After a step that is how much would pass if this gradient came again. It is 1 before anything is absorbed.
        NaN for a gradient of zeros. Nothing is kept for it: ValueError where the gradient is gone, as after zero_grad.
        """
        P = self.projection(weight)
        if weight.grad is None:
            raise ValueError("weight: expected one with a gradient, so ask between backward and zero_grad; got None")
        own = self._biases.get(weight)
        grad = (whole(weight.grad).flatten(1) if own is None else join_grads(weight, own)).to(P.dtype)
        share: Tensor = (grad @ P).norm() / grad.norm()
        return share

    def reset_projection(self) -> None:
        """Every P back to the identity, and its ν to none: full plasticity, nothing protected."""
        for state in self.state.values():
            P = head_state.get_projection(state)
            if P is not None:
                P.reset_()

    @torch.no_grad()
    def settle(self) -> None:
        """Fold the updates that a dense P keeps as rows into its matrix. Nothing needs this: P stays the same."""
        for state in self.state.values():
            P = head_state.get_projection(state)
            if P is not None:
                backends.choose(self.backend, state["step"].device).settle_(P)

    @watchable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns the closure's loss, if there is one."""
        initialized = torch.cuda.is_initialized()
        capturing = initialized and torch.cuda.is_current_stream_capturing()
        if capturing and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                "capturable: expected True in every parameter group to capture a step, got False"
                + see("cuda_graphs#cuda-graphs")
            )
        # Set by GradScaler for the length of this call.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        loss = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            steps = self._gatherer.gather(self, grad_scale, found_inf)
        finally:
            # Even if the step fails: features of a batch that was given up must not meet the next gradient. In place,
            # since torch.compile drops the assignment of an optimizer's attribute.
            self._observed.clear()
        if not self._step_at_once(steps):
            steps.check(self)
            steps.run(self)
        for recorder, observation in steps.used:
            recorder.spare = observation
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for any optimizer. P and momentum keep their precision under half-precision weights.

        `rank` decides the form of P: a checkpoint of a dense P loads into the rank form, and the other way; with "auto"
        P keeps the form it was saved in. Raises ValueError for a projection that does not fit its weight.
        """
        is_new = loading.load(self, super().load_state_dict, state_dict)
        self._observed.clear()
        self._has_loaded = True
        for weight in () if is_new else self._attached:
            self._warn_of_identity(weight, stacklevel=3)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProjectedOptimizer:
        memo[id(self.process_group)] = self.process_group  # which cannot be copied: the copy has the same ranks
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {"backend": self.backend, "process_group": self.process_group}
        own |= {"_attached": dict.fromkeys(self._attached), "_link": self._link}
        own |= {"_observed": {}, "_gatherer": Gatherer(), "_biases": dict(self._biases)}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_link" in state:
            self._link.bind(self)

    def _attach(self, weight: Tensor, name: str) -> None:
        """Mark `weight` as one whose steps are projected. Its state is made by its first step."""
        if isinstance(weight, Tensor) and weight in self._attached:
            return
        self._check_head(weight, name)
        self._attached[weight] = None
        if self._has_loaded:
            self._warn_of_identity(weight, stacklevel=4)

    def _check_head(self, weight: Tensor, name: str) -> None:
        """Raises TypeError or ValueError for a weight whose steps cannot be projected."""
        checks.check_weight(name, weight)
        checks.check_nonempty(name, weight)
        if not any(weight is param for group in self.param_groups for param in group["params"]):
            computed = "" if weight.is_leaf else " that is computed, as a parametrised module's is"
            what = checks.describe(weight)
            raise ValueError(f"{name}: expected a parameter of this optimizer, got {what}{computed}{CANNOT_ATTACH}")
        check_sharding(name, weight)

    def _check_bias(self, layer: nn.Linear | nn.Conv2d) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        check_bias(layer, self.state.get(layer.weight, {}), self._biases.get(layer.weight), params)

    def _record(self, weight: Tensor, features: Tensor) -> None:
        self._join(weight, observe(features, accumulate_dtype(weight.dtype), self.backend))

    def _record_mean(self, weight: Tensor, mean: Tensor, count: int) -> None:
        backend = backends.choose(self.backend, mean.device)
        self._join(weight, Observation(mean.to(accumulate_dtype(weight.dtype)), count, backend))

    def _join(self, weight: Tensor, new: Observation) -> None:
        observation = self._observed.setdefault(weight, new)
        if observation is not new:
            observation.add(new)

    def _warn_of_identity(self, weight: Tensor, stacklevel: int) -> None:
        if not head_state.has_projection(self.state.get(weight, {})):
            warnings.warn(
                "the loaded state has no projection for an attached weight: its P starts from the identity"
                + head_state.DOES_NOT_FIT,
                stacklevel=stacklevel,
            )
