"""The CUDA kernels of the rank form P = βI − KᵀK, run on the host by tests/cuda_emulation, against the reference."""

from __future__ import annotations

import functools
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import needs_kernels
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import harness
from harness import FORTY, H100, ONE
from test_cuda_emulation import DTYPES, FLOATS, NAN, HeadCase, assert_accurate, check_head_steps, option_cases

from mla_ext import backends, reference
from mla_ext.backends import compiled
from mla_ext.projection import Projection
from mla_ext.reference import Hyperparameters
from mla_ext.step import HeadStep

pytestmark = pytest.mark.skipif(harness.UNAVAILABLE is not None, reason=str(harness.UNAVAILABLE))

WEIGHT, BUFFER, STEP, ROWS, BETA, COUNT = 0, 1, 3, 11, 12, 13  # arrays of the call


def dense(beta: Tensor, rows: Tensor) -> Tensor:
    """P as a matrix, in float64."""
    return beta.double() * torch.eye(rows.shape[1], dtype=torch.float64) - rows.double().T @ rows.double()


@dataclass(frozen=True)
class RankCase(HeadCase):
    """A `HeadCase` whose P is in the rank form, with room for `capacity` rows, `used` of them in use."""

    capacity: int = 6
    used: int = 0

    def inputs(self) -> dict[str, Tensor]:
        """Three directions over and over, and a little noise: among equally strong ones rounding would decide."""
        x = super().inputs()
        generator = torch.Generator().manual_seed(self.s)
        directions = 3 * torch.randn(3, self.s, generator=generator)
        noise = torch.randn(self.used + self.steps, self.s, generator=generator)
        means = (directions.repeat(self.used + self.steps, 1)[: len(noise)] + 0.1 * noise).double() / self.s**0.5
        beta, rows = torch.ones((), dtype=torch.float64), torch.zeros(0, self.s, dtype=torch.float64)
        for mean in means[: self.used]:
            beta, rows = reference.rank_update(beta, rows, mean, 0.1)
        x["means"] = means[self.used :].to(self.accumulate)
        x["beta"], x["rows"] = beta.to(self.accumulate), rows.to(self.accumulate)
        return x

    def start(self, x: dict[str, Tensor]) -> Any:
        return x["beta"], x["rows"]

    def product(self, grad: Tensor, P: Any) -> Tensor:
        return reference.rank_product(grad.to(P[0].dtype), *P)

    def advance(self, weight, grad, buffer, P, mean, step, hyper) -> tuple[Tensor, Tensor | None, Any]:
        weight, buffer, *P = reference.rank_head_step(
            weight, grad.to(P[0].dtype), buffer, *P, self.capacity, mean, step, hyper
        )
        return weight, buffer, P

    def form(self, x: dict[str, Tensor]) -> tuple[int, Tensor | None, list[Tensor | None]]:
        """What is not in use is NaN: nobody may read it."""
        unused = torch.full((self.capacity - self.used, self.s), NAN, dtype=self.accumulate)
        return self.capacity, None, [torch.cat([x["rows"], unused]), x["beta"], torch.tensor(self.used)]

    def check_projection(self, arrays: list[Tensor | None], exact: Any, plain: Any) -> None:
        rows, beta, count = arrays[ROWS], arrays[BETA], arrays[COUNT]
        assert count == len(exact[1]), f"count of {self}"
        P, true, other = dense(beta, rows[:count]), dense(*exact), dense(*plain)
        to = self.accumulate  # the dtype decides what is accurate
        assert_accurate(P.to(to), true, other.to(to), f"P of {self}", scale=torch.ones(()))


