"""A dense P that keeps its updates as rows until there are many: the result is what the reference gives."""

import copy
import pickle

import pytest
import torch
from helpers import needs_kernels, randn
from parity import assert_as_accurate
from torch import nn

from mla_ext import ProjectedSGD, backends, ops, reference
from mla_ext.backends.cpu import DEFERRED
from mla_ext.projection import Projection
from mla_ext.reference import Hyperparameters, accumulate_dtype

pytestmark = needs_kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STEPS = 2 * DEFERRED + 3


def deferred(P):
    """The projection with this P as its base, and no row in use."""
    return Projection(P, None, P.new_zeros(DEFERRED, len(P)), torch.tensor(0))


def step_(weight, grad, momentum_buffer, projection, mean, step, hyper, found_inf=None):
    ops.head_step_(weight, grad, momentum_buffer, projection, mean, step, hyper, None, found_inf, "cpu")


@pytest.mark.parametrize("absorb", ["after", "before"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("s", "C"), [(1, 1), (7, 2), (33, 6), (130, 40), (513, 7)])
def test_many_steps_against_the_reference(s, C, dtype, absorb):
    hyper = Hyperparameters(lr=0.1, momentum=0.9, weight_decay=0.01, absorb=absorb)
    accumulate = accumulate_dtype(dtype)
    W, M, P, step = randn(C, s, dtype=dtype), torch.zeros(C, s, dtype=accumulate), torch.eye(s, dtype=accumulate), 0
    step = torch.zeros(())
    waiting = deferred(P)
    plain, truth = (W.clone(), M.clone(), P.clone()), (W.double(), M.double(), P.double())
    truth = tuple(t.clone() for t in truth)
    for t in range(STEPS):
        grad, mean = randn(C, s, dtype=dtype, seed=t), randn(s, dtype=accumulate, seed=100 + t).relu() + 0.1
        mean = None if t % 7 == 2 else mean  # a step with nothing to absorb
        count = step.clone()
        step_(W, grad, M, waiting, mean, step, hyper)
        plain = reference.head_step(plain[0], grad, plain[1], plain[2], mean, count, hyper)
        mean = None if mean is None else mean.double()
        truth = reference.head_step(truth[0], grad.double(), truth[1], truth[2], mean, count, hyper)
    if C < 32 or absorb == "after":
        assert waiting.count > 0  # the last updates are still to be made
    backends.BACKENDS["cpu"].settle_(waiting)
    assert waiting.count == 0 and step == STEPS
    assert torch.equal(P, P.T)
    assert_as_accurate(P, plain[2], truth[2])
    assert_as_accurate(W, plain[0], truth[0])
    assert_as_accurate(M, plain[1], truth[1])


def test_p_is_written_once_in_many_steps():
    P, step = torch.eye(40), torch.zeros(())
    waiting, W = deferred(P), randn(3, 40)
    for t in range(1, DEFERRED + 1):
        before = P.clone()
        step_(W, randn(3, 40, seed=t), None, waiting, randn(40, seed=t), step, Hyperparameters())
        assert torch.equal(P, before) == (t < DEFERRED)
        assert waiting.count == t % DEFERRED


@pytest.mark.parametrize("absorb", ["after", "before"])
@pytest.mark.parametrize("C", [3, 40])
def test_a_negative_d_is_absorbed_at_once(absorb, C):
    hyper = Hyperparameters(lr=0.1, absorb=absorb)
    P, W, step = torch.eye(20), randn(C, 20), torch.zeros(())
    P[0, 0] = -3.0  # as rounding may leave it, but clearer
    waiting, truth = deferred(P), (W.double(), P.double())
    for t in range(4):
        grad, mean = randn(C, 20, seed=t), randn(20, seed=t)
        if t < 2:
            mean[0] = 0.0
        elif t == 2:
            mean = torch.eye(20)[0]
            assert 0.1 + truth[1][0, 0] < 0
            assert waiting.count > 0 or (C == 40 and absorb == "before")
        step_(W, grad, None, waiting, mean, step, hyper)
        W64, _, P64 = reference.head_step(truth[0], grad.double(), None, truth[1], mean.double(), step, hyper)
        truth = (W64, P64)
        if t == 2:
            assert waiting.count == 0 and P[0, 0] > 0
    backends.BACKENDS["cpu"].settle_(waiting)
    torch.testing.assert_close(P.double(), truth[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(W.double(), truth[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(P, P.T)


@pytest.mark.parametrize("absorb", ["after", "before"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_what_cannot_be_absorbed_does_not_wait_either(absorb, value):
    hyper = Hyperparameters(lr=0.1, absorb=absorb)
    P, W, step = torch.eye(9), randn(3, 9), torch.zeros(())
    waiting, grad = deferred(P), randn(3, 9, seed=1)
    expected = W - 0.1 * grad
    step_(W, grad, None, waiting, torch.full((9,), value), step, hyper)
    torch.testing.assert_close(W, expected)
    assert waiting.count == 0 and torch.equal(P, torch.eye(9))


def test_an_overflow_leaves_all_as_it_is():
    P, W, step, M = torch.eye(9), randn(3, 9), torch.zeros(()), torch.zeros(3, 9)
    waiting, hyper = deferred(P), Hyperparameters(momentum=0.9)
    step_(W, randn(3, 9), M, waiting, randn(9), step, hyper)
    before = [t.clone() for t in (W, M, P, step, waiting.rows[:1], waiting.count)]
    step_(W, randn(3, 9), M, waiting, randn(9), step, hyper, found_inf=torch.ones(()))
    assert all(map(torch.equal, before, (W, M, P, step, waiting.rows[:1], waiting.count)))


def test_the_op_refuses_what_does_not_fit():
    P, W, step = torch.eye(9), randn(3, 9), torch.zeros(())
    for rows, count, error, message in (
        (torch.zeros(4, 8), torch.tensor(0), ValueError, "rows: expected shape"),
        (torch.zeros(4, 9, dtype=torch.float64), torch.tensor(0), TypeError, "rows: expected .* float32"),
        (torch.zeros(4, 9), torch.tensor(4), RuntimeError, "count: expected 0 to 3"),
        (torch.zeros(4, 9), torch.tensor(-1), RuntimeError, "count: expected 0 to 3"),
        (torch.zeros(4, 9), torch.tensor(0.0), TypeError, "count: expected .* int64"),
    ):
        with pytest.raises(error, match=message):
            step_(W, randn(3, 9), None, Projection(P, None, rows, count), randn(9), step, Hyperparameters())
    for options in ({"forget": 0.1}, {"normalize": True}):
        with pytest.raises(RuntimeError, match=r"(forget|normalize): expected"):
            step_(W, randn(3, 9), None, deferred(P), randn(9), step, Hyperparameters(**options))
    assert torch.equal(W, randn(3, 9)) and step == 0


# ---- In the optimizer ------------------------------------------------------------------------------------------------


def make(s=12, C=4, **options):
    torch.manual_seed(0)
    head = nn.Linear(s, C)
    optimizer = ProjectedSGD(head.parameters(), **({"lr": 0.02, "momentum": 0.9} | options))
    optimizer.attach(head)
    return head, optimizer


def train(head, optimizer, steps, seed=0, N=8):
    for t in range(steps):
        optimizer.zero_grad()
        head(randn(N, head.in_features, dtype=head.weight.dtype, seed=seed + t)).square().mean().backward()
        optimizer.step()


def expected_after(steps, **options):
    """The same by the reference backend in float64."""
    head, optimizer = make(backend="reference", **options)
    head.double()
    train(head, optimizer, steps)
    return head.weight.detach(), optimizer.projection(head.weight)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.detach().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, DEFERRED - 1, DEFERRED, DEFERRED + 1, STEPS])
def test_the_projection_shows_what_waits(steps):
    head, optimizer = make()
    train(head, optimizer, steps)
    weight, P = expected_after(steps)
    assert_close(optimizer.projection(head.weight), P)
    assert_close(head.weight, weight)


def test_a_state_dict_is_whole_at_any_time():
    head, optimizer = make()
    train(head, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    assert set(saved["state"][0]) == {"base", "rows", "count", "nu", "momentum_buffer", "step"}
    other, again = make()
    train(other, again, 3, seed=50)  # its own waiting updates must not survive
    again.load_state_dict(saved)
    other.load_state_dict(head.state_dict())
    train(head, optimizer, 20, seed=5)
    train(other, again, 20, seed=5)
    assert torch.equal(head.weight, other.weight)  # to the bit
    assert torch.equal(optimizer.projection(head.weight), again.projection(other.weight))


def test_saving_changes_no_later_bit():
    head, optimizer = make()
    other, watched = make()
    for t in range(20):
        train(head, optimizer, 1, seed=t)
        train(other, watched, 1, seed=t)
        watched.state_dict()
        watched.projection(other.weight)
        copy.deepcopy(watched)
    assert torch.equal(head.weight, other.weight)
    assert torch.equal(optimizer.projection(head.weight), watched.projection(other.weight))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_have_what_waits(clone):
    head, optimizer = make()
    train(head, optimizer, 5)
    copied = clone(optimizer)
    (weight,) = [p for p in copied.param_groups[0]["params"] if p.ndim == 2]
    assert_close(copied.projection(weight), expected_after(5)[1])


def test_options_that_need_p_at_once_find_it():
    head, optimizer = make()
    train(head, optimizer, 5)
    optimizer.param_groups[0]["forget"] = 0.1
    train(head, optimizer, 3, seed=5)
    optimizer.param_groups[0]["forget"] = 0.0
    train(head, optimizer, 3, seed=8)
    twin, truth = make(backend="reference")
    twin.double()
    train(twin, truth, 5)
    truth.param_groups[0]["forget"] = 0.1
    train(twin, truth, 3, seed=5)
    truth.param_groups[0]["forget"] = 0.0
    train(twin, truth, 3, seed=8)
    assert_close(optimizer.projection(head.weight), truth.projection(twin.weight))
    assert_close(head.weight, twin.weight.detach())


def test_reset_and_conversion_in_mid_cycle():
    head, optimizer = make()
    train(head, optimizer, 5)
    optimizer.reset_projection()
    assert torch.equal(optimizer.projection(head.weight), torch.eye(12))
    train(head, optimizer, 5)
    head.double()
    train(head, optimizer, 2, seed=5)
    twin, truth = make(backend="reference")
    twin.double()
    train(twin, truth, 5)
    truth.reset_projection()
    train(twin, truth, 7)
    assert_close(optimizer.projection(head.weight), truth.projection(twin.weight))
