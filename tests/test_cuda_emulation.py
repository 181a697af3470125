"""The CUDA kernels' own sources, run on the host by tests/cuda_emulation, against the reference in float64.

What passes has at most twice the error of plain PyTorch in the same dtype, plus a few units in the last place.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import harness
from harness import FIVE_BY_TWO, FORTY, H100, ONE, PARTLY_HELD, THREE, Call

from mla_ext import reference
from mla_ext.reference import Hyperparameters, accumulate_dtype

pytestmark = pytest.mark.skipif(harness.UNAVAILABLE is not None, reason=str(harness.UNAVAILABLE))

FLOATS = (torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.bfloat16, torch.float16)
SIZES = (1, 7, 33, 512, 513, 1030)
CLASSES = (1, 2, 6, 101)
BATCHES = (1, 64, 257)
NAN = float("nan")
NU = 14  # array of a head step's call
USUAL = Hyperparameters(lr=0.1, momentum=0.9, weight_decay=0.01)


def assert_accurate(got: Tensor, exact: Tensor, plain: Tensor, what: str, scale: Tensor | None = None) -> None:
    """`got` is at most twice as far from `exact` as `plain`, plus 4 units in the last place of `scale`.

    The scale is that of the largest term of the sums, where these may cancel; else the largest element's.
    Nothing here is more exact than float64, so float64 gets a bound of its own.
    """
    assert got.dtype == plain.dtype and got.shape == plain.shape
    if exact.numel() == 0:
        return
    error = (got.double() - exact).abs().max()
    slack = 1e-12 if got.dtype == torch.float64 else 4 * torch.finfo(got.dtype).eps
    allowed = 2 * (plain.double() - exact).abs().max() + slack * (exact if scale is None else scale).abs().max()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


@functools.cache
def random_projection(s: int) -> Tensor:
    """P after three updates: symmetric, no longer the identity. float64."""
    generator = torch.Generator().manual_seed(s)
    P = torch.eye(s, dtype=torch.float64)
    for _ in range(3):
        P = reference.rls_update(P, torch.randn(s, generator=generator, dtype=torch.float64), 1.0)
    return P


@dataclass(frozen=True)
class HeadCase:
    """Some steps of a head: inputs drawn at random, the call of the kernels, and what the reference makes of them."""

    s: int
    classes: int
    dtype: torch.dtype
    device: int
    hyper: Hyperparameters = USUAL
    steps: int = 2
    steps_before: int = 0
    absorbs: bool = True
    with_momentum: bool = True
    scalar_pointers: bool = False  # lr and alpha from the device, another in each step
    nu: float | None = None  # None: alpha is not scaled
    grad_scale: float | None = None
    found_inf: tuple[int, ...] = ()
    product_given: bool = False
    misaligned: bool = False
    order: int = 0  # seeds the order in which the emulated threads run

    @property
    def accumulate(self) -> torch.dtype:
        return accumulate_dtype(self.dtype)

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.s * 1000 + self.classes)
        shape = (self.classes, self.s)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        grads = randn(self.steps, *shape)
        for t, inf in enumerate(self.found_inf):
            grads[t, :, 0] = float("inf") if inf else grads[t, :, 0]
        buffer = randn(*shape) if self.steps_before else torch.full(shape, NAN)
        return {
            "weight": randn(*shape).to(self.dtype),
            "buffer": buffer.to(self.accumulate),
            "P": random_projection(self.s).to(self.accumulate),
            "grads": grads.to(self.dtype),
            "means": (0.5 + randn(self.steps, self.s)).to(self.accumulate),
            "lr": torch.rand(self.steps, generator=generator),
            "alpha": 0.1 + torch.rand(self.steps, generator=generator),
        }

    def start(self, x: dict[str, Tensor]) -> Any:
        """P before the steps."""
        return x["P"]

    def product(self, grad: Tensor, P: Any) -> Tensor:
        return grad.to(P.dtype) @ P

    def advance(self, *step: Any) -> tuple[Tensor, Tensor | None, Any]:
        return reference.head_step(*step)

    def form(self, x: dict[str, Tensor]) -> tuple[int, Tensor | None, list[Tensor | None]]:
        """P for the driver: how many rows there is room for; B; K, beta and count."""
        return 0, x["P"], [None, None, None]

    def expected(self, double: bool) -> tuple[Tensor, Tensor | None, Any, list[Tensor], Tensor | None]:
        """weight, momentum_buffer and P after the steps, each step's G P, and nu."""
        x = self.inputs()
        if double:
            x = {name: value.double() for name, value in x.items()}
        weight, P = x["weight"], self.start(x)
        buffer = x["buffer"] if self.with_momentum else None
        step, products = torch.tensor(float(self.steps_before)), []
        nu = None if self.nu is None else x["means"].new_tensor(self.nu)
        for t in range(self.steps):
            grad = x["grads"][t]
            products.append(self.product(grad, P))
            if self.found_inf and self.found_inf[t]:
                continue
            hyper = self.hyper
            if self.scalar_pointers:
                hyper = replace(hyper, lr=x["lr"][t].item(), alpha=x["alpha"][t].item())
            scaled = grad / self.grad_scale if self.grad_scale else grad
            mean = x["means"][t] if self.absorbs else None
            if nu is not None and mean is not None:
                nu = reference.next_nu(nu, mean)
                hyper = replace(hyper, alpha=hyper.alpha * nu)
            weight, buffer, P = self.advance(weight, scaled, buffer, P, mean, step, hyper)
            step = step + 1
        return weight, buffer, P, products, nu

    def call(self) -> Call:
        x, h = self.inputs(), self.hyper
        before = h.absorb == "before"
        offset = torch.finfo(self.dtype).bits // 8 if self.misaligned else 0
        integers = [harness.DTYPES[self.dtype], self.classes, self.s, self.steps]
        capacity, base, rows = self.form(x)
        integers += [h.nesterov, h.maximize, before, h.normalize, offset, capacity]
        products = torch.stack(self.expected(double=True)[3]).to(self.accumulate) if self.product_given else None
        arrays = [
            x["weight"],
            x["buffer"] if self.with_momentum else None,
            base,
            torch.tensor(float(self.steps_before)),
            x["grads"],
            x["means"] if self.absorbs else None,
            x["lr"] if self.scalar_pointers else None,
            x["alpha"] if self.scalar_pointers else None,
            torch.full((self.steps,), self.grad_scale) if self.grad_scale else None,
            torch.tensor(self.found_inf, dtype=torch.float32) if self.found_inf else None,
            products,
            *rows,
            None if self.nu is None else torch.tensor(self.nu, dtype=self.accumulate),
        ]
        reals = [h.lr, h.momentum, h.dampening, h.weight_decay, h.alpha, h.forget]
        return Call(harness.HEAD_STEP, integers, reals, arrays, self.device, self.order)

    def check(self, arrays: list[Tensor | None]) -> None:
        weight, buffer, _, step = arrays[:4]
        exact, plain = self.expected(double=True), self.expected(double=False)
        assert_accurate(weight, exact[0], plain[0], f"weight of {self}")
        if self.with_momentum:
            assert_accurate(buffer, exact[1], plain[1], f"momentum_buffer of {self}")
        self.check_projection(arrays, exact[2], plain[2])
        if self.nu is not None:
            assert_accurate(arrays[NU], exact[4], plain[4], f"nu of {self}")
        assert step == self.steps_before + self.steps - sum(self.found_inf), f"step of {self}"

    def check_projection(self, arrays: list[Tensor | None], exact: Any, plain: Any) -> None:
        P = arrays[2]
        assert_accurate(P, exact, plain, f"P of {self}")
        assert torch.equal(P, P.T), f"P is not symmetric: {self}"
        if not self.absorbs:
            assert torch.equal(P, self.inputs()["P"]), f"P changed: {self}"


