"""Reports of other people's optimizers, tried on ours: numbers and devices. Numbered as the reports were.

The rules: nothing global or foreign in type changes what a step does, and a hook of ours never makes a forward fail
that works without it.
"""

import contextlib
import copy
import functools
import warnings

import numpy
import pytest
import torch
from attached import assert_same_bits, attached, backward, bits, network, train
from helpers import needs_gpu
from torch import nn
from torch.utils.checkpoint import checkpoint

# --- 8: global settings


@contextlib.contextmanager
def set_for_a_while(get, set_, value):
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


default_dtype = functools.partial(set_for_a_while, torch.get_default_dtype, torch.set_default_dtype)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def poisoned_memory():
    """PyTorch fills what torch.empty gives with NaN in its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


GLOBALS = {
    "float64": lambda: default_dtype(torch.float64),  # 8
    "float16": lambda: default_dtype(torch.float16),  # of the kind of 8
    "meta": lambda: default_device("meta"),  # 8 and 10
    "deterministic": poisoned_memory,  # of the kind of 8
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16, enabled=True),  # of the kind of 8: only the step in it
}


def train_with_steps_inside(context, model, optimizer, steps):
    for seed in range(steps):
        optimizer.zero_grad()
        backward(model, seed)
        with context():
            optimizer.step()


@pytest.mark.parametrize("features", [8, 300])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("setting", GLOBALS)
def test_global_settings_change_nothing(setting, momentum, features):
    context = GLOBALS[setting]
    plain, its = attached(features=features, momentum=momentum)
    train(plain, its, 20)
    if setting == "autocast":
        model, optimizer = attached(features=features, momentum=momentum)
        train_with_steps_inside(context, model, optimizer, 20)
    else:
        with context():
            model, optimizer = attached(features=features, momentum=momentum)
            train(model, optimizer, 20)
    state = optimizer.state[model[2].weight]
    assert all(not value.is_floating_point() or value.dtype == torch.float32 for value in state.values())
    assert_same_bits(bits(model, optimizer), bits(plain, its))


@pytest.mark.parametrize("setting", ["float64", "float16", "meta"])
def test_global_settings_change_nothing_that_is_loaded(setting):
    """Of the kind of 8."""
    model, optimizer = attached(momentum=0.9)
    train(model, optimizer, 3)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, 3, first=3)
    resumed, other = attached(momentum=0.9)
    resumed.load_state_dict(weights)
    with GLOBALS[setting]():
        other.load_state_dict(state)
        train(resumed, other, 3, first=3)
    assert_same_bits(bits(model, optimizer), bits(resumed, other))


NUMBERS = {
    "numpy": {"lr": numpy.float64(0.125), "momentum": numpy.float32(0.5), "alpha": numpy.float64(0.25)},
    "integers": {"lr": 1, "momentum": 0, "alpha": 2},
    "tensors": {"lr": torch.tensor(0.125), "momentum": 0.5, "alpha": torch.tensor(0.25, dtype=torch.float64)},
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_other_types_are_numbers(kind):
    """Of the kind of 8, for each of the three."""
    ours = attached(**NUMBERS[kind])
    plain = attached(**{name: float(value) for name, value in NUMBERS[kind].items()})
    for pair in (ours, plain):
        train(*pair, 3)
    for a, b in zip(bits(*ours), bits(*plain), strict=True):
        torch.testing.assert_close(a, b)


# --- 10: models that move


@pytest.fixture
def swapping():
    """Conversions keep the parameter and swap its contents, as .cuda() does, so that meta stands for the GPU."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_state_follows_a_model_that_moves(swapping, steps, momentum):
    """10, as far as it shows without a GPU."""
    model, optimizer = attached(momentum=momentum)
    train(model, optimizer, steps)
    optimizer.zero_grad()
    weight = model[2].weight
    model.to("meta")
    assert weight is model[2].weight and weight.device.type == "meta"
    for param in model.parameters():  # torch.optim.SGD's buffers do not follow their parameters
        if param is not weight and "momentum_buffer" in optimizer.state.get(param, {}):
            optimizer.state[param]["momentum_buffer"] = optimizer.state[param]["momentum_buffer"].to("meta")
    train(model, optimizer, 2)
    assert optimizer.projection(weight).device.type == "meta"


