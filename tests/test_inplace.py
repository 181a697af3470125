"""The reference backend's step in place, against reference.py: in float64 they agree to the last digits."""

import dataclasses
import itertools

import pytest
import torch

from mla_ext import backends, inplace, reference
from mla_ext.projection import Projection
from mla_ext.reference import Hyperparameters
from mla_ext.step import HeadStep

BACKEND = backends.BACKENDS["reference"]
OPTIONS = {
    "plain": Hyperparameters(lr=0.1),
    "sgd": Hyperparameters(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01, maximize=True),
    "before": Hyperparameters(lr=0.1, momentum=0.9, nesterov=True, absorb="before"),
    "forget": Hyperparameters(lr=0.1, momentum=0.5, forget=0.1),
    "forget before": Hyperparameters(lr=0.1, forget=0.1, absorb="before"),
    "tensors": Hyperparameters(*(torch.tensor(x, dtype=torch.float64) for x in (0.1, 0.9)), alpha=torch.tensor(0.25)),
}


def make(C, s, rank, dtype, momentum, scaled):
    P = Projection.identity(s, rank, 0, reference.accumulate_dtype(dtype), torch.device("cpu"))
    if scaled:
        P.nu = torch.zeros((), dtype=reference.accumulate_dtype(dtype))
    M = torch.zeros(C, s, dtype=reference.accumulate_dtype(dtype)) if momentum else None
    return HeadStep(torch.randn(C, s).to(dtype), torch.empty(0), M, P, None, torch.zeros(()), Hyperparameters())


def both(step):
    """The same step by `inplace` and by the specification."""
    other = dataclasses.replace(
        step,
        weight=step.weight.clone(),
        momentum_buffer=None if step.momentum_buffer is None else step.momentum_buffer.clone(),
        projection=step.projection.copy_to(step.projection.dense().dtype, torch.device("cpu")),
        step=step.step.clone(),
    )
    inplace.head_step_(step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # where the backend takes the specification
        BACKEND.head_step_(other)
    return step, other


def assert_same(step, other):
    for name in ("weight", "momentum_buffer", "step"):
        torch.testing.assert_close(getattr(step, name), getattr(other, name), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(step.projection.dense(), other.projection.dense(), rtol=1e-9, atol=1e-11)
    for name in ("count", "beta", "nu"):
        torch.testing.assert_close(getattr(step.projection, name), getattr(other.projection, name))


@pytest.mark.parametrize(("C", "s", "rank"), [(1, 1, None), (6, 33, None), (40, 7, None), (6, 33, 8), (3, 513, 5)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scaled", [False, True])
def test_every_option_of_a_step(C, s, rank, options, scaled):
    torch.manual_seed(0)
    step = make(C, s, rank, torch.float64, OPTIONS[options].momentum != 0, scaled)
    for t in range(12):  # past a compression; some steps have no features, or some that no P can absorb
        mean = None if t % 5 == 3 else torch.randn(s, dtype=torch.float64) * (float("nan") if t == 6 else 1)
        grad, hyper = torch.randn(C, s, dtype=torch.float64), OPTIONS[options]
        step = dataclasses.replace(step, grad=grad, feature_mean=mean, hyper=hyper)
        step, other = both(step)
        assert_same(step, other)


@pytest.mark.parametrize("rank", [None, 4])
def test_normalize_scale_and_overflow(rank):
    torch.manual_seed(0)
    hyper = Hyperparameters(lr=0.1, momentum=0.9, normalize=rank is None)
    step = make(5, 12, rank, torch.float64, True, True)
    for scale, inf in itertools.product((2.0, 1024.0), (0.0, 1.0)):
        step = dataclasses.replace(
            step,
            grad=torch.randn(5, 12, dtype=torch.float64),
            feature_mean=torch.randn(12, dtype=torch.float64),
            hyper=hyper,
            grad_scale=torch.tensor(scale),
            found_inf=torch.tensor(inf),
        )
        before = step.weight.clone()
        step, other = both(step)
        assert_same(step, other)
        assert torch.equal(before, step.weight) == (inf != 0)


def test_half_precision_weights_are_rounded_once():
    torch.manual_seed(0)
    step = make(5, 64, None, torch.bfloat16, True, False)
    step = dataclasses.replace(
        step, grad=torch.randn(5, 64).bfloat16(), feature_mean=torch.randn(64), hyper=Hyperparameters(lr=0.1)
    )
    step, other = both(step)
    assert torch.equal(step.weight, other.weight)


@pytest.mark.parametrize("s", [1, 7, 33, 64, 257, 513])
def test_P_stays_symmetric_to_the_last_bit(s):
    torch.manual_seed(0)
    step = make(3, s, None, torch.float32, False, True)
    for _ in range(5):
        step = dataclasses.replace(
            step, grad=torch.randn(3, s), feature_mean=torch.randn(s), hyper=Hyperparameters(forget=0.01)
        )
        BACKEND.head_step_(step)
    assert torch.equal(step.projection.base, step.projection.base.t()) and step.projection.base[0, 0] != 1


def test_a_step_allocates_nothing_as_large_as_the_head():
    """After the first one: the products go where those of the last step went."""
    torch.manual_seed(0)
    step = make(8, 300, 32, torch.float32, True, True)
    step = dataclasses.replace(
        step, grad=torch.randn(8, 300), feature_mean=torch.randn(300), hyper=Hyperparameters(momentum=0.9)
    )
    BACKEND.head_step_(step)
    with torch.profiler.profile(profile_memory=True) as profile:
        BACKEND.head_step_(step)
    assert max(event.cpu_memory_usage for event in profile.events()) < 2000  # a head has 9600 bytes, P 360000
