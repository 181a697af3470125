"""The rank form of every backend against reference.py in float64."""

import itertools

import pytest
import torch
from helpers import randn
from parity import RANK_OPTIONS, PlainRank, assert_as_accurate

from mla_ext import backends, ops, reference
from mla_ext.projection import Projection
from mla_ext.reference import Hyperparameters, accumulate_dtype

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
CASES = [(device, name) for device in DEVICES for name in backends.usable(torch.device(device))]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(7, 2, 4), (33, 6, 5), (40, 33, 4), (320, 1, 4)]  # s, C, R
# Each option at each shape, with the dtypes in turn, so that each option has met all four.
TURNS = [
    pytest.param(*shape, DTYPES[(i + j) % 4], options, id=f"{name}-{'-'.join(map(str, shape))}")
    for i, shape in enumerate(SHAPES)
    for j, (name, options) in enumerate(RANK_OPTIONS.items())
]

pytestmark = pytest.mark.parametrize(("device", "backend"), CASES)


def feature_mean_of(t, s, dtype, device="cpu"):
    """Two directions, of which one is stronger, and a little noise, so that it is clear what a compression keeps."""
    strength = 5.0 if t % 2 else 3.0
    mean = strength * randn(s, dtype=torch.float64, seed=1000 + t % 2) + 0.1 * randn(s, dtype=torch.float64, seed=t)
    return (mean / s**0.5).to(device, dtype)


def identity(s, R, dtype, device):
    """Nobody may read a row that is not in use."""
    accumulate = accumulate_dtype(dtype)
    P = Projection.identity(s, R, 0, accumulate, torch.device(device))
    P.rows.fill_(torch.nan)
    return P


def dense(beta, rows):
    return beta.double() * torch.eye(rows.shape[1], device=rows.device) - rows.double().T @ rows.double()


class Head:
    def __init__(self, C, s, R, dtype, device, backend, hyper):
        accumulate = accumulate_dtype(dtype)
        self.hyper, self.backend, self.capacity = hyper, backend, R
        self.weight = randn(C, s, dtype=dtype, device=device, seed=77)
        like = {"dtype": accumulate, "device": device}
        self.momentum_buffer = torch.full((C, s), torch.nan, **like) if hyper.momentum else None
        self.projection = identity(s, R, dtype, device)
        self.step = torch.zeros((), device=device)

    def step_(self, grad, mean, **scaling):
        state = (self.weight, grad, self.momentum_buffer, self.projection, mean, self.step, self.hyper)
        ops.head_step_(*state, **scaling, backend=self.backend)

    def used(self):
        return self.projection.rows[: int(self.projection.count)]

    def bits(self):
        P = self.projection
        state = (self.weight, self.momentum_buffer, P.beta, P.rows, P.count, self.step)
        return [t.clone().nan_to_num(7) for t in state if t is not None]


@pytest.mark.parametrize(("s", "C", "R", "dtype", "options"), TURNS)
def test_against_the_reference(device, backend, s, C, R, dtype, options):
    """Over several compressions."""
    head = Head(C, s, R, dtype, device, backend, Hyperparameters(lr=0.1, **options))
    plain, truth = PlainRank(head, dtype), PlainRank(head, torch.float64)
    counts = []
    for t in range(9):
        grad = randn(C, s, dtype=dtype, device=device, seed=t)
        mean = None if t == 2 else feature_mean_of(t, s, accumulate_dtype(dtype), device)
        for each in (head, plain, truth):
            each.step_(grad, mean)
        counts.append(int(head.projection.count))
        assert counts[-1] == len(truth.rows)
    assert sum(b < a for a, b in itertools.pairwise(counts)) >= 2 and head.step == 9
    P = [
        dense(beta, rows).to(rows.dtype)
        for beta, rows in ((head.projection.beta, head.used()), (plain.beta, plain.rows))
    ]
    assert_as_accurate(*P, dense(truth.beta, truth.rows))
    assert_as_accurate(head.projection.beta, plain.beta, truth.beta)
    assert_as_accurate(head.weight, plain.weight, truth.weight)
    if head.momentum_buffer is not None:
        assert_as_accurate(head.momentum_buffer, plain.momentum_buffer, truth.momentum_buffer)


