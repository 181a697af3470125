"""P = B − KᵀK with a dense B: updates wait as rows of K and are folded into B when there are `capacity` of them."""

import pytest
import torch
from parity import assert_as_accurate

from mla_ext import _library, reference
from mla_ext.reference import Hyperparameters, accumulate_dtype

pytestmark = pytest.mark.skipif(_library.load_error is not None, reason="the ops are not compiled")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CAPACITY = 16
STEPS = 2 * CAPACITY + 3


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Deferred:
    """A head whose updates of P are deferred."""

    def __init__(self, C, s, dtype=torch.float32, momentum=False):
        accumulate = accumulate_dtype(dtype)
        self.weight, self.step = randn(C, s, dtype=dtype), torch.zeros(())
        self.momentum_buffer = torch.zeros(C, s, dtype=accumulate) if momentum else None
        self.base, self.count = torch.eye(s, dtype=accumulate), torch.tensor(0)
        self.rows = torch.full((CAPACITY, s), torch.nan, dtype=accumulate)  # not read before they are written

    def step_(self, grad, mean, hyper, found_inf=None, rows=None, count=None):
        torch.ops.mla_ext.head_step_(
            self.weight,
            grad,
            self.momentum_buffer,
            self.base,
            None,
            self.rows if rows is None else rows,
            self.count if count is None else count,
            mean,
            self.step,
            *(float(x) for x in (hyper.lr, hyper.momentum, hyper.dampening, hyper.weight_decay)),
            hyper.nesterov,
            hyper.maximize,
            hyper.alpha,
            hyper.forget,
            hyper.absorb == "before",
            hyper.normalize,
            None,
            found_inf,
        )

    def settle_(self):
        torch.ops.mla_ext.settle_(self.base, None, self.rows, self.count)

    def bits(self):
        state = (self.weight, self.momentum_buffer, self.base, self.rows, self.count, self.step)
        return [t.clone().nan_to_num(7) for t in state if t is not None]


@pytest.mark.parametrize("absorb", ["after", "before"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("s", "C"), [(1, 1), (7, 2), (33, 6), (130, 40), (513, 7)])
def test_many_steps_against_the_reference(s, C, dtype, absorb):
    hyper = Hyperparameters(lr=0.1, momentum=0.9, weight_decay=0.01, absorb=absorb)
    head = Deferred(C, s, dtype, momentum=True)
    plain = head.weight.clone(), head.momentum_buffer.clone(), head.base.clone()
    truth = tuple(t.double().clone() for t in plain)
    for t in range(STEPS):
        grad, mean = randn(C, s, dtype=dtype, seed=t), randn(s, dtype=head.base.dtype, seed=100 + t).relu() + 0.1
        mean = None if t % 7 == 2 else mean  # a step with nothing to absorb
        step = head.step.clone()
        head.step_(grad, mean, hyper)
        plain = reference.head_step(plain[0], grad, plain[1], plain[2], mean, step, hyper)
        mean = None if mean is None else mean.double()
        truth = reference.head_step(truth[0], grad.double(), truth[1], truth[2], mean, step, hyper)
    if C < 32 or absorb == "after":
        assert head.count > 0  # the last updates are still to be made
    head.settle_()
    assert head.count == 0 and head.step == STEPS
    assert torch.equal(head.base, head.base.T)
    assert_as_accurate(head.base, plain[2], truth[2])
    assert_as_accurate(head.weight, plain[0], truth[0])
    assert_as_accurate(head.momentum_buffer, plain[1], truth[1])


def test_p_is_written_once_in_many_steps():
    head = Deferred(3, 40)
    for t in range(1, CAPACITY + 1):
        before = head.base.clone()
        head.step_(randn(3, 40, seed=t), randn(40, seed=t), Hyperparameters())
        assert torch.equal(head.base, before) == (t < CAPACITY)
        assert head.count == t % CAPACITY


@pytest.mark.parametrize("absorb", ["after", "before"])
@pytest.mark.parametrize("C", [3, 40])
def test_a_negative_d_is_absorbed_at_once(absorb, C):
    hyper = Hyperparameters(lr=0.1, absorb=absorb)
    head = Deferred(C, 20)
    head.base[0, 0] = -3.0  # as rounding may leave it, but clearer
    truth = head.weight.double(), head.base.double()
    for t in range(4):
        grad, mean = randn(C, 20, seed=t), randn(20, seed=t)
        if t < 2:
            mean[0] = 0.0
        elif t == 2:
            mean = torch.eye(20)[0]
            assert 0.1 + truth[1][0, 0] < 0
            assert head.count > 0 or (C == 40 and absorb == "before")
        head.step_(grad, mean, hyper)
        W, _, P = reference.head_step(truth[0], grad.double(), None, truth[1], mean.double(), head.step, hyper)
        truth = (W, P)
        if t == 2:
            assert head.count == 0 and head.base[0, 0] > 0
    head.settle_()
    torch.testing.assert_close(head.base.double(), truth[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.weight.double(), truth[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(head.base, head.base.T)


@pytest.mark.parametrize("absorb", ["after", "before"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_what_cannot_be_absorbed_is_no_row_either(absorb, value):
    head, grad = Deferred(3, 9), randn(3, 9, seed=1)
    expected = head.weight - 0.1 * grad
    head.step_(grad, torch.full((9,), value), Hyperparameters(lr=0.1, absorb=absorb))
    torch.testing.assert_close(head.weight, expected)
    assert head.count == 0 and torch.equal(head.base, torch.eye(9))


def test_an_overflow_leaves_all_as_it_is():
    head, hyper = Deferred(3, 9, momentum=True), Hyperparameters(momentum=0.9)
    head.step_(randn(3, 9), randn(9), hyper)
    before = head.bits()
    head.step_(randn(3, 9), randn(9), hyper, found_inf=torch.ones(()))
    assert all(map(torch.equal, before, head.bits()))


def test_the_op_refuses_what_does_not_fit():
    head = Deferred(3, 9)
    before = head.bits()
    for rows, count, message in (
        (torch.zeros(4, 8), torch.tensor(0), "rows: the shape"),
        (torch.zeros(4, 9, dtype=torch.float64), torch.tensor(0), "rows: the dtype"),
        (torch.zeros(4, 9), torch.tensor(4), "count: expected 0 to 3, got 4"),
        (torch.zeros(4, 9), torch.tensor(-1), "count: expected 0 to 3, got -1"),
        (torch.zeros(4, 9), torch.tensor(0.0), "count: the dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            head.step_(randn(3, 9), randn(9), Hyperparameters(), rows=rows, count=count)
    for options, message in (({"forget": 0.1}, "forget: expected 0"), ({"normalize": True}, "normalize: expected fal")):
        with pytest.raises(RuntimeError, match=message):
            head.step_(randn(3, 9), randn(9), Hyperparameters(**options))
    with pytest.raises(RuntimeError, match="count: expected 0 to 4, got 5"):
        torch.ops.mla_ext.settle_(torch.eye(9), None, torch.zeros(4, 9), torch.tensor(5))
    assert all(map(torch.equal, before, head.bits()))
