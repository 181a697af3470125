"""d = αν + h̄ᵀk: ν, the exponential mean of ‖h̄‖², in every backend against reference.py in float64."""

import copy
import dataclasses
import pickle

import pytest
import torch
from helpers import batch, network, randn, train
from parity import assert_as_accurate
from torch import nn

from mla_ext import ProjectedSGD, backends, ops, reference
from mla_ext.projection import Projection
from mla_ext.reference import Hyperparameters, accumulate_dtype

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
CASES = [(device, name) for device in DEVICES for name in backends.usable(torch.device(device))]
FORMS = {"dense": (None, 0), "deferred": (None, 4), "rank": (4, 0)}  # rank and deferred rows
OPTIONS = {
    "after": {},
    "before": {"absorb": "before"},
    "normalize": {"normalize": True},
    "forget": {"forget": 0.1, "absorb": "before"},
    "tensor": {"alpha": torch.tensor(0.3)},
}
COMBINED = [
    (form, name)
    for form in FORMS
    for name in OPTIONS
    if not (name == "normalize" and form != "dense") and not (name == "forget" and form == "deferred")
]
of_every_backend = pytest.mark.parametrize(("device", "backend"), CASES)


class Head:
    def __init__(self, C, s, form, dtype, device, backend, hyper):
        rank, deferred = FORMS[form]
        self.hyper, self.backend, self.accumulate = hyper, backend, accumulate_dtype(dtype)
        self.weight = randn(C, s, dtype=dtype, device=device)
        self.P = Projection.identity(s, rank, deferred, self.accumulate, torch.device(device))
        self.P.nu = torch.zeros((), dtype=self.accumulate, device=device)
        self.step = torch.zeros((), device=device)

    def step_(self, grad, mean, **scaling):
        grad, mean = grad.to(self.weight.dtype), None if mean is None else mean.to(self.accumulate)
        state = (self.weight, grad, None, self.P, mean, self.step, self.hyper)
        ops.head_step_(*state, **scaling, backend=self.backend)

    def bits(self):
        P = self.P
        return [t.clone() for t in (self.weight, P.dense(), P.nu, P.count, P.beta) if t is not None]


def steps(s, C, device):
    """Gradients and means: of two directions, which a compression keeps; then none; then 0, and a larger one."""
    for t in range(9):
        mean = (5.0 if t % 2 else 3.0) * randn(s, dtype=torch.float64, seed=t % 2) + 0.1 * randn(s, seed=50 + t)
        factor = {6: 0.0, 8: 30.0}.get(t, 1.0)
        yield randn(C, s, seed=90 + t).to(device), None if t == 4 else factor * mean.to(device)


@of_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("form", "name"), COMBINED)
def test_a_step_is_the_one_with_alpha_nu(device, backend, dtype, form, name):
    hyper = Hyperparameters(lr=0.1, **OPTIONS[name])
    if form == "deferred" and backend == "cuda":
        pytest.skip("the CUDA kernels take no deferred rows")
    s, C = 19, 3
    head = Head(C, s, form, dtype, device, backend, hyper)
    plain = Head(C, s, form, dtype, device, "reference", hyper)
    true = Head(C, s, "dense" if form == "deferred" else form, torch.float64, device, "reference", hyper)
    nu = torch.zeros((), dtype=torch.float64, device=device)
    true.P.nu, true.weight = None, plain.weight.to(torch.float64, copy=True)
    for grad, mean in steps(s, C, device):
        grad = grad.to(dtype)
        for each in (head, plain):
            each.step_(grad, mean)
        mean = None if mean is None else mean.to(accumulate_dtype(dtype)).double()
        if mean is not None:
            square = mean @ mean
            nu = square if nu == 0 else (1 - reference.NU_RATE) * nu + reference.NU_RATE * square
        true.hyper = dataclasses.replace(hyper, alpha=float(hyper.alpha) * nu)
        true.step_(grad, mean)
        assert_as_accurate(head.P.nu, plain.P.nu, nu)
    assert_as_accurate(head.P.dense(), plain.P.dense(), true.P.dense())
    assert_as_accurate(head.weight, plain.weight, true.weight)


@of_every_backend
@pytest.mark.parametrize("form", ["dense", "rank"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])
def test_a_mean_that_is_not_absorbed_leaves_nu(device, backend, form, value):
    head = Head(2, 9, form, torch.float32, device, backend, Hyperparameters())
    mean = torch.full((9,), value, device=device)
    head.step_(torch.ones(2, 9, device=device), mean)
    assert head.P.nu == 0
    head.step_(torch.ones(2, 9, device=device), torch.ones(9, device=device))
    assert head.P.nu == 9
    before = head.bits()[1:]
    head.step_(torch.ones(2, 9, device=device), mean)
    head.step_(torch.ones(2, 9, device=device), None)
    assert all(map(torch.equal, before, head.bits()[1:]))


@of_every_backend
@pytest.mark.parametrize("form", ["dense", "rank"])
def test_an_overflow_leaves_nu(device, backend, form):
    head = Head(2, 9, form, torch.float32, device, backend, Hyperparameters())
    for inf in (0.0, 1.0):
        before = head.bits()
        found = torch.tensor(inf, device=device)
        head.step_(torch.ones(2, 9, device=device), 2 * torch.ones(9, device=device), found_inf=found)
        assert all(map(torch.equal, before, head.bits())) == bool(inf)
    assert head.P.nu == 36


