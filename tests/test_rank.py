"""The rank form P = βI − KᵀK: the reference against dense P, and the CPU op against the reference."""

from functools import partial

import helpers
import pytest
import torch
from helpers import needs_kernels
from parity import RANK_OPTIONS, PlainRank, assert_as_accurate

from mla_ext import ProjectedSGD, reference
from mla_ext.reference import Hyperparameters, accumulate_dtype

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# What the op itself knows; project="update" is made of it (mla_ext/rules.py).
KERNEL_OPTIONS = {name: options for name, options in RANK_OPTIONS.items() if "project" not in options}


randn = partial(helpers.randn, dtype=torch.float64)


def mean_of_step(t, s, dtype):
    """Three directions over and over, and a little noise, so that it is clear which ones a compression keeps.

    Among equally strong ones rounding decides, and P is then another in every precision.
    """
    return (5 * randn(s, dtype=dtype, seed=1000 + t % 3) + 0.1 * randn(s, dtype=dtype, seed=100 + t)) / s**0.5


def dense(beta, rows):
    """P as a matrix, in float64."""
    return beta.double() * torch.eye(rows.shape[1], dtype=torch.float64) - rows.double().T @ rows.double()


def empty(s, dtype=torch.float64):
    """The identity: β = 1 and no rows."""
    return torch.ones((), dtype=dtype), torch.zeros(0, s, dtype=dtype)


def absorbed(s, r, alpha=0.1, forget=0.0):
    beta, rows = empty(s)
    for t in range(r):
        beta, rows = reference.rank_update(beta, rows, randn(s, seed=t), alpha, forget)
    return beta, rows


# ---- The reference, in float64 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("absorb", ["after", "before"])
@pytest.mark.parametrize("forget", [0.0, 0.05])
@pytest.mark.parametrize("s", [1, 7, 33, 130])
def test_equal_to_dense_until_the_first_compression(s, forget, absorb):
    hyper = Hyperparameters(lr=0.1, momentum=0.9, weight_decay=0.01, forget=forget, absorb=absorb)
    W, M, (beta, rows) = randn(5, s), torch.zeros(5, s).double(), empty(s)
    V, N, P = W, M, torch.eye(s, dtype=torch.float64)
    for t in range(15):
        grad, mean = randn(5, s, seed=t), randn(s, seed=100 + t).relu()
        mean = None if t == 3 else mean
        step = torch.tensor(float(t))
        W, M, beta, rows = reference.rank_head_step(W, grad, M, beta, rows, 16, mean, step, hyper)
        V, N, P = reference.head_step(V, grad, N, P, mean, step, hyper)
        torch.testing.assert_close(dense(beta, rows), P, rtol=0, atol=1e-12)
        torch.testing.assert_close(W, V, rtol=0, atol=1e-11)
        torch.testing.assert_close(M, N, rtol=0, atol=1e-11)
    assert len(rows) == 14
    X = randn(4, s, seed=9)
    torch.testing.assert_close(reference.rank_product(X, beta, rows), X @ dense(beta, rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("s", "r", "keep"), [(33, 16, 8), (130, 16, 3), (10, 16, 8), (5, 16, 8), (40, 3, 0)])
def test_a_compression_keeps_the_trace_and_the_strongest_directions(s, r, keep):
    beta, rows = absorbed(s, r, forget=0.01)
    new_beta, new_rows = reference.rank_compress(beta, rows, keep)
    before, after = dense(beta, rows), dense(new_beta, new_rows)
    assert new_rows.shape == (keep, s) and 0 <= new_beta <= beta
    torch.testing.assert_close(after.trace(), before.trace(), rtol=1e-12, atol=1e-12)
    values, vectors = torch.linalg.eigh(before)  # the strongest directions are those that P keeps least of
    kept = min(keep, s)
    torch.testing.assert_close(after @ vectors[:, :kept], values[:kept] * vectors[:, :kept], rtol=0, atol=1e-12)
    if kept < s:
        rest = torch.linalg.eigvalsh(after)[kept:]
        torch.testing.assert_close(rest, values[kept:].mean().expand(s - kept), rtol=0, atol=1e-12)


def test_a_compression_leaves_out_directions_that_are_not_there():
    rows = torch.zeros(6, 20).double()
    rows[0, 3] = rows[4, 7] = 0.5
    beta, kept = reference.rank_compress(torch.tensor(0.9).double(), rows, 3)
    assert kept.isfinite().all()
    torch.testing.assert_close(dense(beta, kept), dense(torch.tensor(0.9), rows), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1e-8, 0.1])
