"""ProjectedSGD in any order of calls, against the reference in float64.

A machine does what programs do with an optimizer, in sequences that hypothesis draws, with three heads, a plain layer
and biases. Two shadows made of mla_ext/reference.py see the same features and gradients, one in float64, one in the
dtype of the weights; after every call the optimizer is at most twice as far from the first as the second (parity.py).
Only public methods are used, so how the optimizer keeps P is its own affair.
"""

from __future__ import annotations

import collections
import copy
import gc
import io
import os
import pickle
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from parity import assert_as_accurate
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from mla_ext import ProjectedSGD, reference
from mla_ext.reference import Hyperparameters, accumulate_dtype

# How many sequences `make fuzz` runs; the tests run few, always the same.
EXAMPLES = int(os.environ.get("MLA_EXT_STATE_MACHINES", "0"))
HEADS = {"first": (5, 3), "second": (4, 2), "third": (6, 2)}  # name: (s, C); the third comes with a group of its own
# bfloat16 keeps 8 bits: where a rounding falls the other way, a weight is off by 2⁻⁸ of the largest.
TINY = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-7}
BETWEEN = {
    "lr": st.sampled_from([0.0, 0.05, 0.2]),
    "alpha": st.sampled_from([0.01, 0.1, 3.0]),
    "forget": st.sampled_from([0.0, 0.05, 1.0]),
    "momentum": st.sampled_from([0.0, 0.5, 0.9]),
    "dampening": st.sampled_from([0.0, 0.4]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "normalize": st.booleans(),
    "absorb": st.sampled_from(["after", "before"]),
    "maximize": st.booleans(),
}
NAMES = st.sampled_from(sorted(HEADS))


@dataclass
class Shadow:
    """What the optimizer should hold for one parameter, computed by the reference in the dtype of `value`."""

    value: Tensor
    P: Tensor | None = None
    buffer: Tensor | None = None

    def project(self) -> None:
        if self.P is None:
            self.P = torch.eye(self.value.shape[1], dtype=accumulate_dtype(self.value.dtype))
            self.buffer = None if self.buffer is None else self.buffer.to(self.P.dtype)

    def step(self, grad: Tensor, mean: Tensor | None, hyper: Hyperparameters) -> None:
        is_first = self.buffer is None
        if self.P is None:
            return self.plain_step(grad, is_first, hyper)
        if is_first and hyper.momentum:
            self.buffer = torch.zeros_like(self.value, dtype=self.P.dtype)
        buffer = self.buffer if hyper.momentum else None
        mean = None if mean is None else mean.to(self.P.dtype)
        taken = torch.tensor(0.0 if is_first else 1.0)
        self.value, buffer, self.P = reference.head_step(self.value, grad, buffer, self.P, mean, taken, hyper)
        self.buffer = buffer if hyper.momentum else self.buffer

    def plain_step(self, grad: Tensor, is_first: bool, hyper: Hyperparameters) -> None:
        """torch.optim.SGD's."""
        grad = (-grad if hyper.maximize else grad) + hyper.weight_decay * self.value
        if hyper.momentum:
            self.buffer = grad if is_first else hyper.momentum * self.buffer + (1 - hyper.dampening) * grad
            grad = grad + hyper.momentum * self.buffer if hyper.nesterov else self.buffer
        self.value = self.value - hyper.lr * grad


@dataclass
class Parameter:
    """A parameter's two shadows, and the rows of features that its head has been fed since the last step."""

    exact: Shadow
    plain: Shadow
    fed: list[Tensor] = field(default_factory=list)

    def both(self) -> tuple[Shadow, Shadow]:
        return self.exact, self.plain


class Machine(RuleBasedStateMachine):
    @initialize(
        dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
        options=st.fixed_dictionaries({}, optional=BETWEEN),
        nesterov=st.booleans(),
    )
    def start(self, dtype, options, nesterov):
        torch.manual_seed(0)
        self.dtype, self.batches, self.saved, self.kept = dtype, 0, None, None
        layers = HEADS | {"plain": (4, 3)}
        self.modules = nn.ModuleDict({name: nn.Linear(*shape) for name, shape in layers.items()})
        self.modules.to(dtype)
        if nesterov:
            options |= {"momentum": 0.9, "dampening": 0.0, "nesterov": True}
        self.options = {"lr": 0.1, "alpha_scale": None} | options
        self.optimizer = self.make_optimizer()
        self.attached: set[str] = set()  # by a hook
        self.projected: set[str] = set()  # attached or observed since the optimizer was made
        self.parameters = {
            name: Parameter(Shadow(p.detach().double()), Shadow(p.detach().clone()))
            for name, p in self.modules.named_parameters()
        }
        self.grouped = 1

    def make_optimizer(self):
        first = [p for name, module in self.modules.items() if name != "third" for p in module.parameters()]
        return ProjectedSGD(first, **self.options)

    def weight(self, name):
        return self.modules[name].weight

    def features(self, name, rows):
        self.batches += 1
        generator = torch.Generator().manual_seed(self.batches)
        shape = self.modules[name].in_features
        return (torch.randn(rows, shape, generator=generator) + 0.3).to(self.dtype)

    def in_a_group(self, name):
        return name != "third" or self.grouped > 1

    # --- what is fed

    @rule(name=NAMES)
    def attach(self, name):
        if not self.in_a_group(name):
            with pytest.raises(ValueError, match="expected a parameter of this optimizer"):
                self.optimizer.attach(self.modules[name])
        elif name not in self.attached:
            self.optimizer.attach(self.modules[name])
            self.attached.add(name)
            self.project(name)

    @rule(name=NAMES)
    def remove_hook(self, name):
        for hook in list(self.modules[name]._forward_hooks):
            del self.modules[name]._forward_hooks[hook]  # as handle.remove() does
        self.attached.discard(name)

    def project(self, name):
        self.projected.add(name)
        for shadow in self.parameters[f"{name}.weight"].both():
            shadow.project()

    @rule(name=NAMES, rows=st.integers(1, 4))
    def observe(self, name, rows):
        if self.in_a_group(name):
            features = self.features(name, rows)
            self.optimizer.observe(self.weight(name), features)
            self.project(name)
            self.parameters[f"{name}.weight"].fed.append(features)

    @rule(
        name=st.sampled_from([*HEADS, "plain"]), rows=st.integers(1, 4), backward=st.sampled_from([True, True, False])
    )
    def forward(self, name, rows, backward):
        features = self.features(name, rows)
        out = self.modules[name](features)
        if name in self.attached:
            self.parameters[f"{name}.weight"].fed.append(features)
        if backward:
            errors = torch.randn(out.shape, generator=torch.Generator().manual_seed(self.batches))
            out.backward(errors.to(self.dtype))

    @rule(name=NAMES, training=st.booleans())
    def forward_that_is_not_recorded(self, name, training):
        self.modules.train(training)
        with torch.set_grad_enabled(not training):
            self.modules[name](self.features(name, 2))
        self.modules.train()

    # --- steps

    @rule(strided=st.booleans())
    def step(self, strided):
        grads = self.grads()
        for p in self.modules.parameters() if strided else ():
            if p.grad is not None and p.dim() == 2:
                p.grad = p.grad.t().contiguous().t()
        self.optimizer.step()
        self.step_shadows(grads)
        for name, p in self.modules.named_parameters():
            p.grad = grads[name]  # autograd wants them laid out as the weights

    @rule(scale=st.sampled_from([0.25, 1024.0]), overflow=st.booleans())
    def step_as_grad_scaler_does(self, scale, overflow):
        """It sets grad_scale and found_inf for the length of the call."""
        before, grads = self.bits(), self.grads()
        for p in self.modules.parameters():
            if p.grad is not None:
                p.grad *= scale
        self.optimizer.grad_scale = torch.tensor(scale)
        self.optimizer.found_inf = torch.tensor(float(overflow))
        self.optimizer.step()
        del self.optimizer.grad_scale, self.optimizer.found_inf
        if overflow:
            assert self.same(before, self.bits())
            self.forget_features()
        else:
            self.step_shadows(grads)
        self.optimizer.zero_grad()

    def grads(self):
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.modules.named_parameters()}

    def step_shadows(self, grads):
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for name, p in self.modules.named_parameters():
            parameter = self.parameters[name]
            if id(p) in groups and grads[name] is not None:
                group = groups[id(p)]
                hyper = Hyperparameters(**{f: group[f] for f in Hyperparameters.__dataclass_fields__})
                for shadow in parameter.both():
                    rows = torch.cat(parameter.fed).to(shadow.value.dtype) if parameter.fed else None
                    mean = None if rows is None else reference.feature_mean(rows)
                    shadow.step(grads[name].to(shadow.value.dtype), mean, hyper)
        self.forget_features()

    def forget_features(self):
        for parameter in self.parameters.values():
            parameter.fed.clear()

    @rule(how=st.sampled_from(["lr", "sparse", "closure"]))
    def failed_step(self, how):
        before = self.bits()
        group, weight = self.optimizer.param_groups[0], self.weight("first")
        kept = group["lr"], weight.grad
        if how == "lr":
            group["lr"] = float("nan")
            with pytest.raises(ValueError, match="lr: expected a finite number"):
                self.optimizer.step()
        elif how == "closure":
            with pytest.raises(KeyError):
                self.optimizer.step(lambda: {}["loss"])
        elif self.parameters["first.weight"].plain.P is not None:
            weight.grad = torch.ones_like(weight).to_sparse()
            with pytest.raises(TypeError, match="grad: expected a dense"):
                self.optimizer.step()
        else:
            return
        group["lr"], weight.grad = kept
        assert self.same(before, self.bits())
        self.forget_features()

    @rule()
    def zero_grad(self):
        self.optimizer.zero_grad()

    # --- changes in mid-run

    @rule(change=st.sampled_from(sorted(BETWEEN)).flatmap(lambda name: st.tuples(st.just(name), BETWEEN[name])))
    def change_hyperparameter(self, change):
        name, value = change
        for group in self.optimizer.param_groups:
            if not (group["nesterov"] and name in ("momentum", "dampening")):
                group[name] = value

    @rule()
    def reset_projection(self):
        self.optimizer.reset_projection()
        for parameter in self.parameters.values():
            for shadow in parameter.both():
                if shadow.P is not None:
                    shadow.P = torch.eye(len(shadow.P), dtype=shadow.P.dtype)

    @precondition(lambda self: self.grouped == 1)
    @rule(alpha=BETWEEN["alpha"])
    def add_param_group(self, alpha):
        self.optimizer.add_param_group({"params": self.modules["third"].parameters(), "alpha": alpha})
        self.grouped = 2

    # --- what others do to the state

    @rule(how=st.sampled_from(["cleared", "replaced", "taken out"]))
    def empty_the_state(self, how):
        if how == "cleared":
            self.optimizer.state.clear()
        elif how == "replaced":
            self.optimizer.state = collections.defaultdict(dict)
        else:
            for p in self.modules.parameters():
                self.optimizer.state.pop(p, None)
        self.forget_state(self.projected)

    def forget_state(self, projected):
        for name, parameter in self.parameters.items():
            for shadow in parameter.both():
                shadow.P = shadow.buffer = None
                if name.removesuffix(".weight") in projected:
                    shadow.project()

    @rule()
    def keep_the_state(self):
        self.kept = (
            {p: copy.deepcopy(state) for p, state in self.optimizer.state.items()},
            {name: [(shadow.P, shadow.buffer) for shadow in p.both()] for name, p in self.parameters.items()},
        )

    @precondition(lambda self: self.kept is not None)
    @rule()
    def put_the_state_back(self):
        """A new dict with what an older one held; the weights stay as they are."""
        state, shadows = copy.deepcopy(list(self.kept[0].values())), copy.deepcopy(self.kept[1])
        self.optimizer.state = collections.defaultdict(dict, zip(self.kept[0], state, strict=True))
        for name, p in self.parameters.items():
            for shadow, (P, buffer) in zip(p.both(), shadows[name], strict=True):
                shadow.P, shadow.buffer = P, buffer
                if name.removesuffix(".weight") in self.projected:
                    shadow.project()

    # --- what others do to the model

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def convert(self, dtype):
        before = self.bits()
        self.modules.to(dtype)
        for name, p in self.modules.named_parameters():  # torch.optim.SGD's buffers do not follow their parameters
            state = self.optimizer.state.get(p, {})
            if self.parameters[name].plain.P is None and state.get("momentum_buffer") is not None:
                state["momentum_buffer"] = state["momentum_buffer"].to(dtype)
        for old, new in zip(before, self.bits(), strict=True):
            assert torch.equal(old.to(new.dtype), new)
        self.dtype, self.saved, self.kept = dtype, None, None
        # The shadows go on from what is there: the error that the old dtype made is not the new one's.
        for name, p in self.modules.named_parameters():
            parameter = self.parameters[name]
            parameter.fed = [rows.to(dtype) for rows in parameter.fed]
            buffer = self.optimizer.state.get(p, {}).get("momentum_buffer")
            P = None if parameter.plain.P is None else self.optimizer.projection(p)
            wide = p.dtype if P is None else accumulate_dtype(p.dtype)
            parameter.plain = Shadow(
                p.detach().clone(), None if P is None else P.to(wide), None if buffer is None else buffer.to(wide)
            )
            parameter.exact = Shadow(
                p.detach().double(), None if P is None else P.double(), None if buffer is None else buffer.double()
            )

    @rule(strided=st.booleans())
    def move(self, strided):
        """The parameters stay, and their numbers lie elsewhere, in another order of memory if strided."""
        for p in self.modules.parameters():
            p.data = p.data.t().contiguous().t() if strided and p.dim() == 2 else p.data.clone()

    @rule(attach=st.booleans())
    def make_the_optimizer_again(self, attach):
        """As a second call of a trainer does; the hooks of the first one are still there."""
        gone = weakref.ref(self.optimizer)
        self.optimizer = self.make_optimizer()
        gc.collect()
        assert gone() is None
        self.start_anew(self.attached if attach else set())
        self.forget_state(self.projected)

    def start_anew(self, attached):
        """After self.optimizer was made."""
        if self.grouped > 1:
            self.optimizer.add_param_group({"params": self.modules["third"].parameters()})
        self.attached, self.projected = set(attached), set(attached)
        for name in attached:
            self.optimizer.attach(self.modules[name])
        self.forget_features()
        self.kept = None

    # --- copies

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, how):
        pair = self.modules, self.optimizer
        grads = self.grads()
        self.modules, self.optimizer = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        for name, p in self.modules.named_parameters():
            p.grad = grads[name]
        self.forget_features()  # a copy has not been fed
        self.kept = None

    @rule(by=st.sampled_from(["torch", "dcp"]))
    def save(self, by):
        state = self.state_of_dcp() if by == "dcp" else self.optimizer.state_dict()
        file = io.BytesIO()
        torch.save([self.modules.state_dict(), state], file)
        # A weight that was never stepped has no P in the file: it is the identity.
        names = self.modules.named_parameters()
        in_file = {name for name, p in names if {"base", "beta"} & {*self.optimizer.state.get(p, {})}}
        self.saved = by, file.getvalue(), copy.deepcopy(self.parameters), self.grouped, in_file

    def state_of_dcp(self):
        self.before_dcp()
        return get_optimizer_state_dict(self.modules, self.optimizer)

    def before_dcp(self):
        """torch makes a state that it finds empty, by a step with zero gradients and lr 0."""
        if not self.optimizer.state and all(p.grad is None for g in self.optimizer.param_groups for p in g["params"]):
            kept = [group["lr"] for group in self.optimizer.param_groups]
            ours = {p for group in self.optimizer.param_groups for p in group["params"]}
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
            named = self.modules.named_parameters()
            self.step_shadows({name: torch.zeros_like(p) if p in ours else None for name, p in named})
            for group, lr in zip(self.optimizer.param_groups, kept, strict=True):
                group["lr"] = lr

    @precondition(lambda self: self.saved is not None and self.saved[3] == self.grouped)
    @rule(anew=st.booleans())
    def load(self, anew):
        """Into the optimizer as it is, or into a new one, with the same heads attached."""
        by, file, parameters, _, in_file = self.saved
        modules, state = torch.load(io.BytesIO(file), weights_only=True)
        if anew:
            fresh = nn.ModuleDict({name: nn.Linear(m.in_features, m.out_features) for name, m in self.modules.items()})
            self.modules = fresh.to(self.dtype)
            self.optimizer = self.make_optimizer()
            self.start_anew(self.attached)
        self.modules.load_state_dict(modules)
        if by == "dcp":
            options = StateDictOptions(strict=False)  # a parameter that has not stepped has no state
            set_optimizer_state_dict(self.modules, self.optimizer, state, options=options)
        else:
            self.optimizer.load_state_dict(state)
        self.parameters = copy.deepcopy(parameters)
        for name, parameter in self.parameters.items():
            is_known = name.removesuffix(".weight") in self.projected
            for shadow in parameter.both():
                if is_known:
                    shadow.project()
                elif name not in in_file:
                    shadow.P = None
        self.forget_features()

    # --- what must hold

    def bits(self):
        projections = [
            self.optimizer.projection(self.weight(name))
            for name in HEADS
            if self.parameters[f"{name}.weight"].plain.P is not None
        ]
        return [p.detach().clone() for p in self.modules.parameters()] + projections

    def same(self, before, after):
        return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    @invariant()
    def agrees(self):
        tiny = TINY[self.dtype]
        for name, p in self.modules.named_parameters():
            exact, plain = self.parameters[name].both()
            assert_as_accurate(p.detach(), plain.value, exact.value, tiny)
            if plain.P is not None:
                P = self.optimizer.projection(p)
                assert torch.equal(P, P.T), f"P of {name} is not symmetric"
                assert_as_accurate(P, plain.P, exact.P, tiny)


@pytest.mark.filterwarnings(
    "ignore:an attached weight has gradients and no features",
    "ignore:the loaded state has no projection",
    "ignore:grad and param do not obey the gradient layout",  # torch's, of weights that were moved
)
def test_any_order_of_calls():
    common = {"deadline": None, "stateful_step_count": 40, "suppress_health_check": list(HealthCheck)}
    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=EXAMPLES, **common)
        if EXAMPLES
        else settings(max_examples=30, derandomize=True, database=None, **common),
    )
