"""ProjectedSGD: torch.optim.SGD whose attached weights step along projected gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd
from torch.utils.hooks import RemovableHandle

from . import backends, checks, ops
from .observation import Observation, average_over_ranks, observe
from .pending import Pending
from .reference import Hyperparameters, accumulate_dtype
from .sharding import check_sharding, local_shards

_HYPERPARAMETERS = tuple(Hyperparameters.__dataclass_fields__)
CLASSES_FOR_FACTORS = 32  # with fewer the proof costs more than is saved (an estimate)


class ProjectedSGD(Optimizer):
    """SGD with the gradient modification of MLA (arXiv 2311.10707, eq. 4-6) for the weights of attached heads.

    An attached weight W (C, s) carries a projection P (s, s), at first the identity. Its step projects the gradient,
    G ← G P, does what torch.optim.SGD does with the result, and absorbs the mean h̄ (s,) of the head inputs since the
    last step, P ← P − k kᵀ / d with k = P h̄ and d = α + h̄ᵀk: later steps leave the head's answers to what it was
    fed before as they were. All other parameters, biases included, step exactly as torch.optim.SGD.

    Args:
        params: parameters or parameter groups, as for any optimizer.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD's; weight decay and momentum
            come after the projection.
        alpha: α > 0 of the update. Smaller protects more; may be changed by schedulers like lr.
        absorb: "after" projects with P_{t-1} and then absorbs; "before" absorbs first and projects with P_t (OWM).
        normalize: divide P by its Frobenius norm after each update.
        forget: the rate ρ in [0, 1] of P ← (1−ρ) P + ρ I after each update, which gives plasticity back.
        capturable: make lr and alpha tensors on the device of their parameters, where a CUDA graph that captured the
            step reads what schedulers write.
        foreach, fused: as torch.optim.SGD's, for parameters that are not attached.
        differentiable: must be False.
        backend: "auto", or one of `mla_ext.build_info()["backends"]`.
        process_group: whose ranks share their features: None is the default group once torch.distributed is
            initialised, "local" never communicates.

    Raises TypeError or ValueError for bad arguments, naming the argument; a failed step changes nothing.

    Under torch.amp.GradScaler the kernels divide by its scale themselves, and an overflow leaves weights, momentum
    and P as they are. The state of an attached weight is "projection" and "momentum_buffer" in float32 (float64 for
    float64 weights), whatever the dtype of the weight, and "step", the number of updates the momentum buffer has seen.
    """

    _step_supports_amp_scaling = True  # tells GradScaler to pass its scale on, rather than wait for the overflow check

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        alpha: float | Tensor = 0.1,
        absorb: str = "after",
        normalize: bool = False,
        forget: float = 0.0,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        backend: str = "auto",
        process_group: dist.ProcessGroup | str | None = None,
    ) -> None:
        hyper = Hyperparameters(
            lr, momentum, dampening, weight_decay, nesterov, maximize, alpha, absorb, normalize, forget
        )
        for name, flag, choices in (
            ("capturable", capturable, (True, False)),
            ("foreach", foreach, (True, False, None)),
            ("fused", fused, (True, False, None)),
        ):
            if not any(flag is choice for choice in choices):
                raise TypeError(f"{name}: expected one of {choices}, got {checks.describe(flag)}")
        if foreach and fused:
            raise ValueError("fused: expected False or None with foreach=True, got True")
        if differentiable:
            raise ValueError("differentiable: expected False, as the step updates weights in place; got True")
        if backend != "auto" and backend not in backends.BACKENDS:
            raise ValueError(f"backend: expected 'auto' or one of {sorted(backends.BACKENDS)}, got {backend!r}")
        is_group = dist.is_available() and isinstance(process_group, dist.ProcessGroup)
        if not (process_group is None or process_group == "local" or is_group):
            raise ValueError(f"process_group: expected a process group, None or 'local', got {process_group!r}")
        self.backend = backend
        self.process_group = process_group
        self._observed: dict[Tensor, Observation] = {}
        self._pending: dict[Tensor, Pending] = {}
        self._checked_groups: dict[int, Hyperparameters] = {}
        defaults = {name: getattr(hyper, name) for name in _HYPERPARAMETERS}
        super().__init__(params, defaults | {"capturable": capturable, "foreach": foreach, "fused": fused})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer; the group's hyperparameters are checked first."""
        merged = self.defaults | (param_group if isinstance(param_group, dict) else {})
        checks.check_number("lr", merged["lr"], ">= 0", lambda lr: lr >= 0)
        checks.check_hyperparameters(_hyperparameters(merged))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if (
            group["capturable"] and group["params"]
        ):  # a captured graph reads them where they are, and schedulers write them there
            for name in ("lr", "alpha"):
                group[name] = torch.as_tensor(group[name], dtype=torch.float32, device=group["params"][0].device)

    def attach(self, head: nn.Linear) -> RemovableHandle:
        """Project the steps of head.weight, and record what the head is fed.

        In training mode, with gradients enabled, each forward of `head` (inputs (..., s)) adds to the feature mean of
        the next step, also one whose gradient is thrown away. The returned handle's remove() ends the recording; the
        weight keeps its projection.
        """
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head: expected an nn.Linear, got {type(head).__name__}")
        self._project(head.weight, "head.weight")
        return head.register_forward_hook(partial(self._record, head.weight), with_kwargs=True)

    def observe(self, weight: Tensor, features: Tensor) -> None:
        """Record features (N, s), the inputs of the head with this weight (C, s), by hand. N counts as its weight."""
        checks.check_tensor("weight", weight, ("C", "s"))
        checks.check_tensor("features", features, ("N", weight.shape[1]), device=weight.device)
        checks.check_nonempty("features", features)
        self._project(weight, "weight")
        new = observe(features, accumulate_dtype(weight.dtype), self.backend)
        if weight in self._observed:
            self._observed[weight].add(new.mean, new.count)
        else:
            self._observed[weight] = new

    def projection(self, weight: Tensor) -> Tensor:
        """The projection P (s, s) of an attached weight, dense: a copy, in float32 (float64 for float64)."""
        state = self.state.get(weight, {}) if isinstance(weight, Tensor) else {}
        if "projection" not in state:
            what = checks.describe(weight)
            raise ValueError(f"weight: expected a weight that was attached or observed, got {what} that was not")
        self.settle()
        return state["projection"].clone()

    def reset_projection(self) -> None:
        """Every P back to the identity: full plasticity, nothing protected."""
        self._pending.clear()
        for state in self.state.values():
            if "projection" in state:
                _set_to_identity(state["projection"])

    @torch.no_grad()
    def settle(self) -> None:
        """Make the updates of P that wait. Whatever shows P does so by itself, state_dict() and projection() too.

        On CPUs most steps leave P in memory as it is and keep its update, so that P is written once in many steps.
        """
        for weight, pending in self._pending.items():
            backends.cpu.fold_(self.state[weight]["projection"], pending)

    def state_dict(self) -> dict[str, Any]:
        """As for any optimizer."""
        self.settle()
        return super().state_dict()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns the closure's loss, if there is one."""
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if capturing and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError("capturable: expected True in every parameter group to capture a step, got False")
        # Set by GradScaler for the length of this call.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        loss = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            head_steps, plain_groups = self._plan()
        finally:
            # Even if the step fails: features of a batch that was given up must not meet the next gradient. In place,
            # since torch.compile drops the assignment of an optimizer's attribute.
            self._observed.clear()
        for group, params in plain_groups:
            if params:
                self._plain_step(group, params, grad_scale, found_inf)
        for arguments, extras in head_steps:
            ops.run_head_step_(*arguments, grad_scale, found_inf, self.backend, *extras)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for any optimizer. P and momentum keep their precision under half-precision weights."""
        projected = [weight for weight, state in self.state.items() if "projection" in state]
        # Hyperparameters that the saved groups lack, as torch.optim.SGD's do, stay what they are here.
        groups = [
            {name: value for name, value in ours.items() if name != "params"} | saved
            for ours, saved in zip(self.param_groups, state_dict["param_groups"], strict=False)
        ]
        if len(groups) == len(self.param_groups) == len(state_dict["param_groups"]):
            state_dict = {**state_dict, "param_groups": groups}
        tensors = [
            {n: group[n] for n in ("lr", "alpha") if isinstance(group[n], Tensor)} for group in self.param_groups
        ]
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        loaded = [(param, state_dict["state"].get(index, {})) for index, param in zip(ids, params, strict=False)]
        for param, saved in loaded:
            if "projection" in saved and saved["projection"].shape != 2 * param.shape[1:]:
                wanted, got = checks.describe(param), checks.describe(saved["projection"])
                raise ValueError(f"state_dict: expected a projection for {wanted}, got {got}")

        super().load_state_dict(state_dict)
        self._pending.clear()
        for group, kept in zip(self.param_groups, tensors, strict=True):
            for name, tensor in kept.items():  # captured graphs know these tensors, not new ones
                group[name] = tensor.copy_(torch.as_tensor(group[name]).reshape(tensor.shape))
        for param, saved in loaded:
            if "projection" in saved:
                # torch casts floating state to the parameter's dtype, leaves "step" where it is, and copies nothing.
                dtype = accumulate_dtype(param.dtype)
                dtypes = {"projection": dtype, "momentum_buffer": dtype, "step": torch.float32}
                for name in dtypes.keys() & saved.keys():
                    if saved[name] is not None:
                        self.state[param][name] = saved[name].to(param.device, dtypes[name], copy=True)
        self._observed.clear()
        for weight in projected:
            if "projection" not in self.state[weight]:
                warnings.warn(
                    "the loaded state has no projection for an attached weight: its P starts from the identity",
                    stacklevel=2,
                )
                self._project(weight, "weight")

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        own = {"backend": self.backend, "process_group": self.process_group}
        return super().__getstate__() | own | {name: {} for name in ("_observed", "_pending", "_checked_groups")}

    def _record(self, weight: Tensor, head: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        if not (head.training and torch.is_grad_enabled() and weight.requires_grad):
            return
        features = args[0] if args else kwargs["input"]
        if features.numel() > 0:
            features = features.detach().reshape(-1, features.shape[-1])
            self.observe(weight, features)
            if self._gains_by_factors(weight, features, output):
                self._observed[weight].keep_factors(features, output)

    def _gains_by_factors(self, weight: Tensor, features: Tensor, output: Tensor) -> bool:
        """Whether Δᵀ(X P), and the proof that the gradient is ΔᵀX, take clearly less work than G P."""
        (C, s), N = weight.shape, len(features)
        return (
            C >= CLASSES_FOR_FACTORS
            and N * (s + 4 * C) < 0.7 * C * s  # measured on one machine (benchmarks/NOTES.md)
            and type(weight) is nn.Parameter
            and weight.dtype == features.dtype == output.dtype == accumulate_dtype(weight.dtype)
            and self._observed[weight].count == N
            and not torch.compiler.is_compiling()
            and backends.choose(self.backend, weight.device) is backends.cpu
        )

    def _project(self, weight: Tensor, name: str) -> None:
        """Give `weight` a projection, if it has none yet."""
        if isinstance(weight, Tensor) and "projection" in self.state.get(weight, {}):
            return
        checks.check_tensor(name, weight, ("C", "s"))
        checks.check_nonempty(name, weight)
        group = next((g for g in self.param_groups if any(weight is param for param in g["params"])), None)
        if group is None:
            computed = "" if weight.is_leaf else " that is computed, as a parametrised module's is"
            raise ValueError(f"{name}: expected a parameter of this optimizer, got {checks.describe(weight)}{computed}")
        check_sharding(name, weight)
        dtype = accumulate_dtype(weight.dtype)
        state = self.state[weight]
        momentum_buffer = state.get("momentum_buffer")
        state["step"] = torch.zeros((), device=weight.device)
        if momentum_buffer is not None:  # it has stepped as a plain parameter before
            state["momentum_buffer"] = momentum_buffer.to(dtype)
            state["step"].fill_(1)
        elif _has_momentum(group):
            state["momentum_buffer"] = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        state["projection"] = _set_to_identity(torch.empty(2 * weight.shape[1:], dtype=dtype, device=weight.device))

    def _checked(self, index: int, group: dict[str, Any]) -> Hyperparameters:
        """The group's hyperparameters, checked anew when one of them is another object than at the last step."""
        known = None if torch.compiler.is_compiling() else self._checked_groups.get(index)
        if known is not None and all(getattr(known, name) is group[name] for name in _HYPERPARAMETERS):
            return known
        hyper = _hyperparameters(group)
        checks.check_hyperparameters(hyper)
        if not torch.compiler.is_compiling():
            self._checked_groups[index] = hyper
        return hyper

    def _pending_of(self, weight: Tensor, hyper: Hyperparameters) -> Pending | None:
        """Where the update of P can wait: in the CPU's kernels, with nothing but the rank-one update to make.

        With more classes than features the correction of G P costs more than the write of P.
        """
        waits = (
            weight.shape[0] <= weight.shape[1]
            and backends.choose(self.backend, weight.device) is backends.cpu
            and not torch.compiler.is_compiling()
        )
        if waits and not (hyper.normalize or isinstance(hyper.forget, Tensor) or hyper.forget != 0):
            if weight not in self._pending:
                self._pending[weight] = Pending.beside(self.state[weight]["projection"])
            return self._pending[weight]
        if weight in self._pending:
            self.settle()
            del self._pending[weight]
        return None

    def _plan(self) -> tuple[list[tuple], list[tuple[dict, list[Tensor]]]]:
        """The checked arguments of every head step, what else `ops.run_head_step_` takes, and the plain parameters.

        Weights, momentum and P keep their values; a momentum buffer that is needed for the first time is made.
        """
        heads: list[tuple[dict, Hyperparameters, Tensor]] = []
        plain: list[tuple[dict, list[Tensor]]] = []
        for index, group in enumerate(self.param_groups):
            hyper = self._checked(index, group)
            params = [param for param in group["params"] if param.grad is not None]
            heads += [(group, hyper, param) for param in params if "projection" in self.state.get(param, {})]
            plain.append((group, [param for param in params if "projection" not in self.state.get(param, {})]))

        observations = [self._observed.get(weight) for *_, weight in heads]
        means = [None if observation is None else observation.mean for observation in observations]
        if heads and self.process_group != "local" and dist.is_available() and dist.is_initialized():
            projections = [self.state[weight]["projection"] for *_, weight in heads]
            means = average_over_ranks(observations, projections, self.process_group)

        steps = []
        for (group, hyper, weight), mean, observation in zip(heads, means, observations, strict=True):
            state, dtype = self.state[weight], accumulate_dtype(weight.dtype)
            if state["projection"].dtype != dtype:  # the model was converted since
                self.settle()
                self._pending.pop(weight, None)
                for name in ("projection", "momentum_buffer"):
                    if state.get(name) is not None:
                        state[name] = state[name].to(dtype)
            if not _has_momentum(group):
                momentum_buffer = None
            elif state.get("momentum_buffer") is None:  # momentum was 0 until now
                momentum_buffer = state["momentum_buffer"] = torch.zeros_like(weight, dtype=dtype)
                state["step"].zero_()
            else:
                momentum_buffer = state["momentum_buffer"]
            shards = local_shards(weight, weight.grad, momentum_buffer)
            mean = None if mean is None else mean.to(dtype)
            # A step without momentum is none that the buffer has seen.
            step = torch.zeros_like(state["step"]) if momentum_buffer is None else state["step"]
            arguments = (*shards, state["projection"], mean, step, hyper)
            checks.check_head_step(*arguments)
            factors = None if observation is None else observation.factors_of(weight.grad)
            steps.append((arguments, (self._pending_of(weight, hyper), factors)))
        return steps, plain

    def _plain_step(
        self, group: dict[str, Any], params: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """torch.optim.SGD's own step. Only its fused kernel reads scale, overflow and (eagerly) lr on the device."""
        fused = group["fused"]
        if found_inf is not None and any(
            param.grad.is_sparse for param in params
        ):  # which its fused kernel cannot take
            if found_inf.item():
                return
            for param in params if grad_scale is not None else ():
                param.grad = param.grad / grad_scale
            grad_scale = found_inf = None
        elif found_inf is not None or (group["capturable"] and not torch.compiler.is_compiling()):
            fused = True
        if not fused:
            return self._sgd(group, params, fused, None, None)
        # The fused kernel takes momentum buffers that are all there or all to be made; those it makes even on overflow,
        # and leaves them uninitialised.
        is_new = [self.state.get(param, {}).get("momentum_buffer") is None for param in params]
        self._sgd(group, [p for p, new in zip(params, is_new, strict=True) if not new], True, grad_scale, found_inf)
        if not (_has_momentum(group) and any(is_new) and found_inf is not None and found_inf.item()):
            self._sgd(group, [p for p, new in zip(params, is_new, strict=True) if new], True, grad_scale, found_inf)

    def _sgd(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        fused: bool | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        buffers = [self.state[param].get("momentum_buffer") for param in params] if _has_momentum(group) else []
        sgd(
            params,
            [param.grad for param in params],
            buffers,
            has_sparse_grad=any(param.grad.is_sparse for param in params),
            foreach=None if fused else group["foreach"],
            fused=fused,
            grad_scale=grad_scale,
            found_inf=found_inf,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        for param, buffer in zip(params, buffers, strict=False):
            self.state[param]["momentum_buffer"] = buffer


def _hyperparameters(group: dict[str, Any]) -> Hyperparameters:
    return Hyperparameters(**{name: group[name] for name in _HYPERPARAMETERS})


def _has_momentum(group: dict[str, Any]) -> bool:
    return isinstance(group["momentum"], Tensor) or group["momentum"] != 0


def _set_to_identity(matrix: Tensor) -> Tensor:
    matrix.zero_().diagonal().fill_(1)
    return matrix
