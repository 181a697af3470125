"""What PyTorch's own suite checks of an optimizer, on the inputs that it ships (torch.testing._internal).

Five run through it: torch.optim.SGD as the control, ProjectedSGD and ProjectedAdamW with nothing attached, and each of
the two with every weight attached and fed before each step.
"""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from helpers import needs_gpu
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo

from mla_ext import ProjectedAdamW, ProjectedSGD
from mla_ext.projected import ProjectedOptimizer


class Attaching(ProjectedOptimizer):
    """Attaches every 2-D weight at construction, and feeds it the same batch before each step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for weight in self.weights():
            head = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            head.weight = weight
            self.attach(head)

    def weights(self):
        params = [p for group in self.param_groups for p in group["params"]]
        return [p for p in params if type(p) is nn.Parameter and p.dim() == 2 and p.is_floating_point() and p.numel()]

    def step(self, closure=None):
        for weight in self.weights():
            features = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device, dtype=torch.float32)
            self.observe(weight, features.view(2, -1).to(weight.dtype))
        with torch.no_grad():
            return inspect.unwrap(ProjectedOptimizer.step)(self, closure)  # its hooks are this method's already


class Attached(Attaching, ProjectedSGD):
    pass


class AttachedAdamW(Attaching, ProjectedAdamW):
    pass


def of_ours(error_inputs):
    """The same errors, in our words."""
    for each in error_inputs:
        if "lr" in each.optimizer_error_input.kwargs:
            each.error_type, each.error_regex = (TypeError, ValueError), "(lr|momentum|betas|weight_decay): expected"
    return error_inputs


CONTROL = next(info for info in common_optimizers.optim_db if info.optim_cls is SGD)
INFOS = [CONTROL] + [
    OptimizerInfo(
        cls,
        optim_inputs_func=CONTROL.optim_inputs_func,
        optim_error_inputs_func=lambda device, dtype: of_ours(CONTROL.optim_error_inputs_func(device, dtype)),
        scheduler_inputs=CONTROL.scheduler_inputs,
        supported_impls=("foreach", "fused"),  # not differentiable
        not_og_supported_flags=CONTROL.not_og_supported_flags,
        supports_sparse=True,
        metadata_for_sparse=CONTROL.metadata_for_sparse,
        supports_fused_on=("cpu", "cuda"),
    )
    for cls in (ProjectedSGD, Attached)
]
ADAMW = next(info for info in common_optimizers.optim_db if info.optim_cls is AdamW)
INFOS += [
    OptimizerInfo(
        cls,
        optim_inputs_func=ADAMW.optim_inputs_func,
        optim_error_inputs_func=lambda device, dtype: of_ours(ADAMW.optim_error_inputs_func(device, dtype)),
        scheduler_inputs=ADAMW.scheduler_inputs,
        supported_impls=("foreach", "fused"),
        not_og_supported_flags=ADAMW.not_og_supported_flags,
        supports_fused_on=("cpu", "cuda"),
    )
    for cls in (ProjectedAdamW, AttachedAdamW)
]


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are tiny, and threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def torchs(info):
    """The optimizer of torch that an unattached parameter steps as."""
    return AdamW if issubclass(info.optim_cls, AdamW) else SGD


def momentum_of(info):
    """Options with which there is a momentum, and its name in the state."""
    return ({}, "exp_avg") if issubclass(info.optim_cls, AdamW) else ({"momentum": 0.9}, "momentum_buffer")


def configurations(info, skip=("differentiable",)):
    inputs = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs("cpu", None, info, skip=skip)
    return [(each.desc, each.kwargs) for each in inputs]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def parameters(contiguous=True, dtype=torch.float32):
    """A weight and a bias."""
    weight = randn(6, 4, dtype=dtype) if contiguous else randn(4, 6, dtype=dtype).t()
    return nn.Parameter(weight), nn.Parameter(randn(6, seed=1, dtype=dtype))


def loss_of(weight, bias):
    return (weight @ randn(4, seed=2, dtype=weight.dtype) + bias).pow(2).sum()


def steps(optimizer, params, number=3, schedulers=()):
    losses = []
    for _ in range(number):

        def closure():
            optimizer.zero_grad()
            loss = loss_of(*params)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        for scheduler in schedulers:
            scheduler.step(*([losses[-1]] if isinstance(scheduler, ReduceLROnPlateau) else []))
    return losses


def trained(info, options, number=3, params=None):
    params = params or parameters()
    optimizer = info.optim_cls(params, **options)
    steps(optimizer, params, number)
    return params, optimizer


def another(info, options, params, dtype=None):
    """Another optimizer, for copies of the parameters."""
    others = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in params]
    return others, info.optim_cls(others, **options)


def assert_equal(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), **({"rtol": 0, "atol": 0} | tolerance))


def assert_same_steps(*pairs):
    """Two optimizers, each with its parameters, go on to the same bits."""
    for optimizer, params in pairs:
        steps(optimizer, params)
    assert_equal(*(params for _, params in pairs))


def state_of(optimizer):
    state = optimizer.state_dict()["state"]
    return {(index, name): value for index, values in state.items() for name, value in values.items()}


def assert_same_state(ours, theirs):
    a, b = state_of(ours), state_of(theirs)
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, b[key], rtol=0, atol=0)
        else:
            assert value == b[key]


def test_the_database_names_no_flags_that_exclude_each_other():
    for info in INFOS:
        assert not any(
            {"foreach", "fused", "differentiable"} & each.kwargs.keys() for each in info.optim_inputs_func("cpu")
        )


# --- construction


@every
def test_errors(info):
    for each in info.optim_error_inputs_func("cpu", torch.float32):
        given = each.optimizer_error_input
        params = parameters() if given.params is None else given.params
        assert each.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        if each.error_type is UserWarning:
            with pytest.warns(UserWarning, match=each.error_regex):
                info.optim_cls(params, **given.kwargs)
        else:
            with pytest.raises(each.error_type, match=each.error_regex):
                info.optim_cls(params, **given.kwargs)


@every
def test_it_is_printed(info):
    for _, options in configurations(info):
        params, optimizer = trained(info, options)
        text = repr(optimizer)
        assert info.optim_cls.__name__ in text and all(name in text for name in options)
        assert "Parameter Group 0" in text and len(params) == 2


# --- steps


@every
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_loss_goes_the_right_way(info, contiguous):
    for desc, options in configurations(info):
        for schedulers in [(), *info.scheduler_inputs][:: 1 if contiguous else 7]:
            params = parameters(contiguous)
            optimizer = info.optim_cls(params, **options)
            losses = steps(optimizer, params, 10, [make(optimizer) for make in schedulers])
            assert (losses[-1] > losses[0]) == options.get("maximize", False), desc


@every
def test_groups_with_schedulers(info):
    for desc, options in configurations(info):
        for schedulers in info.scheduler_inputs:
            params = parameters()
            optimizer = info.optim_cls([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.01}], **options)
            losses = steps(optimizer, params, 5, [make(optimizer) for make in schedulers])
            assert (losses[-1] > losses[0]) == options.get("maximize", False), desc


@every
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("schedulers", [(), CONTROL.scheduler_inputs[2]], ids=["constant", "scheduled"])
def test_a_tensor_lr_is_its_number(info, shape, schedulers):
    for desc, options in configurations(info):
        results = []
        for lr in (0.01, torch.full(shape, 0.01)):
            params = parameters()
            optimizer = info.optim_cls(params, **(options | {"lr": lr}))
            steps(optimizer, params, 5, [make(optimizer) for make in schedulers])
            assert isinstance(optimizer.param_groups[0]["lr"], type(lr)), desc
            results.append(params)
        assert_equal(*results, rtol=1e-6, atol=1e-6)


@every
def test_groups_have_their_own_lr_and_weight_decay(info):
    for desc, options in configurations(info):
        frozen, decayed = parameters(), parameters()
        optimizer = info.optim_cls([{"params": [frozen[0]], "lr": 0.0}, {"params": [frozen[1]]}], **options)
        steps(optimizer, frozen)
        assert torch.equal(frozen[0], parameters()[0]) and not torch.equal(frozen[1], parameters()[1]), desc

        if options.get("maximize") or options.get("nesterov"):
            continue
        options = options | {"weight_decay": 0.0, "lr": 0.1}
        optimizer = info.optim_cls([{"params": [decayed[0]], "weight_decay": 0.9}, {"params": [decayed[1]]}], **options)
        for p in decayed:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert decayed[0].norm() < parameters()[0].norm() and torch.equal(decayed[1], parameters()[1]), desc


@every
def test_a_step_without_gradients_does_nothing(info):
    for desc, options in configurations(info):
        params, optimizer = trained(info, options)
        before, state = [p.detach().clone() for p in params], copy.deepcopy(state_of(optimizer))
        optimizer.zero_grad()
        optimizer.step()
        assert_equal(params, before)
        after = state_of(optimizer)
        assert state.keys() == after.keys(), desc
        for key, value in state.items():
            torch.testing.assert_close(value, after[key], rtol=0, atol=0)


@every
def test_a_step_with_zero_gradients_does_nothing(info):
    for desc, options in configurations(info):
        params = parameters()
        optimizer = info.optim_cls(params, **(options | {"weight_decay": 0.0}))
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert_equal(params, parameters()), desc


@every
def test_parameters_that_are_frozen_or_empty_or_alone(info):
    for desc, options in configurations(info):
        weight, bias = parameters()
        empty, frozen = nn.Parameter(torch.empty(0, 3)), nn.Parameter(randn(3, 2), requires_grad=False)
        optimizer = info.optim_cls([weight, empty, frozen, bias], **options)
        empty.grad = torch.empty(0, 3)
        loss_of(weight, bias).backward()
        optimizer.step()
        expected, _ = trained(info, options, 1)
        assert_equal([weight, bias], expected)
        assert torch.equal(frozen, randn(3, 2)), desc


@every
def test_closures(info):
    for _, options in configurations(info):
        params = parameters()
        optimizer, calls = info.optim_cls(params, **options), []

        def closure(optimizer=optimizer, params=params, calls=calls):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = loss_of(*params)
            loss.backward()
            return loss

        assert optimizer.step(closure) == loss_of(*parameters()) and calls == [True]
        assert optimizer.step() is None


@every
@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_kernels_do_the_same(info, flag, dtype):
    for each in info.optim_inputs_func("cpu"):
        results = []
        for value in (False, True):
            params = parameters(dtype=dtype)
            trained(info, each.kwargs | {flag: value}, 7, params)
            results.append(params)
        assert_equal(*results, rtol=1e-5, atol=1e-6)


@every
def test_parameters_of_many_dtypes(info):
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    for desc, options in configurations(info):
        options = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        together = [nn.Parameter(randn(4, 3, dtype=dtype)) for dtype in dtypes]
        alone = [nn.Parameter(p.detach().clone()) for p in together]
        joined = info.optim_cls(together, **options)
        single = [info.optim_cls([p], **options) for p in alone]
        for seed in range(3):
            for p, q in zip(together, alone, strict=True):
                p.grad = randn(4, 3, seed=seed, dtype=p.dtype)
                q.grad = p.grad.clone()
            for optimizer in (joined, *single):
                optimizer.step()
        assert_equal(together, alone), desc


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_default_dtype(info, dtype):
    for _, options in configurations(info):
        expected, _ = trained(info, options)
        before = torch.get_default_dtype()
        params = parameters()
        torch.set_default_dtype(dtype)
        try:
            trained(info, options, params=params)
        finally:
            torch.set_default_dtype(before)
        assert_equal(params, expected)


@every
@pytest.mark.parametrize("shape", [(5,), (4, 3)])
def test_complex_parameters_step_as_their_two_parts(info, shape):
    for desc, options in configurations(info):
        if options.get("fused"):
            continue  # torch has no fused kernels for complex numbers
        value = torch.complex(randn(*shape), randn(*shape, seed=1))
        whole = nn.Parameter(value.clone())
        parts = [nn.Parameter(value.real.clone()), nn.Parameter(value.imag.clone())]
        optimizer, other = info.optim_cls([whole], **options), torchs(info)(parts, **options)
        for seed in range(3):
            grad = torch.complex(randn(*shape, seed=2 * seed), randn(*shape, seed=2 * seed + 1))
            whole.grad, parts[0].grad, parts[1].grad = grad, grad.real.clone(), grad.imag.clone()
            optimizer.step()
            other.step()
        assert_equal([whole.real, whole.imag], parts, rtol=1e-6, atol=1e-6), desc


@pytest.mark.parametrize("info", [info for info in INFOS if info.supports_sparse], ids=lambda info: info.name)
def test_sparse_gradients_step_as_dense_ones(info):
    options, makers = info.metadata_for_sparse
    results = []
    for sparse in (True, False):
        table = nn.Parameter(randn(6, 3))
        optimizer = SGD([table], **options) if info.optim_cls is Attached else info.optim_cls([table], **options)
        schedulers = [make(optimizer) for make in makers]
        for seed in range(4):
            rows = randn(2, 3, seed=seed)
            grad = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), rows, (6, 3), check_invariants=True).coalesce()
            table.grad = grad if sparse else grad.to_dense()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
        results.append([table])
    assert_equal(*results, rtol=1e-6, atol=1e-6)


@every
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_fused_step_honours_scale_and_overflow(info, shape):
    for each in info.optim_inputs_func("cpu"):
        options = each.kwargs | {"fused": True}
        results = []
        for scale in (1.0, 8.0):
            params, optimizer = trained(info, options, 1)
            optimizer.zero_grad()
            (scale * loss_of(*params)).backward()
            before = [p.detach().clone() for p in params]
            optimizer.grad_scale, optimizer.found_inf = torch.full(shape, scale), torch.ones(shape)
            optimizer.step()
            assert_equal(params, before)
            optimizer.found_inf = torch.zeros(shape)
            optimizer.step()
            results.append(params)
        assert_equal(*results, rtol=1e-5, atol=1e-6)


# --- state


@every
@pytest.mark.parametrize("names", [(False, False), (True, True), (True, False), (False, True)], ids=str)
def test_a_loaded_state_goes_on_to_the_bit(info, names):
    for desc, options in configurations(info):

        def make(params, named, options=options):
            return info.optim_cls([*zip(("weight", "bias"), params, strict=True)] if named else params, **options)

        params = parameters()
        optimizer = make(params, names[0])
        steps(optimizer, params)
        saved = copy.deepcopy(optimizer.state_dict())
        assert ("param_names" in saved["param_groups"][0]) == names[0]
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = make(others, names[1])
        other.load_state_dict(saved)
        assert_same_state(optimizer, other)
        assert ("param_names" in other.param_groups[0]) == any(names), desc
        assert_same_steps((optimizer, params), (other, others))
        assert_same_state(optimizer, other)


@every
def test_older_states_lack_flags(info):
    for desc, options in configurations(info):
        params, optimizer = trained(info, options)
        saved = copy.deepcopy(optimizer.state_dict())
        flags = [flag for flag in info.not_og_supported_flags if flag in saved["param_groups"][0]]
        assert {"foreach", "maximize", "fused"} <= set(flags), desc
        for flag in flags:
            del saved["param_groups"][0][flag]
        optimizer.load_state_dict(saved)
        assert all(flag in optimizer.param_groups[0] for flag in flags if flag != "capturable")
        steps(optimizer, params)


@every
def test_a_state_in_a_file(info):
    for desc, options in configurations(info):
        params, optimizer = trained(info, options)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        read = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        assert read.keys() == {"state", "param_groups"}, desc
        others, other = another(info, options, params)
        other.load_state_dict(read)
        assert_same_state(optimizer, other)
        assert_same_steps((optimizer, params), (other, others))


@every
def test_steps_may_be_numbers(info):
    for desc, options in configurations(info):
        params, optimizer = trained(info, options)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            if "step" in state:
                state["step"] = state["step"].item()
        others, other = another(info, options, params)
        other.load_state_dict(saved)
        assert_same_steps((optimizer, params), (other, others)), desc


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_is_loaded_into_another_dtype(info, dtype):
    for desc, options in configurations(info):
        params, optimizer = trained(info, options)
        others, other = another(info, options, params, dtype)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(other, others)
        assert state_of(optimizer).keys() == state_of(other).keys(), desc
        assert all(p.dtype == dtype and p.isfinite().all() for p in others)


@every
@needs_gpu
def test_a_state_is_loaded_onto_another_device(info):
    for _, options in configurations(info):
        params, optimizer = trained(info, options)
        others = [nn.Parameter(p.detach().cuda()) for p in params]
        other = info.optim_cls(others, **(options | {"lr": 0.01}))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for key, value in state_of(other).items():
            assert not isinstance(value, torch.Tensor) or key[1] == "step" or value.is_cuda


@every
def test_copies(info):
    for desc, options in configurations(info):
        params, optimizer = trained(info, options)
        for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
            others, other = duplicate((params, optimizer))
            public = {name for name in vars(optimizer) if not name.startswith("_")}
            assert public <= vars(other).keys(), desc
            assert_same_state(optimizer, other)
            mine, its = copy.deepcopy((params, optimizer))
            assert_same_steps((its, mine), (other, others))


@every
def test_groups_are_added(info):
    for desc, options in configurations(info):
        weight, bias = parameters()
        optimizer = info.optim_cls([weight], **options)
        optimizer.add_param_group({"params": [bias], "lr": 0.5})
        assert len(optimizer.param_groups) == 2 and optimizer.param_groups[1]["lr"] == 0.5, desc
        assert all(optimizer.param_groups[1][name] == value for name, value in options.items() if name != "lr")
        steps(optimizer, (weight, bias))
        for set_to_none in (False, True):
            optimizer.zero_grad(set_to_none=set_to_none)
            assert (weight.grad is None) == set_to_none


@every
def test_momentum_makes_state_for_all(info):
    options, name = momentum_of(info)
    params, optimizer = trained(info, options, 1)
    assert all(optimizer.state[p][name].shape == p.shape for p in params)


# --- hooks


@every
def test_step_hooks(info):
    _, optimizer = trained(info, {})
    seen = []

    def hook(name):
        return lambda *arguments: seen.append((name, type(arguments[0])))

    handles = [
        register_optimizer_step_pre_hook(hook("all before")),
        register_optimizer_step_post_hook(hook("all after")),
        optimizer.register_step_pre_hook(hook("before")),
        optimizer.register_step_post_hook(hook("after")),
    ]
    order = ["all before", "before", "after", "all after"]
    try:
        optimizer.step()
        assert [name for name, _ in seen] in (order, [order[0], order[1], order[3], order[2]])
        assert all(cls is info.optim_cls for _, cls in seen)
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert len(seen) == 4


@every
def test_a_step_pre_hook_may_change_the_closure(info):
    _, optimizer = trained(info, {})
    optimizer.register_step_pre_hook(lambda it, args, kwargs: ((it, lambda: 7.0), {}))
    assert optimizer.step(lambda: 1.0) == 7.0


@every
def test_state_dict_hooks(info):
    _, optimizer = trained(info, momentum_of(info)[0])
    order = []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda it: order.append("before")),
        optimizer.register_state_dict_post_hook(lambda it, state: order.append("after")),
        optimizer.register_state_dict_post_hook(lambda it, state: state | {"more": 1}),
        optimizer.register_state_dict_pre_hook(lambda it: order.append("first"), prepend=True),
    ]
    state = optimizer.state_dict()
    assert order == ["first", "before", "after"] and state["more"] == 1
    for handle in handles:
        handle.remove()
    assert "more" not in optimizer.state_dict() and len(order) == 3


@every
def test_load_state_dict_hooks(info):
    _, optimizer = trained(info, {"lr": 0.01} | momentum_of(info)[0])
    saved, order = copy.deepcopy(optimizer.state_dict()), []

    def doubled(it, state):
        order.append("double")
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] *= 2
        return state

    handles = [
        optimizer.register_load_state_dict_pre_hook(doubled),
        optimizer.register_load_state_dict_pre_hook(lambda it, state: order.append("first"), prepend=True),
        optimizer.register_load_state_dict_post_hook(lambda it: order.append("after")),
        optimizer.register_load_state_dict_post_hook(lambda it: order.append("sooner"), prepend=True),
    ]
    optimizer.load_state_dict(saved)
    assert order == ["first", "double", "sooner", "after"]
    assert optimizer.param_groups[0]["lr"] == 0.02 and saved["param_groups"][0]["lr"] == 0.01
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(saved)
    assert len(order) == 4 and optimizer.param_groups[0]["lr"] == 0.01


@every
def test_a_subclass_that_knows_nothing_of_ours(info):
    """PyTorch asks that subclasses need not call anything but Optimizer's own methods."""

    class Mine(info.optim_cls):
        pass

    params = parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Mine(params)
        steps(optimizer, params)
    assert isinstance(optimizer, Optimizer)
    assert_equal(params, trained(info, {})[0])