def test_p_stays_between_0_and_the_identity(dtype, alpha):
    (beta, rows), capacity, s = empty(24, dtype), 8, 24
    tiny = 1e-5 if dtype == torch.float32 else 1e-12
    for t in range(300):
        mean = randn(s, dtype=dtype, seed=t % 40) * 10 ** float(randn(1, seed=t))
        beta, rows = reference.rank_update(beta, rows, mean, alpha, forget=0.01 if t % 50 > 40 else 0.0)
        if len(rows) == capacity:
            beta, rows = reference.rank_compress(beta, rows, capacity // 2)
        values = torch.linalg.eigvalsh(dense(beta, rows))
        assert -tiny <= values[0] and values[-1] <= 1 + tiny
        assert beta.dtype == rows.dtype == dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200, 0.0])
def test_what_cannot_be_absorbed_is_left_out(value):
    beta, rows = absorbed(6, 3)
    mean = torch.full((6,), value, dtype=torch.float64)
    new_beta, new_rows = reference.rank_update(beta, rows, mean, alpha=0.0)
    assert new_beta is beta and new_rows is rows


def test_normalize_is_refused():
    with pytest.raises(ValueError, match="normalize: expected False with the rank form, got True"):
        W = randn(2, 6)
        hyper = Hyperparameters(normalize=True)
        reference.rank_head_step(W, W, None, *empty(6), 4, None, torch.zeros(()), hyper)


# ---- The CPU op ------------------------------------------------------------------------------------------------------


class Rank:
    """A head with the state of the rank form, stepped by the op."""

    def __init__(self, C, s, dtype, capacity, hyper):
        accumulate = accumulate_dtype(dtype)
        self.hyper, self.capacity = hyper, capacity
        self.weight = randn(C, s, dtype=dtype, seed=77)
        # Nobody may read what is not in use.
        self.momentum_buffer = torch.full((C, s), torch.nan, dtype=accumulate) if hyper.momentum else None
        self.beta, self.rows = torch.ones((), dtype=accumulate), torch.full((capacity, s), torch.nan, dtype=accumulate)
        self.count, self.step = torch.tensor(0), torch.zeros(())

    def step_(self, grad, mean, grad_scale=None, found_inf=None, **changed):
        h = self.hyper
        state = {name: getattr(self, name) for name in ("weight", "momentum_buffer", "beta", "rows", "count", "step")}
        arguments = {
            **state,
            "base": None,
            "grad": grad,
            "feature_mean": mean,
            "grad_scale": grad_scale,
            "found_inf": found_inf,
            "absorb_before": h.absorb == "before",
            **{name: float(getattr(h, name)) for name in ("lr", "momentum", "dampening", "weight_decay", "alpha")},
            **{name: getattr(h, name) for name in ("nesterov", "maximize", "normalize", "forget")},
        }
        torch.ops.mla_ext.head_step_(**(arguments | changed))

    def used(self):
        return self.rows[: self.count]

    def bits(self):
        state = (self.weight, self.momentum_buffer, self.beta, self.rows, self.count, self.step)
        return [t.clone().nan_to_num(7) for t in state if t is not None]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("s", "C"), [(1, 1), (7, 6), (33, 101), (513, 1), (513, 6), (1100, 29)])
@pytest.mark.parametrize("options", KERNEL_OPTIONS.values(), ids=KERNEL_OPTIONS)
def test_the_op_against_the_reference(s, C, dtype, options):
    """Over several compressions."""
    rank = Rank(C, s, dtype, 8, Hyperparameters(lr=0.1, **options))
    plain, truth = PlainRank(rank, dtype), PlainRank(rank, torch.float64)
    for t in range(25):
        grad, mean = randn(C, s, dtype=dtype, seed=t), mean_of_step(t, s, rank.rows.dtype)
        mean = None if t % 7 == 2 else mean  # a step with nothing to absorb
        for head in (rank, plain, truth):
            head.step_(grad, mean)
    assert rank.step == 25 and 4 <= rank.count < 8
    P = [dense(head.beta, rows).to(rank.rows.dtype) for head, rows in ((rank, rank.used()), (plain, plain.rows))]
    assert_as_accurate(*P, dense(truth.beta, truth.rows))
    assert_as_accurate(rank.beta, plain.beta, truth.beta)
    assert_as_accurate(rank.weight, plain.weight, truth.weight)
    if rank.momentum_buffer is not None:
        assert_as_accurate(rank.momentum_buffer, plain.momentum_buffer, truth.momentum_buffer)