@needs_gpu
@pytest.mark.parametrize("steps", [0, 3])
def test_the_state_follows_a_model_that_moves_to_a_gpu_and_back(steps):
    """10."""
    model, optimizer = attached()
    plain, its = attached()
    train(model, optimizer, steps)
    model.cuda()
    train(model, optimizer, 3, first=steps)
    model.cpu()
    train(model, optimizer, 3, first=steps + 3)
    train(plain, its, steps + 6)
    for a, b in zip(bits(model, optimizer), bits(plain, its), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_state_follows_a_model_that_is_converted_and_back(dtype, momentum):
    """Of the kind of 10."""
    model, optimizer = attached(momentum=momentum)
    train(model, optimizer, 3)
    P = optimizer.projection(model[2].weight)
    for kind in (dtype, torch.float32):
        model.to(kind)
        for param in model.parameters():
            if param is not model[2].weight and "momentum_buffer" in optimizer.state.get(param, {}):
                optimizer.state[param]["momentum_buffer"] = optimizer.state[param]["momentum_buffer"].to(kind)
        wide = torch.float64 if kind == torch.float64 else torch.float32
        torch.testing.assert_close(optimizer.projection(model[2].weight).to(P.dtype), P)
        train(model, optimizer, 2, first=3)
        P = optimizer.projection(model[2].weight)
        assert P.dtype == wide
        P = P.float()


def test_features_that_were_recorded_before_the_model_moved_are_not_lost(swapping):
    """Of the kind of 10: forward, move, step."""
    model, optimizer = attached()
    train(model, optimizer, 1)
    backward(model, 1)
    optimizer.zero_grad()
    model.to("meta")
    backward(model, 2, "meta")
    optimizer.step()
    assert optimizer.projection(model[2].weight).device.type == "meta"


# --- 11: forwards of every kind


def functional(head, x):
    detached = {name: p.detach() for name, p in head.named_parameters()}
    return torch.func.functional_call(head, detached, (x,))


def gradient(head, x):
    parameters = dict(head.named_parameters())
    loss = lambda values: torch.func.functional_call(head, values, (x,)).sum()  # noqa: E731
    return torch.func.grad(loss)(parameters)["weight"]


def per_sample_gradients(head, x):
    parameters = {name: p.detach() for name, p in head.named_parameters()}
    loss = lambda values, row: torch.func.functional_call(head, values, (row,)).sum()  # noqa: E731
    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["weight"]


def fake(head, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return torch.zeros(head(mode.from_tensor(x)).shape, device="meta")


def dual(head, x):
    with torch.autograd.forward_ad.dual_level():
        out = head(torch.autograd.forward_ad.make_dual(x, x))
        return torch.autograd.forward_ad.unpack_dual(out).tangent


class Marked(torch.Tensor):
    """A subclass as libraries have them: it sees every function that is called on it."""


SKIPPED = {  # cannot be recorded: said once
    "vmap": lambda head, x: torch.func.vmap(head)(x),  # 11
    "sparse": lambda head, x: head(x.to_sparse()),  # 11
    "compressed": lambda head, x: head(x.to_sparse_csr()),  # of the kind of 11
    "nested": lambda head, x: head(torch.nested.nested_tensor([x, x[:2]])).unbind()[0],  # 11
    "jagged": lambda head, x: head(torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)).values(),  # 11
    "fake": fake,  # of the kind of 11
    "per-sample gradients": per_sample_gradients,  # of the kind of 11
    "jvp": lambda head, x: torch.func.jvp(head, (x,), (x,))[1],  # of the kind of 11
}
OTHERS = {
    "functional_call": functional,  # 11
    "grad": gradient,  # of the kind of 11, as are the rest
    "dual": dual,
    "trace": lambda head, x: torch.jit.trace(head, x)(x),
    "export": lambda head, x: torch.export.export(head, (x,)).module()(x),
    "one sample": lambda head, x: head(x[0]),
    "no sample": lambda head, x: head(x[:0]),
    "subclass": lambda head, x: head(x.as_subclass(Marked)).as_subclass(torch.Tensor),
    "checkpoint": lambda head, x: checkpoint(head, x, use_reentrant=False),
    "inference": lambda head, x: torch.inference_mode()(head)(x).clone(),
    "keyword": lambda head, x: head(input=x),
}


@pytest.mark.parametrize("classes", [3, 40])  # with 32 and more the backward pass is looked at
@pytest.mark.parametrize("forward", [*SKIPPED, *OTHERS])
def test_the_hook_breaks_no_forward(forward, classes):
    do = (SKIPPED | OTHERS)[forward]
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(1))
    model, optimizer = attached(classes, 64)
    plain = network(classes, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(do(model[2], x), do(plain[2], x))
    said = [w for w in caught if "features" in str(w.message)]
    assert len(said) == (forward in SKIPPED)
    # What was skipped leaves no trace, and what was recorded is the mean of real features.
    if forward not in SKIPPED:
        optimizer.zero_grad()
        optimizer.step()  # forgets what was recorded
    train(model, optimizer, 3)
    fresh, other = attached(classes, 64)
    train(fresh, other, 3)
    assert_same_bits(bits(model, optimizer), bits(fresh, other))


def test_a_linear_layer_fed_with_wrong_inputs_fails_as_it_always_did():
    """The other side of 11: the error is the layer's own."""
    model, _ = attached()
    for bad in (torch.rand(2, 7), torch.ones(2, 8, dtype=torch.int64)):
        with pytest.raises(RuntimeError) as ours:
            model[2](bad)
        with pytest.raises(RuntimeError) as theirs:
            nn.Linear(8, 3)(bad)
        assert str(ours.value) == str(theirs.value)