@pytest.mark.parametrize(("s", "R"), [(5, 8), (40, 1), (40, 2), (40, 3), (90, 64), (150, 100)])
def test_a_compression_of_any_number_of_rows(device, backend, s, R):
    """The step that fills K. A graded and nearly rank-deficient K, some rows of which are equal."""
    head = Head(2, s, R, torch.float64, device, backend, Hyperparameters(lr=0.1))
    K = randn(R - 1, s, dtype=torch.float64, device=device, seed=3)
    K *= (0.5 / s**0.5) * 10.0 ** -torch.linspace(0, 9, R - 1, dtype=torch.float64, device=device).unsqueeze(1)
    K[(R - 1) // 3 : (R - 1) // 2] = K[: (R - 1) // 2 - (R - 1) // 3]
    head.projection.rows[: R - 1] = K
    head.projection.count.fill_(R - 1)
    mean, grad = feature_mean_of(1, s, torch.float64, device), randn(2, s, dtype=torch.float64, device=device)
    head.step_(grad, mean)
    beta, rows = reference.rank_update(torch.ones((), dtype=torch.float64, device=device), K, mean, 0.1)
    beta, rows = reference.rank_compress(beta, rows, R // 2)
    assert head.projection.count == R // 2
    torch.testing.assert_close(head.projection.beta, beta, rtol=0, atol=1e-13)
    torch.testing.assert_close(dense(head.projection.beta, head.used()), dense(beta, rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("absorb", ["after", "before"])
def test_found_inf_keeps_every_bit_and_grad_scale_divides(device, backend, absorb):
    hyper = Hyperparameters(momentum=0.9, weight_decay=0.1, absorb=absorb)
    scaled, unscaled = (Head(3, 9, 4, torch.float32, device, backend, hyper) for _ in "ab")
    scale, zero, one = (torch.tensor(value, device=device) for value in (1024.0, 0.0, 1.0))
    for t in range(4):  # the last one fills K
        grad = randn(3, 9, dtype=torch.float32, device=device, seed=t)
        mean = feature_mean_of(t, 9, torch.float32, device)
        before = scaled.bits()
        scaled.step_(grad * torch.inf, mean, found_inf=one)
        assert all(map(torch.equal, before, scaled.bits()))
        scaled.step_(grad * 1024, mean, grad_scale=scale, found_inf=zero)
        unscaled.step_(grad, mean)
    assert all(map(torch.equal, scaled.bits(), unscaled.bits())) and scaled.projection.count == 2


@pytest.mark.parametrize("absorb", ["after", "before"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])
def test_what_cannot_be_absorbed_is_left_out(device, backend, absorb, value):
    head = Head(3, 9, 4, torch.float32, device, backend, Hyperparameters(lr=0.1, absorb=absorb, forget=0.1))
    grad = randn(3, 9, dtype=torch.float32, device=device, seed=1)
    expected = head.weight - 0.1 * grad
    head.step_(grad, torch.full((9,), value, device=device))
    torch.testing.assert_close(head.weight, expected)
    P = head.projection
    assert P.count == 0 and P.beta == 1 and head.step == 1


@pytest.mark.parametrize(("beside", "is_row"), [(0.0, False), (0.004, True), (0.1, True)])
def test_what_is_only_rounding_becomes_no_row(device, backend, beside, is_row):
    """P is indefinite in one direction, as rounding makes it, and h̄ has nothing, a little or more beside it.

    Then h̄ᵀk is below 0, between |k|²/2 and |k|², or above.
    """
    head = Head(1, 9, 4, torch.float64, device, backend, Hyperparameters(lr=0.0, alpha=1e-30, forget=0.1))
    mean = torch.zeros(9, dtype=torch.float64, device=device)
    mean[2], mean[5] = 1.0, beside**0.5
    head.projection.rows[0] = 0.0
    head.projection.rows[0, 2] = 1.001**0.5
    head.projection.count.fill_(1)
    one, K = head.projection.beta.clone(), head.projection.rows[:1].clone()
    head.step_(torch.zeros(1, 9, dtype=torch.float64, device=device), mean)
    beta, rows = reference.rank_update(one, K, mean, alpha=1e-30, forget=0.1)
    assert head.projection.count == len(rows) == 1 + is_row
    torch.testing.assert_close(head.projection.beta, beta)
    torch.testing.assert_close(dense(head.projection.beta, head.used()), dense(beta, rows), rtol=0, atol=1e-11)


@pytest.mark.parametrize("C", [2, 33])
@pytest.mark.parametrize("absorb", ["after", "before"])
@pytest.mark.parametrize("rank", [4, None])
def test_numbers_may_be_tensors(device, backend, rank, absorb, C):
    numbers = {"lr": 0.3, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.125, "alpha": 0.5, "forget": 0.125}
    tensors = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in numbers.items()}
    results = []
    for values in (numbers, tensors):
        head = Head(C, 9, 4, torch.float32, device, backend, Hyperparameters(absorb=absorb, **values))
        if rank is None:
            head.projection = Projection.identity(9, None, 0, torch.float32, torch.device(device))
        for t in range(4):
            grad = randn(C, 9, dtype=torch.float32, device=device, seed=t)
            head.step_(grad, feature_mean_of(t, 9, torch.float32, device))
        results.append((head.weight, head.momentum_buffer, head.projection.dense()))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