@needs_kernels
@pytest.mark.parametrize("capacity", [1, 2, 3, 15, 64, 100])
@pytest.mark.parametrize("s", [5, 40, 700])
def test_any_number_of_rows(s, capacity):
    rank = Rank(3, s, torch.float64, capacity, Hyperparameters(lr=0.1))
    truth = PlainRank(rank, torch.float64)
    for t in range(2 * capacity + 3):
        grad, mean = randn(3, s, seed=t), mean_of_step(t, s, torch.float64)
        rank.step_(grad, mean)
        truth.step_(grad, mean)
    assert rank.count == len(truth.rows)
    torch.testing.assert_close(dense(rank.beta, rank.used()), dense(truth.beta, truth.rows), rtol=0, atol=1e-11)
    torch.testing.assert_close(rank.weight, truth.weight, rtol=0, atol=1e-10)


@needs_kernels
def test_a_long_run_stays_between_0_and_the_identity():
    s = 48
    rank = Rank(3, s, torch.float32, 16, Hyperparameters(lr=1e-4, alpha=1e-6))
    for t in range(3000):
        mean = randn(s, dtype=torch.float32, seed=t % 60) * 10 ** float(randn(1, seed=t))
        rank.step_(randn(3, s, dtype=torch.float32, seed=t), mean)
        if t % 50 == 0:
            values = torch.linalg.eigvalsh(dense(rank.beta, rank.used()))
            assert values[0] >= -1e-5 and values[-1] <= 1 + 1e-5
    assert rank.weight.isfinite().all()


