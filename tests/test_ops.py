"""Every backend against reference.py in float64."""

import dataclasses

import pytest
import torch
from helpers import randn
from parity import assert_as_accurate

from mla_ext import backends, ops, reference
from mla_ext.reference import Hyperparameters, accumulate_dtype

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
CASES = [(device, name) for device in DEVICES for name in backends.usable(torch.device(device))]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (1, 7, 2), (64, 33, 6), (257, 130, 40), (5, 513, 7)]  # N, s, C
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.8, "nesterov": True, "maximize": True},
    "before": {"absorb": "before", "momentum": 0.9},
    "forget": {"forget": 0.05},
    "normalize": {"normalize": True, "absorb": "before", "forget": 0.05},
    "update": {"project": "update", "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov_update": {"project": "update", "momentum": 0.8, "nesterov": True, "maximize": True, "absorb": "before"},
}

pytestmark = pytest.mark.parametrize(("device", "backend"), CASES)


@dataclasses.dataclass
class Head:
    """The state of one head, and how each implementation steps it."""

    weight: torch.Tensor
    momentum_buffer: torch.Tensor | None
    projection: torch.Tensor
    step: torch.Tensor

    def to(self, dtype):
        cast = lambda t: None if t is None else t.to(dtype, copy=True)  # noqa: E731
        return Head(cast(self.weight), cast(self.momentum_buffer), cast(self.projection), self.step.clone())

    def reference_step(self, grad, mean, hyper):
        self.weight, self.momentum_buffer, self.projection = reference.head_step(
            self.weight, grad, self.momentum_buffer, self.projection, mean, self.step, hyper
        )
        self.step += 1

    def step_(self, grad, mean, hyper, **kwargs):
        ops.head_step_(self.weight, grad, self.momentum_buffer, self.projection, mean, self.step, hyper, **kwargs)

    def bits(self):
        return [t.clone() for t in (self.weight, self.momentum_buffer, self.projection, self.step) if t is not None]


def new_head(C, s, dtype, device, hyper):
    accumulate = accumulate_dtype(dtype)
    # What a first step must not read: torch.optim.SGD's momentum buffer does not exist before it.
    buffer = torch.full((C, s), torch.nan, dtype=accumulate, device=device) if hyper.momentum else None
    eye = torch.eye(s, dtype=accumulate, device=device)
    return Head(randn(C, s, dtype=dtype, device=device), buffer, eye, torch.zeros((), device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "s", "C"), SIZES)