SIZES = [(1, 1, 2), (5, 2, 8), (7, 2, 3), (33, 6, 6), (40, 17, 5), (128, 6, 8), (132, 35, 4), (261, 3, 9)]
MOMENTUM = Hyperparameters(lr=0.1, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("product_given", [False, True])
@pytest.mark.parametrize("absorb", ["after", "before"])
def test_sizes(fast, tmp_path, absorb, product_given):
    """Through several compressions; odd and aligned rows, groups of gradients and tiles of rows that are not full.

    With the product given it is that of the exact P, which fits ours only up to the first compression.
    """
    hyper = replace(MOMENTUM, absorb=absorb)
    cases = [
        RankCase(
            s,
            C,
            dtype,
            (H100, FORTY)[i % 2],
            hyper,
            steps=R - 1 if product_given else 2 * R + 1,
            capacity=R,
            order=i,
            misaligned=s == 40,
            product_given=product_given,
        )
        for i, ((s, C, R), dtype) in enumerate(itertools.product(SIZES, DTYPES))
    ]
    check_head_steps(fast, tmp_path, cases)


@pytest.mark.parametrize("product_given", [False, True])
def test_options(sanitized, tmp_path, product_given):
    cases = option_cases(H100, product_given, (False, False), functools.partial(RankCase, capacity=3, used=1))
    check_head_steps(sanitized, tmp_path, cases)


def test_more_rows_than_a_tile_and_one_compression(fast, tmp_path):
    """The last case's K Kᵀ does not fit in shared memory: one block then works in memory."""
    cases = [
        RankCase(140, 3, torch.float32, H100, MOMENTUM, steps=2, capacity=45, used=43),
        RankCase(200, 1, torch.float64, ONE, MOMENTUM, steps=1, capacity=114, used=113),
    ]
    check_head_steps(fast, tmp_path, cases)


def changed(case: RankCase, after: list[Tensor | None]) -> list[int]:
    """The numbers of the arrays that the steps have changed."""
    before = enumerate(case.call().arrays)
    return [i for i, array in before if array is not None and harness.to_bytes(array) != harness.to_bytes(after[i])]


@pytest.mark.parametrize("absorb", ["after", "before"])
def test_found_inf_leaves_every_bit(sanitized, tmp_path, absorb):
    hyper = replace(MOMENTUM, absorb=absorb, forget=0.1)
    cases = [RankCase(33, 6, dtype, H100, hyper, capacity=3, used=2, found_inf=(1, 1)) for dtype in DTYPES]
    for case, after in zip(cases, harness.run(sanitized, [c.call() for c in cases], tmp_path), strict=True):
        assert changed(case, after) == [], case


@pytest.mark.parametrize("value", [NAN, float("inf"), 1e30])
def test_what_cannot_be_absorbed_leaves_p(sanitized, tmp_path, value):
    """The weights step, with P as it was. K has room for one row, so another answer would compress it."""

    @dataclass(frozen=True)
    class Bad(RankCase):
        def inputs(self) -> dict[str, Tensor]:
            x = super().inputs()
            x["means"][:, 1] = value
            return x

    hypers = [replace(MOMENTUM, absorb=absorb, forget=0.1) for absorb in ("after", "before")]
    cases = [Bad(33, 6, torch.float32, H100, hyper, capacity=3, used=2) for hyper in hypers]
    for case, after in zip(cases, harness.run(sanitized, [c.call() for c in cases], tmp_path), strict=True):
        case.check(after)
        assert changed(case, after) == [WEIGHT, BUFFER, STEP], case


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_features_that_p_has_almost_absorbed(fast, tmp_path, noise):
    """Almost the same features again and again, and a tiny alpha: P stays between 0 and the identity."""

    @dataclass(frozen=True)
    class Same(RankCase):
        def inputs(self) -> dict[str, Tensor]:
            x = super().inputs()
            x["means"] = x["means"][:1] + noise * x["means"]
            return x

    hyper = replace(MOMENTUM, alpha=1e-30)
    cases = [Same(24, 2, dtype, H100, hyper, steps=40, capacity=8) for dtype in FLOATS]
    for case, after in zip(cases, harness.run(fast, [case.call() for case in cases], tmp_path), strict=True):
        rows, beta, count = after[ROWS], after[BETA], after[COUNT]
        values = torch.linalg.eigvalsh(dense(beta, rows[:count]))
        tiny = 100 * torch.finfo(rows.dtype).eps
        assert -tiny <= values[0] and values[-1] <= 1 + tiny, case
        h = case.inputs()["means"][0].double()
        assert (dense(beta, rows[:count]) @ h).abs().max() < 1e-3 * h.abs().max()  # P has absorbed it


def test_a_count_beyond_the_rows_touches_no_other_memory(sanitized, tmp_path):
    call = RankCase(33, 2, torch.float32, H100, MOMENTUM, capacity=4, used=3).call()
    for count in (4, 1 << 40, -1):
        wrong = replace(call, arrays=[*call.arrays[:COUNT], torch.tensor(count), *call.arrays[COUNT + 1 :]])
        (after,) = harness.run(sanitized, [wrong], tmp_path)
        assert 0 <= after[COUNT] < 4


def test_same_bits_in_every_order(fast, tmp_path):
    hypers = [replace(MOMENTUM, absorb=absorb, forget=0.01) for absorb in ("after", "before")]
    calls = [RankCase(70, 18, torch.float32, H100, hyper, steps=7, capacity=4).call() for hyper in hypers]
    expected = harness.run(fast, calls, tmp_path)
    for seed in (1, 2):
        others = harness.run(fast, [replace(call, seed=seed) for call in calls], tmp_path)
        for a, b in itertools.chain.from_iterable(map(zip, expected, others)):
            assert (a is None and b is None) or harness.to_bytes(a) == harness.to_bytes(b)


def test_launches(fast, tmp_path):
    """Four for each step whether K gets full or not; two without features."""
    case = RankCase(64, 6, torch.float32, H100, MOMENTUM, capacity=4)
    calls = [replace(case, steps=4).call(), replace(case, device=FORTY).call(), replace(case, absorbs=False).call()]
    harness.run(fast, calls, tmp_path)
    assert [call.launches for call in calls] == [16, 8, 4]


def test_bad_arguments_are_refused(fast, tmp_path):
    case = RankCase(7, 2, torch.float32, H100, MOMENTUM)
    call = case.call()
    without = [
        replace(call, arrays=[*call.arrays[:i], None, *call.arrays[i + 1 :]]) for i in (WEIGHT, STEP, ROWS, COUNT)
    ]
    both = replace(call, arrays=[*call.arrays[:2], torch.eye(7), *call.arrays[3:]])
    bad = [
        *without,
        replace(case, capacity=1).call(),
        replace(case, hyper=Hyperparameters(normalize=True)).call(),
        both,
    ]
    for one, error in zip(bad, [1] * 6 + [801], strict=True):
        with pytest.raises(RuntimeError, match=f"cudaError_t {error}:"):
            harness.run(fast, [one], tmp_path)
        assert one.launches == 0


def test_what_the_optimizer_asks_the_backend():
    """How many rows with rank="auto"; and a P with rows of a CPU is settled without a kernel for it."""
    cuda = backends.BACKENDS["cuda"]
    assert [cuda.rank(s) for s in (64, 2048, 2049, 8192)] == [None, None, 64, 64]
    P = Projection(torch.eye(5), None, torch.ones(3, 5), torch.tensor(2))
    expected = P.dense()
    cuda.settle_(P)
    assert torch.equal(P.base, expected) and P.count == 0


@needs_kernels
@pytest.mark.parametrize("name", ["momentum", "dampening", "weight_decay", "forget"])
def test_a_number_on_the_device_is_refused_where_a_graph_would_keep_it(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    hyper = Hyperparameters(**{name: torch.empty((), device="meta")})
    weight = torch.ones(2, 3)
    step = HeadStep(weight, weight, None, Projection(torch.eye(3)), None, torch.zeros(()), hyper)
    with pytest.raises(RuntimeError, match=f"{name}: expected a number, .* to capture a step; got"):
        backends.BACKENDS["cuda"].head_step_(step)
    assert torch.equal(weight, torch.ones(2, 3))


def test_a_number_on_the_device_is_read_when_it_has_changed(monkeypatch):
    class OnDevice(torch.Tensor):
        """What the host must wait for."""

        device = torch.device("cuda")

        def __float__(self):
            reads.append(1)
            return self.as_subclass(torch.Tensor).item()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    reads = []
    value = torch.tensor(0.5).as_subclass(OnDevice)
    assert [compiled._number("forget", value) for _ in range(3)] == [0.5] * 3
    value.as_subclass(torch.Tensor).fill_(0.25)
    assert [compiled._number("forget", value) for _ in range(3)] == [0.25] * 3
    assert len(reads) == 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert compiled._number("forget", value) == 0.25