def stepped(scale, **options):
    weight = nn.Parameter(randn(3, 40))
    optimizer = ProjectedSGD([weight], lr=0.1, momentum=0.9, **options)
    for t in range(30):
        weight.grad = randn(3, 40, seed=t)
        optimizer.observe(weight, scale * randn(4, 40, seed=100 + t % 7))
        optimizer.step()
    return optimizer.projection(weight), weight.detach()


@pytest.mark.parametrize("backend", [backend for device, backend in CASES if device == "cpu"])
@pytest.mark.parametrize("absorb", ["after", "before"])
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_the_scale_of_the_features_changes_nothing(backend, absorb, rank, scale):
    options = {"backend": backend, "absorb": absorb, "rank": rank, "forget": 0.01}
    for ours, theirs in zip(stepped(scale, **options), stepped(1.0, **options), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    fixed = stepped(scale, alpha_scale=None, **options)[0]
    assert not torch.allclose(fixed, stepped(1.0, alpha_scale=None, **options)[0], atol=1e-3)


def attached(**options):
    model = network()
    optimizer = ProjectedSGD(model.parameters(), lr=0.1, momentum=0.9, **options)
    optimizer.attach(model[2])
    return model, optimizer, lambda: optimizer.state[model[2].weight]


@pytest.mark.parametrize("rank", [None, 4])
def test_a_resumed_run_and_copies_go_on_to_the_bit(rank):
    model, optimizer, state = attached(rank=rank)
    train(model, optimizer, 5)
    other, resumed, of_resumed = attached(rank=rank)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    copied_model, copied = copy.deepcopy((model, optimizer))
    copied.attach(copied_model[2])
    for each, its in ((model, optimizer), (other, resumed), (copied_model, copied)):
        train(each, its, 5, first=5)
    assert state()["nu"] > 0
    assert torch.equal(state()["nu"], of_resumed()["nu"])
    for each in (other, copied_model):
        assert torch.equal(model[2].weight, each[2].weight)


def test_nu_is_kept_as_p_is():
    """In the accumulate dtype under any weights, over a change of form, and until a reset."""
    model, optimizer, state = attached(rank=None)
    train(model, optimizer, 3)
    saved, nu = copy.deepcopy(optimizer.state_dict()), state()["nu"].clone()
    assert nu > 0
    saved["param_groups"][0]["rank"] = 4
    optimizer.load_state_dict(saved)
    assert "beta" in state() and torch.equal(state()["nu"], nu)
    optimizer.settle()
    assert torch.equal(state()["nu"], nu)
    half, of_half, state_of_half = attached()
    half.to(torch.bfloat16)
    of_half.load_state_dict(saved)
    assert state_of_half()["nu"].dtype == torch.float32 and torch.equal(state_of_half()["nu"], nu)
    optimizer.reset_projection()
    assert state()["nu"] == 0
    x, _ = batch(0)
    mean = model[1](model[0](x)).detach().mean(0)
    train(model, optimizer, 1)
    torch.testing.assert_close(state()["nu"], mean @ mean)


@pytest.mark.parametrize("rank", [None, 4])
def test_a_checkpoint_of_a_fixed_alpha_goes_on_with_it(rank):
    """Also one of a version that knew nothing else."""
    model, optimizer, state = attached(rank=rank, alpha_scale=None)
    train(model, optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    assert "nu" not in state()
    del saved["param_groups"][0]["alpha_scale"]
    other, again, of_again = attached(rank=rank)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(saved)
    for each, its in ((model, optimizer), (other, again)):
        train(each, its, 4, first=4)
    assert torch.equal(model[2].weight, other[2].weight) and "nu" not in of_again()


def test_the_scale_may_be_switched():
    model, optimizer, state = attached()
    train(model, optimizer, 2)
    optimizer.param_groups[0]["alpha_scale"] = None
    train(model, optimizer, 2)
    assert "nu" not in state()
    optimizer.param_groups[0]["alpha_scale"] = "features"
    train(model, optimizer, 1)
    assert state()["nu"] > 0
    optimizer.param_groups[0]["alpha_scale"] = "squares"
    with pytest.raises(ValueError, match="alpha_scale: expected 'features' or None, got 'squares'"):
        train(model, optimizer, 1)


@pytest.mark.filterwarnings("ignore:the loaded state has no projection")
def test_a_checkpoint_of_a_plain_sgd_takes_the_scale_that_is_here():
    model, optimizer, state = attached()
    optimizer.load_state_dict(torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9).state_dict())
    train(model, optimizer, 1)
    assert state()["nu"] > 0


def test_a_wrong_scale_and_a_wrong_nu():
    model = network()
    with pytest.raises(ValueError, match="alpha_scale: expected 'features' or None, got 'weights'"):
        ProjectedSGD(model.parameters(), alpha_scale="weights")
    P, step = Projection(torch.eye(4), nu=torch.zeros((), dtype=torch.float64)), torch.zeros(())
    with pytest.raises(TypeError, match="nu: expected"):
        ops.head_step_(randn(2, 4), randn(2, 4), None, P, randn(4), step, Hyperparameters())