def check_head_steps(program: Path, directory: Path, cases: list[HeadCase]) -> None:
    for case, arrays in zip(cases, harness.run(program, [case.call() for case in cases], directory), strict=True):
        case.check(arrays)


def option_cases(
    device: int,
    product_given: bool = False,
    normalizes: tuple[bool, ...] = (False, True),
    make: Callable[..., HeadCase] = HeadCase,
) -> list[HeadCase]:
    """Every combination of the options, at sizes with rows that fill their vectors and that do not."""
    cases = []
    modes = ({"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.8, "nesterov": True})
    flags = itertools.product(modes, ("after", "before"), (False, True), (0.0, 0.05), normalizes)
    for i, (mode, absorb, maximize, forget, normalize) in enumerate(flags):
        hyper = Hyperparameters(
            lr=0.1, weight_decay=0.01, maximize=maximize, absorb=absorb, forget=forget, normalize=normalize, **mode
        )
        cases.append(
            make(
                s=33 if i % 3 else 40,
                classes=6,
                dtype=DTYPES[i % 4],
                device=device,
                hyper=hyper,
                steps=3,
                steps_before=i % 2,
                with_momentum=mode["momentum"] > 0,
                scalar_pointers=i % 5 == 0,
                nu=(None, 0.0, 20.0)[(i + i // 3) % 3],
                grad_scale=8.0 if i % 3 == 0 else None,
                found_inf=((1, 0, 0), (0, 1, 0), ())[i % 3 if not product_given else 1],
                product_given=product_given,
                absorbs=i % 7 != 6,
                order=i,
            )
        )
    return cases


@pytest.mark.parametrize("s", SIZES)
def test_head_step_sizes(fast, tmp_path, s):
    """In turn on devices where the rows of P stay on chip and where they do not."""
    devices = itertools.cycle((FORTY, THREE, FIVE_BY_TWO) if s > 33 else (H100, THREE, FIVE_BY_TWO, ONE))
    absorbs = itertools.cycle(("after", "before"))
    cases = []
    for classes, dtype in itertools.product(CLASSES, DTYPES):
        hyper = replace(USUAL, absorb=next(absorbs))
        cases.append(HeadCase(s, classes, dtype, next(devices), hyper, steps=2 if s > 33 else 5, order=s))
    check_head_steps(fast, tmp_path, cases)


def test_head_step_as_many_blocks_as_an_h100(fast, tmp_path):
    cases = [HeadCase(1030, 6, torch.float32, H100), HeadCase(512, 17, torch.bfloat16, H100)]
    check_head_steps(fast, tmp_path, cases)


@pytest.mark.parametrize("device", [THREE, ONE], ids=["one launch", "several launches"])
def test_head_step_options(sanitized, tmp_path, device):
    check_head_steps(sanitized, tmp_path, option_cases(device))


def test_head_step_product_given_options(sanitized, tmp_path):
    check_head_steps(sanitized, tmp_path, option_cases(THREE, product_given=True))


def test_head_step_sanitized_shapes(sanitized, tmp_path):
    """Last tiles, last blocks and last passes that are not full, aligned rows and not, on each path."""
    shapes = [(136, 6), (136, 35), (129, 17), (260, 3), (7, 101), (1, 1), (40, 0)]
    cases = [
        HeadCase(s, classes, dtype, device, misaligned=classes == 17)
        for (s, classes), device in itertools.product(shapes, (THREE, FORTY))
        for dtype in ((torch.float32, torch.bfloat16) if s > 100 else DTYPES)
    ]
    check_head_steps(sanitized, tmp_path, cases)


def test_found_inf_leaves_every_bit(sanitized, tmp_path):
    cases = [
        HeadCase(
            33, 6, dtype, device, Hyperparameters(momentum=0.9, absorb=absorb), found_inf=(1, 1), product_given=given
        )
        for dtype, device, absorb, given in itertools.product(DTYPES, (THREE, ONE), ("after", "before"), (False, True))
    ]
    for case, after in zip(cases, harness.run(sanitized, [c.call() for c in cases], tmp_path), strict=True):
        for before, now in zip(case.call().arrays[:4], after, strict=False):
            assert harness.to_bytes(now) == harness.to_bytes(before), case


@pytest.mark.parametrize("forget, normalize", [(0.0, False), (0.1, False), (0.1, True)])
def test_rls_update(fast, tmp_path, forget, normalize):
    calls, checks = [], []
    for s, dtype, device in itertools.product(SIZES, FLOATS, (FORTY, THREE)):
        generator = torch.Generator().manual_seed(s)
        P = random_projection(s).to(dtype)
        h = torch.randn(s, generator=generator).to(dtype)
        calls.append(Call(harness.RLS_UPDATE, [harness.DTYPES[dtype], s, normalize], [0.3, forget], [P, h], device, s))
        arguments = (0.3, forget, normalize)
        checks.append(
            (reference.rls_update(P.double(), h.double(), *arguments), reference.rls_update(P, h, *arguments))
        )
    for call, (exact, plain), (P, h) in zip(calls, checks, harness.run(fast, calls, tmp_path), strict=True):
        assert_accurate(P, exact, plain, str(call.integers))
        assert torch.equal(P, P.T)
        assert torch.equal(h, call.arrays[1])


def test_rls_update_signed_and_not_absorbed(sanitized, tmp_path):
    """A negative d mends P; one that is 0, infinite or NaN leaves every bit of it, even with forget and normalize."""
    h = torch.ones(9)
    cases = [(-torch.eye(9), h, False)]
    cases += [(torch.eye(9), h * value, True) for value in (float("inf"), NAN, 1e30)] + [(torch.zeros(9, 9), h, True)]
    calls = [
        Call(harness.RLS_UPDATE, [0, 9, 1], [0.0, 0.1], [P, h], device)
        for device in (THREE, ONE, FORTY)
        for P, h, _ in cases
    ]
    for call, case, (P, _) in zip(calls, cases * 3, harness.run(sanitized, calls, tmp_path), strict=True):
        exact = reference.rls_update(*(a.double() for a in call.arrays), 0.0, 0.1, True)
        if case[2]:
            assert torch.equal(P, case[0])
        else:
            assert_accurate(P, exact, reference.rls_update(*call.arrays, 0.0, 0.1, True), "signed update")


def mean_calls() -> list[tuple[Call, Tensor]]:
    calls = []
    for n, s, dtype in itertools.product(BATCHES, SIZES, DTYPES):
        stride = s + n % 3
        features = torch.full((n, stride), NAN)
        features[:, :s] = 3 + torch.randn(n, s, generator=torch.Generator().manual_seed(n * s))
        features = features.to(dtype)
        # The last row ends with the last element: nothing beyond it may be read.
        storage = features.flatten()[: (n - 1) * stride + s]
        mean = torch.full((s,), NAN, dtype=accumulate_dtype(dtype))
        call = Call(harness.FEATURE_MEAN, [harness.DTYPES[dtype], n, s, stride], (), [storage, mean], seed=n)
        calls.append((call, features[:, :s]))
    return calls


@pytest.mark.parametrize("build", ["fast", "sanitized"])
def test_feature_mean(build, request, tmp_path):
    calls = [(c, f) for c, f in mean_calls() if build == "fast" or c.integers[2] < 520]
    results = harness.run(request.getfixturevalue(build), [call for call, _ in calls], tmp_path)
    for (call, features), (_, mean) in zip(calls, results, strict=True):
        exact, plain = features.double().mean(0), reference.feature_mean(features)
        assert_accurate(mean, exact, plain, str(call.integers))


def fusion_call(logits: Tensor, present: Tensor | None, device: int = H100, seed: int = 0) -> Call:
    """Every other seed has logits that are not aligned to 16 bytes."""
    m, n, c = logits.shape
    accumulate = accumulate_dtype(logits.dtype)
    if present is not None:
        logits = logits.masked_fill(~present.unsqueeze(-1), NAN)  # not to be read
        present = present.to(torch.uint8)
    outputs = [torch.full((n, c), NAN, dtype=logits.dtype), torch.full((m, n), NAN, dtype=accumulate)]
    integers = [harness.DTYPES[logits.dtype], m, n, c, 0]
    offsets = {0: seed % 2 * logits.element_size()}
    return Call(harness.ENTROPY_FUSION, integers, (), [logits, present, *outputs, None], device, seed, offsets)


def random_logits(m: int, n: int, c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Samples of every temperature, some with logits of ±10⁴ or −∞, some with modalities missing or with none."""
    generator = torch.Generator().manual_seed(m * n + c)
    logits = torch.randn(m, n, c, generator=generator) * torch.logspace(-2, 2, n).view(1, n, 1)
    if c > 1:
        logits[0, ::3, 0] = -float("inf")
        logits[:, 1::5, c - 1] = 1e4
        logits[0, 2::7] = -1e4
    present = torch.rand(m, n, generator=generator) < 0.7
    present[:, n // 2] = False
    return logits.to(dtype), present


def check_fusions(program: Path, directory: Path, shapes: list[tuple[int, int, int]], dtypes, device: int) -> None:
    cases = []
    for shape, dtype, with_present in itertools.product(shapes, dtypes, (False, True)):
        logits, present = random_logits(*shape, dtype)
        cases.append((logits, present if with_present else None))
    calls = [fusion_call(*case, device, seed=i // 2) for i, case in enumerate(cases)]
    for (logits, present), (_, _, fused, weights, _) in zip(cases, harness.run(program, calls, directory), strict=True):
        exact, plain = reference.entropy_fusion(logits.double(), present), reference.entropy_fusion(logits, present)
        infinite = exact[0].isinf()
        what = f"{logits.dtype} {tuple(logits.shape)}"
        assert_accurate(weights, exact[1], plain[1], f"weights of {what}")
        assert torch.equal(fused[infinite].double(), exact[0][infinite])
        kept = [value.masked_fill(infinite, 0) for value in (fused, exact[0], plain[0])]
        # Each sample by itself: large logits of one must not excuse errors in another.
        for sample in range(len(fused)):
            scale = logits[:, sample].double().masked_fill(logits[:, sample].isinf(), 0)
            assert_accurate(*(value[sample] for value in kept), f"fused {sample} of {what}", scale)
        if present is not None:
            assert not weights[~present].any() and not fused[~present.any(0)].any()


def test_entropy_fusion(fast, tmp_path):
    shapes = [(m, n, c) for m, n, c in itertools.product((1, 3), BATCHES, (2, 6, 101))]
    check_fusions(fast, tmp_path, shapes, DTYPES, H100)


def test_entropy_fusion_many_classes(fast, tmp_path):
    """Rows that stay on chip, and rows that do not."""
    check_fusions(fast, tmp_path, [(2, 3, 4096), (2, 3, 9001)], DTYPES, H100)
    check_fusions(fast, tmp_path, [(2, 2, 100_000)], (torch.float32, torch.bfloat16), H100)


def test_entropy_fusion_sanitized(sanitized, tmp_path):
    shapes = [(1, 1, 1), (2, 5, 8), (3, 9, 6), (2, 4, 101), (2, 2, 1500), (40, 2, 5), (2, 2, 16000)]
    check_fusions(sanitized, tmp_path, shapes, DTYPES, FIVE_BY_TWO)


def test_entropy_fusion_of_differences_that_overflow(fast, tmp_path):
    """Finite logits whose differences are not: the running maximum is raised by an infinite shift."""
    logits = torch.zeros(2, 2, 600)
    logits[0] = -3e38
    logits[0, :, [7, 300]] = 3e38
    for dtype in (torch.float32, torch.bfloat16):
        ((_, _, fused, weights, _),) = harness.run(fast, [fusion_call(logits.to(dtype), None)], tmp_path)
        torch.testing.assert_close(weights, reference.entropy_fusion(logits.to(dtype))[1])
        assert fused.isfinite().all()


def test_entropy_fusion_sample_alone(fast, tmp_path):
    """A sample's result has the same bits whatever else is in the batch."""
    logits, present = random_logits(3, 64, 101, torch.float32)
    alone = [fusion_call(logits[:, i : i + 1], present[:, i : i + 1]) for i in range(0, 64, 9)]
    results = harness.run(fast, [fusion_call(logits, present), *alone], tmp_path)
    for i, result in zip(range(0, 64, 9), results[1:], strict=True):
        assert torch.equal(result[2][0], results[0][2][i]) and torch.equal(result[3][:, 0], results[0][3][:, i])


def test_same_bits_in_every_order(fast, tmp_path):
    """Threads, blocks and asynchronous copies run in another order for each seed, with the same result."""
    hyper = Hyperparameters(momentum=0.9, absorb="before", normalize=True, forget=0.01)
    cases = [HeadCase(s, 6, torch.float32, device, hyper) for s in (33, 140) for device in (THREE, FORTY, ONE)]
    calls = [case.call() for case in cases] + [call for call, _ in mean_calls() if call.integers[2] in (33, 513)]
    calls += [fusion_call(*random_logits(3, 17, 101, dtype)) for dtype in DTYPES]
    expected = harness.run(fast, calls, tmp_path)
    for seed in (1, 2, 3):
        for call, one, other in zip(
            calls, expected, harness.run(fast, [replace(c, seed=seed) for c in calls], tmp_path), strict=True
        ):
            for a, b in zip(one, other, strict=True):
                assert (a is None and b is None) or harness.to_bytes(a) == harness.to_bytes(b), call.integers


def test_launches(fast, tmp_path):
    """One for each step where the rows of P fit on chip, two where not, and one more to normalize.

    Two also where another process holds so much of the device that the one launch is refused.
    """
    normalize = Hyperparameters(normalize=True)
    expected = [
        (HeadCase(512, 6, torch.float32, H100, steps=1), 1),
        (HeadCase(512, 6, torch.float32, FORTY, normalize, steps=1), 1),
        (HeadCase(512, 6, torch.float32, FORTY, steps=1, product_given=True), 2),
        (HeadCase(512, 6, torch.float32, THREE, steps=1), 2),
        (HeadCase(512, 6, torch.float32, PARTLY_HELD, steps=1), 2),
        (HeadCase(512, 6, torch.float32, THREE, normalize, steps=1), 3),
    ]
    calls = [case.call() for case, _ in expected]
    for (case, _), arrays in zip(expected, harness.run(fast, calls, tmp_path), strict=True):
        case.check(arrays)
    assert [call.launches for call in calls] == [launches for _, launches in expected]


def test_driver_refuses_bad_arguments(fast, tmp_path):
    call = HeadCase(7, 2, torch.float32, THREE).call()
    no_step = replace(call, arrays=[*call.arrays[:3], None, *call.arrays[4:]])
    no_projection = replace(call, arrays=[*call.arrays[:2], None, *call.arrays[3:]])
    no_grad = replace(call, arrays=[*call.arrays[:4], None, *call.arrays[5:]])
    with_rows = replace(call, arrays=[*call.arrays[:11], torch.zeros(4, 7), None, None])
    for bad, error in ((no_step, 1), (no_grad, 1), (no_projection, 801), (with_rows, 801)):
        with pytest.raises(RuntimeError, match=f"cudaError_t {error}:"):
            harness.run(fast, [bad], tmp_path)
        assert bad.launches == 0


# Defects put into a copy of the sources: file, what is replaced (once), by what, and whether only a sanitizer sees it.
DEFECTS = {
    "barrier of the mean": ("feature_mean.cu", "    __syncthreads();\n", "", False),
    "bounds check of the mean": ("feature_mean.cu", "if (column < s) {", "{", True),
    "bounds check of the result": ("feature_mean.cu", "thread_row == 0 && column < s", "thread_row == 0", True),
    "barrier of the fusion": ("entropy_fusion.cu", "  __syncthreads();\n  A smallest", "  A smallest", False),
    "barrier after tiles arrive": ("product.cuh", "__syncthreads();  // the step's tiles have arrived", "", False),
    "barrier before tiles go": ("product.cuh", "__syncthreads();  // the stage may be overwritten", "", False),
    "wait for copies": ("product.cuh", "    __pipeline_wait_prior(1);\n", "", False),
    "grid barrier": ("head_step.cu", "  grid_barrier();\n  if (a.step", "  if (a.step", False),
    "step read late": ("head_step.cu", "  multiply<kAligned>(tiling, shared, a.grad, a.feature_mean, a.P",
                       "  if (a.step && blockIdx.x == 0 && threadIdx.x == 0) *a.step += 1.0f;\n"
                       "  multiply<kAligned>(tiling, shared, a.grad, a.feature_mean, a.P", False),
    "room for tiles": ("product.cuh", "static_cast<size_t>(kStages) * grad_rows() * tile * sizeof(T)",
                       "grad_rows() * tile * sizeof(T)", True),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_caught(request, tmp_path, name):
    """The emulation can fail: each defect gives a wrong answer, or a report where only a sanitizer can see it."""
    file, old, new, needs_sanitizer = DEFECTS[name]
    kernels = tmp_path / "kernels"
    shutil.copytree(harness.KERNELS, kernels)
    text = (kernels / file).read_text()
    assert text.count(old) >= 1
    (kernels / file).write_text(text.replace(old, new, 1))
    changed = file if file.endswith(".cu") else "head_step.cu"
    flags = harness.SANITIZED if needs_sanitizer else harness.FAST
    base = request.getfixturevalue("sanitized" if needs_sanitizer else "fast").parent
    program = harness.rebuild(tmp_path / "build", flags, kernels, changed, base)
    if changed == "feature_mean.cu":
        calls = [(call, features) for call, features in mean_calls() if call.integers[2] == 33]
        with pytest.raises((AssertionError, RuntimeError), match=r"error|Sanitizer"):
            for (_, features), (_, mean) in zip(
                calls, harness.run(program, [call for call, _ in calls], tmp_path), strict=True
            ):
                assert_accurate(mean, features.double().mean(0), reference.feature_mean(features), "mean")
    elif changed == "entropy_fusion.cu":
        with pytest.raises(AssertionError, match="error"):
            check_fusions(program, tmp_path, [(3, 9, 101)], FLOATS, H100)
    else:
        cases = [HeadCase(s, 20, torch.float32, THREE, order=i, steps=3) for i, s in enumerate((40, 40, 33, 96))]
        with pytest.raises((AssertionError, RuntimeError), match=r"error|step of|Sanitizer|symmetric"):
            check_head_steps(program, tmp_path, cases)