@needs_kernels
def test_the_same_bits_with_any_number_of_threads():
    threads, bits = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            runs = [Rank(C, 2050, torch.float32, 16, Hyperparameters(momentum=0.9)) for C in (6, 40)]
            for t in range(20):
                for rank in runs:
                    grad = randn(*rank.weight.shape, dtype=torch.float32, seed=t)
                    rank.step_(grad, randn(2050, dtype=torch.float32, seed=t))
            bits.append(runs[0].bits() + runs[1].bits())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in bits[1:] for a, b in zip(bits[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scaled_gradients(shape):
    scaled, unscaled = (Rank(3, 9, torch.float32, 4, Hyperparameters(momentum=0.9, weight_decay=0.1)) for _ in "ab")
    for t in range(6):
        grad, mean = randn(3, 9, dtype=torch.float32, seed=t), randn(9, dtype=torch.float32, seed=t)
        scaled.step_(grad * 1024, mean, torch.full(shape, 1024.0), torch.zeros(shape))
        unscaled.step_(grad, mean)
    assert all(map(torch.equal, scaled.bits(), unscaled.bits()))
    before = scaled.bits()
    scaled.step_(grad * torch.inf, mean, found_inf=torch.ones(shape))
    assert all(map(torch.equal, before, scaled.bits()))


@needs_kernels
@pytest.mark.parametrize("absorb", ["after", "before"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_the_op_leaves_out_what_cannot_be_absorbed(absorb, value):
    rank = Rank(3, 9, torch.float32, 4, Hyperparameters(lr=0.1, absorb=absorb))
    grad = randn(3, 9, dtype=torch.float32, seed=1)
    expected = rank.weight - 0.1 * grad
    rank.step_(grad, torch.full((9,), value))
    torch.testing.assert_close(rank.weight, expected)
    assert rank.count == 0 and rank.beta == 1 and rank.rows.isnan().all()


@needs_kernels
def test_settle_compresses_what_is_full_only():
    beta, rows = absorbed(20, 8)
    for count in (0, 7, 8):
        b, K, n = beta.clone(), rows.clone(), torch.tensor(count)
        torch.ops.mla_ext.settle_(None, b, K, n)
        if count < 8:
            assert n == count and torch.equal(b, beta) and torch.equal(K, rows)
        else:
            assert n == 4
            expected = dense(*reference.rank_compress(beta, rows, 4))
            torch.testing.assert_close(dense(b, K[:4]), expected, rtol=0, atol=1e-12)


BAD = {
    "base: expected either base or beta, got both": {"base": torch.eye(9)},
    "base: expected either base or beta, got neither": {"beta": None},
    "rows: expected beside beta": {"rows": None, "count": None},
    "count: expected beside rows": {"count": None},
    "beta: the shape": {"beta": torch.ones(1)},
    "beta: the dtype": {"beta": torch.ones((), dtype=torch.float64)},
    "rows: expected a .capacity, s. tensor": {"rows": torch.zeros(0, 9)},
    "rows: the shape": {"rows": torch.zeros(4, 8)},
    "rows: the dtype": {"rows": torch.zeros(4, 9, dtype=torch.float64)},
    "rows: expected a contiguous": {"rows": torch.zeros(9, 4).T},
    "count: expected 0 to 3, got 4": {"count": torch.tensor(4)},
    "count: expected 0 to 3, got -1": {"count": torch.tensor(-1)},
    "count: the dtype": {"count": torch.tensor(0.0)},
    "normalize: expected false with rows": {"normalize": True},
    "grad_scale: expected one number": {"grad_scale": torch.ones(2)},
    "grad_scale: expected float32": {"grad_scale": torch.ones((), dtype=torch.float64)},
    "found_inf: expected one number": {"found_inf": torch.ones(1, 1)},
    "lr_tensor: expected float32": {"lr_tensor": torch.tensor(1)},
    "alpha_tensor: expected float32": {"alpha_tensor": torch.tensor(1)},
    "grad: the shape": {"grad": torch.ones(3, 8)},
    "weight: expected float32, float64": {
        "weight": torch.ones(3, 9, dtype=torch.int32),
        "grad": torch.ones(3, 9, dtype=torch.int32),
    },
}


@needs_kernels
@pytest.mark.parametrize("changed", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_before_any_change(changed, request):
    rank = Rank(3, 9, torch.float32, 4, Hyperparameters(momentum=0.9))
    before = rank.bits()
    arguments = {"grad": torch.ones(3, 9), "mean": torch.ones(9)}
    grad = changed.get("grad", arguments["grad"])
    with pytest.raises(RuntimeError, match=request.node.callspec.id):
        rank.step_(grad, arguments["mean"], **{name: value for name, value in changed.items() if name != "grad"})
    assert all(map(torch.equal, before, rank.bits()))


# Features that P has almost absorbed: what is left of k is small beside its rounding. `noise` is what is new in each.
ALMOST_ABSORBED = {
    "the same for ever": (torch.float32, 1.0, 1e-8, 0.0),
    "the same, large": (torch.float32, 1e3, 1e-30, 0.0),
    "almost the same": (torch.float32, 1.0, 1e-30, 1e-4),
    "almost the same, large": (torch.float32, 1e3, 1e-3, 1e-4),
    "almost the same, larger": (torch.float32, 1e8, 0.1, 1e-3),
    "almost the same, small": (torch.float32, 1e-6, 1e-30, 1e-3),
    "float64": (torch.float64, 1e8, 1e-6, 1e-7),
    "bfloat16": (torch.bfloat16, 1e3, 0.1, 1e-4),
    "float16": (torch.float16, 1.0, 1e-12, 1e-4),
}


@pytest.mark.parametrize(("s", "rank"), [(24, 8), (130, 16)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("dtype", "scale", "alpha", "noise"), ALMOST_ABSORBED.values(), ids=ALMOST_ABSORBED)
def test_p_stays_between_0_and_the_identity_where_little_is_left_of_k(dtype, scale, alpha, noise, backend, s, rank):
    weight = torch.nn.Parameter(torch.zeros(2, s, dtype=dtype))
    optimizer = ProjectedSGD([weight], lr=0.0, alpha=alpha, alpha_scale=None, rank=rank, backend=backend)
    weight.grad = torch.zeros_like(weight)
    for t in range(200):
        features = scale * (randn(1, s) + noise * randn(1, s, seed=t + 1))
        optimizer.observe(weight, features.to(dtype))
        optimizer.step()
        if t % 40 == 39:
            eigenvalues = torch.linalg.eigvalsh(optimizer.projection(weight).double())
            tiny = 100 * torch.finfo(optimizer.projection(weight).dtype).eps
            assert -tiny < eigenvalues[0] < 1e-3 and eigenvalues[-1] < 1 + tiny


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forgetting_gives_back_what_p_has_lost_entirely(backend):
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = ProjectedSGD([weight], lr=0.0, forget=1.0, rank=2, backend=backend)
    weight.grad = torch.zeros_like(weight)
    for _ in range(2):
        optimizer.observe(weight, torch.ones(1, 3))
        optimizer.step()
        optimizer.state[weight]["beta"].zero_()
        optimizer.state[weight]["count"].zero_()
    optimizer.observe(weight, torch.ones(1, 3))
    optimizer.step()
    torch.testing.assert_close(optimizer.projection(weight), torch.eye(3))


@needs_kernels
@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-20, 1.0])
def test_a_compression_at_any_scale(scale):
    """Squares of the elements of K Kᵀ neither overflow nor underflow."""
    beta, rows = absorbed(20, 8)
    b, K, n = beta * scale, rows * scale**0.5, torch.tensor(8)
    torch.ops.mla_ext.settle_(None, b, K, n)
    expected = dense(*reference.rank_compress(beta, rows, 4))
    torch.testing.assert_close(dense(b, K[:4]) / scale, expected, rtol=0, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("capacity", [1, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_compression_does_not_hide_what_is_not_finite(value, capacity):
    beta, rows = absorbed(20, capacity)
    rows[-1, 3] = value
    count = torch.tensor(capacity)
    torch.ops.mla_ext.settle_(None, beta, rows, count)
    assert not dense(beta, rows[:count]).isfinite().any()