def test_feature_mean(device, backend, dtype, N, s, C):
    features = randn(N, s, dtype=dtype, device=device) + 3
    mean = ops.feature_mean(features, backend=backend)
    assert_as_accurate(mean, reference.feature_mean(features), reference.feature_mean(features.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("s", [1, 7, 33, 130, 513])
@pytest.mark.parametrize("options", [{}, {"forget": 0.1}, {"normalize": True}], ids=["plain", "forget", "normalize"])
def test_rls_update(device, backend, dtype, s, options):
    actual = torch.eye(s, dtype=dtype, device=device)
    plain, truth = actual.clone(), actual.double()
    for t in range(5):
        mean = randn(s, dtype=dtype, device=device, seed=t).relu()
        ops.rls_update_(actual, mean, alpha=0.1, backend=backend, **options)
        plain = reference.rls_update(plain, mean, 0.1, **options)
        truth = reference.rls_update(truth, mean.double(), 0.1, **options)
    assert_as_accurate(actual, plain, truth)
    assert torch.equal(actual, actual.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "s", "C"), SIZES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_head_step(device, backend, dtype, N, s, C, options):
    hyper = Hyperparameters(lr=0.1, **options)
    actual = new_head(C, s, dtype, device, hyper)
    plain, truth = actual.to(dtype), actual.to(torch.float64)
    plain.projection, plain.momentum_buffer = actual.projection.clone(), actual.momentum_buffer
    for t in range(4):
        grad = randn(C, s, dtype=dtype, device=device, seed=t)
        features = randn(N, s, dtype=dtype, device=device, seed=100 + t).relu()
        mean = None if t == 2 else features  # a step with nothing to absorb
        actual.step_(grad, None if mean is None else ops.feature_mean(mean), hyper, backend=backend)
        plain.reference_step(grad, None if mean is None else reference.feature_mean(mean), hyper)
        truth.reference_step(grad.double(), None if mean is None else reference.feature_mean(mean.double()), hyper)
    assert_as_accurate(actual.weight, plain.weight, truth.weight)
    assert_as_accurate(actual.projection, plain.projection, truth.projection)
    if hyper.momentum:
        assert_as_accurate(actual.momentum_buffer, plain.momentum_buffer, truth.momentum_buffer)
    assert torch.equal(actual.projection, actual.projection.T)
    assert actual.step == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_step_is_deterministic(device, backend, dtype):
    hyper = Hyperparameters(momentum=0.9)
    runs = []
    for _ in range(3):
        head = new_head(6, 257, dtype, device, hyper)
        for t in range(3):
            head.step_(
                randn(6, 257, dtype=dtype, device=device, seed=t),
                randn(257, dtype=torch.float32, device=device, seed=t),
                hyper,
                backend=backend,
            )
        runs.append(head.bits())
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_head_step_takes_non_contiguous_tensors(device, backend, dtype):
    hyper = Hyperparameters(momentum=0.9)
    straight = new_head(5, 12, dtype, device, hyper)
    turned = Head(*(t.T.contiguous().T if t.dim() else t for t in straight.bits()))
    assert not turned.weight.is_contiguous()
    for t in range(2):
        grad, mean = randn(5, 12, dtype=dtype, device=device, seed=t), randn(24, dtype=dtype, device=device, seed=t)
        straight.step_(grad, mean[::2].contiguous(), hyper, backend=backend)
        turned.step_(grad.T.contiguous().T, mean[::2], hyper, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(straight.bits(), turned.bits(), strict=True))


def test_found_inf_keeps_every_bit(device, backend):
    hyper = Hyperparameters(momentum=0.9)
    head = new_head(3, 9, torch.float32, device, hyper)
    grad, mean = randn(3, 9, dtype=torch.float32, device=device), randn(9, dtype=torch.float32, device=device)
    before = head.bits()
    head.step_(grad * torch.inf, mean, hyper, found_inf=torch.ones((), device=device), backend=backend)
    for old, new in zip(before, head.bits(), strict=True):
        assert torch.equal(old.nan_to_num(nan=7), new.nan_to_num(nan=7))
    head.step_(grad, mean, hyper, found_inf=torch.zeros((), device=device), backend=backend)
    assert head.step == 1 and not torch.equal(before[0], head.weight)


def test_grad_scale_divides_the_gradient(device, backend):
    hyper = Hyperparameters(momentum=0.9, weight_decay=0.1)
    scaled, unscaled = (new_head(3, 9, torch.float32, device, hyper) for _ in range(2))
    for t in range(3):
        grad = randn(3, 9, dtype=torch.float32, device=device, seed=t)
        mean = randn(9, dtype=torch.float32, device=device, seed=t)
        scaled.step_(grad * 1024, mean, hyper, grad_scale=torch.tensor(1024.0, device=device), backend=backend)
        unscaled.step_(grad, mean, hyper, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(scaled.bits(), unscaled.bits(), strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e25])
def test_a_mean_that_is_not_finite_or_overflows_is_not_absorbed(device, backend, bad):
    projection = torch.eye(40, device=device)
    mean = torch.ones(40, device=device)
    mean[3] = bad
    ops.rls_update_(projection, mean, backend=backend)
    assert torch.equal(projection, torch.eye(40, device=device))


def test_a_denominator_of_zero_is_not_absorbed(device, backend):
    """α and h̄ so small that d underflows."""
    projection = torch.zeros(4, 4, device=device)
    ops.rls_update_(projection, torch.ones(4, device=device), alpha=1e-60, forget=0.5, backend=backend)
    assert torch.equal(projection, torch.zeros(4, 4, device=device))


def test_maximize_with_a_grad_scale(device, backend):
    weights = []
    for hyper, grad_scale in ((Hyperparameters(maximize=True), 4.0), (Hyperparameters(), -4.0)):
        head = new_head(3, 9, torch.float32, device, hyper)
        grad = randn(3, 9, dtype=torch.float32, device=device)
        head.step_(grad, None, hyper, grad_scale=torch.tensor(grad_scale, device=device), backend=backend)
        weights.append(head.weight)
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_rounded_as_torch_rounds(device, backend, dtype):
    """Every finite value: ties, subnormals, the largest."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    grad = values.where(values.isfinite(), 0).reshape(256, 256)
    if backend == "triton":  # its interpreter misreads the subnormals of bfloat16
        grad = grad.where(grad.abs() >= torch.finfo(dtype).tiny, 0)
    weight = torch.zeros_like(grad)
    hyper = Hyperparameters(lr=1.5)  # of an odd significand this falls half-way between two half-precision numbers
    P = torch.eye(256, device=device)
    ops.head_step_(weight, grad, None, P, None, torch.zeros((), device=device), hyper, backend=backend)
    expected = (-1.5 * grad.float()).to(dtype)
    assert torch.equal(weight, expected)


def test_an_indefinite_projection_is_mended(device, backend):
    """Rounding may leave a small negative eigenvalue; absorbing its direction must not make it grow."""
    projection = torch.diag(torch.tensor([1.0, -1e-4, 0.5], device=device))
    truth = projection.double()
    mean = torch.tensor([0.0, 100.0, 0.0], device=device)
    for _ in range(3):
        ops.rls_update_(projection, mean, alpha=0.1, backend=backend)
        truth = reference.rls_update(truth, mean.double(), 0.1)
    assert torch.linalg.eigvalsh(projection.double()).min() >= 0
    torch.testing.assert_close(projection.double(), truth, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "C"), [(1, 1, 1), (1, 5, 2), (3, 7, 10), (2, 33, 1000), (3, 257, 33), (4, 0, 5)])
@pytest.mark.parametrize("missing", [False, True])
def test_entropy_fusion(device, backend, dtype, M, N, C, missing):
    logits = 5 * randn(M, N, C, dtype=dtype, device=device)
    present = (torch.rand(M, N, generator=torch.Generator().manual_seed(1)) > 0.4).to(device) if missing else None
    fused, weights = ops.entropy_fusion(logits, present, backend=backend)
    plain_fused, plain_weights = reference.entropy_fusion(logits, present)
    true_fused, true_weights = reference.entropy_fusion(logits.double(), present)
    assert_as_accurate(weights, plain_weights, true_weights)
    assert_as_accurate(fused, plain_fused, true_fused)
    if missing:
        assert (weights[~present] == 0).all()
        alone = present.sum(0) == 1
        assert (weights[:, alone].sum(0) == 1).all()
        assert (weights[:, present.sum(0) == 0] == 0).all() and (fused[present.sum(0) == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["entropy_fusion", "calibrated_fusion"])
@pytest.mark.parametrize(("M", "N", "C"), [(1, 5, 2), (3, 7, 10), (2, 33, 1000), (3, 257, 33), (4, 0, 5)])
def test_fusions_with_temperatures(device, backend, dtype, name, M, N, C):
    logits = 5 * randn(M, N, C, dtype=dtype, device=device)
    present = (torch.rand(M, N, generator=torch.Generator().manual_seed(1)) > 0.4).to(device)
    temperatures = torch.tensor([0.3, 7.0, 1.0, 0.9])[:M].to(device)
    poisoned = logits.masked_fill(~present.unsqueeze(-1), torch.nan)
    fused, weights = getattr(ops, name)(poisoned, present, backend, temperatures)
    plain = getattr(reference, name)(logits, present, temperatures)
    truth = getattr(reference, name)(logits.double() / temperatures.double().view(-1, 1, 1), present)
    for actual, rounded, true in zip((fused, weights), plain, truth, strict=True):
        assert_as_accurate(actual, rounded, true)
    assert (weights[~present] == 0).all() and (fused[present.sum(0) == 0] == 0).all()
    if name == "calibrated_fusion":
        torch.testing.assert_close(weights, (present / present.sum(0).clamp(min=1)).to(weights.dtype))


@pytest.mark.parametrize("name", ["entropy_fusion", "calibrated_fusion"])
def test_temperatures_of_one_change_no_bit(device, backend, name):
    logits = randn(3, 9, 33, dtype=torch.float32, device=device)
    for without, ones in zip(
        getattr(ops, name)(logits, backend=backend),
        getattr(ops, name)(logits, temperatures=torch.ones(3), backend=backend),
        strict=True,
    ):
        assert torch.equal(without, ones)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_entropy_fusion_of_extreme_logits(device, backend, dtype):
    logits = torch.zeros(2, 4, 33, dtype=dtype, device=device)
    logits[0, 0, 5] = 1e4  # certain, against uniform
    logits[0, 1] = -1e4
    logits[0, 1, 32] = 1e4
    logits[1, 2, :32] = -torch.inf  # one class left
    logits[0, 3], logits[1, 3] = 1e4, -1e4  # both uniform
    fused, weights = ops.entropy_fusion(logits, backend=backend)
    log_C = torch.tensor(33.0, dtype=torch.float64).log()
    sure = 1 / (1 + torch.exp(-log_C))
    expected = torch.tensor([[sure, sure, 1 - sure, 0.5], [1 - sure, 1 - sure, sure, 0.5]], dtype=weights.dtype)
    torch.testing.assert_close(weights.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert not fused.isnan().any()


def test_absent_logits_are_never_used(device, backend):
    logits = randn(2, 3, 5, dtype=torch.float32, device=device)
    present = torch.tensor([[True, False, True], [True, True, False]], device=device)
    poisoned = logits.masked_fill(~present.unsqueeze(-1), torch.nan)
    for clean, other in zip(
        ops.entropy_fusion(logits, present, backend=backend),
        ops.entropy_fusion(poisoned, present, backend=backend),
        strict=True,
    ):
        assert torch.equal(clean, other)


def test_a_modality_that_is_absent_weighs_nothing_next_to_nan(device, backend):
    logits = torch.full((3, 1, 4), torch.nan, device=device)
    present = torch.tensor([[False], [True], [True]], device=device)
    _, weights = ops.entropy_fusion(logits, present, backend=backend)
    assert weights[0] == 0 and weights[1:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finite_logits_may_be_so_far_apart_that_their_difference_overflows(device, backend, dtype):
    largest = torch.finfo(dtype).max
    logits = torch.zeros(2, 1, 600, dtype=dtype, device=device)
    logits[0] = -largest
    logits[0, :, [7, 300]] = largest  # two classes left, met after others
    fused, weights = ops.entropy_fusion(logits, backend=backend)
    _, expected = reference.entropy_fusion(logits)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    assert fused.isfinite().all()
