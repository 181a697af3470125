"""What tests/cuda_emulation/recorder.cpp sees the CUDA kernels do: nothing that another order of the threads would
break, and no more bytes, sectors and bank conflicts than they must.

The counts are in docs/kernels.md. To write them anew: MLA_EXT_UPDATE=1 python -m pytest tests/test_recorder.py
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import harness
import tables
from harness import FORTY, H100, ONE, SHARED, THREE, Call, Launch
from test_cuda_emulation import DTYPES, HeadCase, fusion_call, mean_calls, random_logits
from test_cuda_rank import COUNT, ROWS, RankCase

from mla_ext.reference import Hyperparameters

pytestmark = pytest.mark.skipif(harness.UNAVAILABLE is not None, reason=str(harness.UNAVAILABLE))

WEIGHT, P, GRAD = 0, 2, 4  # arrays of a head step's call
FORGETTING = Hyperparameters(momentum=0.9, forget=0.1)
NORMALIZED = Hyperparameters(momentum=0.9, absorb="before", normalize=True, forget=0.1)


def plain_calls() -> list[Call]:
    """Every kernel and type, at sizes that are aligned or not, that fill their last tile, block and pass or do not."""
    shapes = ((1, 1), (7, 2), (33, 6), (40, 6), (129, 17), (128, 6))
    cases = [
        HeadCase(s, C, dtype, device, hyper, misaligned=hyper is NORMALIZED and C == 6)
        for (s, C), dtype, (device, hyper) in itertools.product(
            shapes, DTYPES, ((THREE, Hyperparameters(momentum=0.9)), (ONE, NORMALIZED))
        )
    ]
    cases += [replace(case, device=THREE, hyper=NORMALIZED) for case in cases if case.s == 40]
    cases += [replace(case, product_given=True) for case in cases if case.s == 33]
    cases += [
        RankCase(s, C, dtype, device, replace(FORGETTING, absorb=absorb), steps=4, capacity=3, misaligned=C == 17)
        for (s, C), dtype, (device, absorb) in itertools.product(shapes, DTYPES, ((THREE, "after"), (FORTY, "before")))
    ]
    calls = [case.call() for case in cases]
    calls += [call for call, _ in mean_calls() if call.integers[2] < 50]
    calls += [
        fusion_call(*random_logits(M, N, C, dtype), seed=C)
        for (M, N, C), dtype in itertools.product(((3, 9, 101), (2, 3, 8), (1, 1, 2)), DTYPES)
    ]
    return calls


def test_no_false_alarm(recorder, tmp_path):
    calls = plain_calls()
    for call, launches in zip(calls, harness.record(recorder, calls, tmp_path), strict=True):
        assert launches
        for launch in launches:
            assert not launch.wrong, f"{call.operation} {call.integers} on device {call.device}"


@dataclass(frozen=True)
class Budget:
    """A head step of float32 with momentum, and the bytes that it must move."""

    s: int
    C: int
    device: int
    projection: ClassVar[int] = P  # or K: its array

    @property
    def rows(self) -> str:
        return ""

    @property
    def multiply_adds(self) -> int:
        return (self.C + 1) * self.s**2

    def call(self) -> Call:
        hyper = Hyperparameters(momentum=0.9)
        return HeadCase(self.s, self.C, torch.float32, self.device, hyper, steps=1, steps_before=1).call()

    def model(self, launches: Sequence[Launch]) -> int:
        """Bytes: P, weights, and what each block needs of G, h̄, k and of the partial sums of d."""
        s, C = self.s, self.C
        first, last = launches[0], launches[-1]
        weights, inputs = 4 * C * s, first.blocks * (C + 1) * s + s  # in elements
        sums = first.blocks * (1 + last.blocks * last.threads // 32)
        if len(launches) == 1:
            return 4 * (2 * s * s + weights + inputs + s + first.blocks * s + sums)
        passes, update_blocks = ceil(C / 16), last.blocks - C
        return 4 * ((passes + 2) * s * s + weights + 2 * C * s + inputs + s + update_blocks * s + s + sums)

    def excess(self, launches: Sequence[Launch]) -> list[str]:
        """What is beyond the budget."""
        found = []
        total = sum(t.bytes for launch in launches for array, t in launch.traffic.items() if array != SHARED)
        if total > 1.05 * self.model(launches):
            found.append("bytes")
        # Not of W and h̄: a block of the one-launch step has a few columns of them, not whole sectors.
        ideal = (self.projection, GRAD)
        if any(launch.of(array).sectors > launch.of(array).ideal for launch in launches for array in ideal):
            found.append("sectors")
        if any(launch.of(SHARED).wavefronts > 1.01 * launch.of(SHARED).smallest for launch in launches):
            found.append("bank conflicts")
        return found


@dataclass(frozen=True)
class RankBudget(Budget):
    """The same in the rank form, with room for R rows, `used` of them in use: 64 rows and 32 columns to a block."""

    R: int
    used: int
    projection: ClassVar[int] = ROWS

    @property
    def rows(self) -> str:
        return f"{self.used} of {self.R}"

    @property
    def multiply_adds(self) -> int:
        return 2 * (self.C + 1) * self.used * self.s

    def call(self) -> Call:
        hyper = Hyperparameters(momentum=0.9)
        options = {"steps": 1, "steps_before": 1, "capacity": self.R, "used": self.used}
        return RankCase(self.s, self.C, torch.float32, self.device, hyper, **options).call()

    def model(self, launches: Sequence[Launch]) -> int:
        """Bytes: K and what each warp needs of G and h̄; K, the weights, and in each block t; the new row; and where K
        gets full, K Kᵀ from tiles of 8 × 8, and the product of the R/2 rows that stay."""
        s, C, R, used = self.s, self.C, self.R, self.used
        slices, groups, chunks, warps = ceil(s / 32), max(1, ceil(C / 16)), min(8, ceil(s / 128)), 8
        read_at_once = sum(4 * ceil(min(16, C - c) / 4) for c in range(0, C, 16))
        t = chunks * used * (C + 1)
        products = groups * used * s + ceil(used / 2) * (read_at_once + 1) * s + t
        project = groups * used * s + 5 * C * s + warps * groups * s + slices * (t + (groups - 1) * chunks * used) + s
        absorb = slices * warps * (32 + 3 * slices) + s
        elements = products + project + absorb
        is_full = used + 1 == R
        if is_full:
            tiles = ceil(R / 8) * (ceil(R / 8) + 1) // 2
            elements += tiles * 8 * 9 * s + 2 * R**2 - s
            elements += R // 2 * (R + 3) * s + launches[3].blocks * (2 * R**2 + ceil(R / 2) * 3 * slices)
        numbers = (8, 16, 20, 28) if is_full else (8, 16, 28, 8)  # count, beta and the like, for each thread
        threads = (launch.blocks * launch.threads for launch in launches)
        return 4 * elements + sum(n * each for n, each in zip(numbers, threads, strict=True))


BUDGETS = [Budget(512, 6, H100), Budget(512, 6, THREE), Budget(256, 20, FORTY), Budget(256, 20, ONE)]
BUDGETS += [Budget(256, 101, FORTY)]
BUDGETS += [RankBudget(512, 6, H100, 64, 40), RankBudget(1024, 20, H100, 16, 12), RankBudget(512, 6, H100, 16, 15)]


@pytest.fixture(scope="module")
def counts(recorder, tmp_path_factory) -> list[list[Launch]]:
    return harness.record(recorder, [budget.call() for budget in BUDGETS], tmp_path_factory.mktemp("counts"))


def test_budgets(counts):
    for budget, launches in zip(BUDGETS, counts, strict=True):
        assert budget.excess(launches) == [], budget
        assert not any(launch.wrong for launch in launches)
        model = budget.model(launches)
        assert 0 < sum(launch.of(budget.projection).bytes for launch in launches) < model  # the model is not of nothing


TITLE = "What a step moves"


def table(counts: list[list[Launch]]) -> str:
    lines = [
        f"## {TITLE}",
        "",
        "Counted on the host by tests/cuda_emulation/recorder.cpp, in float32 with momentum; nothing here is a time.",
        "Bytes are those that threads ask for: a GPU's caches serve some of them. The model is `Budget.model` in",
        "tests/test_recorder.py. Sectors are of 32 bytes, and given over the fewest: those of the same bytes side by",
        "side. Shared is the bytes of shared memory that are read for each multiply-add of Z = [G; h̄] P. Conflicts are",
        "the wavefronts over those without two words in one bank. Where the table has rows, P = βI − KᵀK has so many",
        "of R rows in use, and what it says of P is of K. In the last line K gets full, and is compressed.",
        "",
        "| s | C | rows | launches | blocks | MB of P | MB in all | model | sectors: P | G | W | shared | conflicts |",
        f"|{'---:|' * 13}",
    ]
    for budget, launches in zip(BUDGETS, counts, strict=True):
        total = sum(t.bytes for launch in launches for array, t in launch.traffic.items() if array != SHARED)

        def ratio(array: int, launches: Sequence[Launch] = launches) -> str:
            traffic = [launch.of(array) for launch in launches]
            return f"{sum(t.sectors for t in traffic) / sum(t.ideal for t in traffic):.2f}"

        shared = [launch.of(SHARED) for launch in launches]
        conflicts = sum(t.wavefronts for t in shared) / sum(t.smallest for t in shared)
        blocks = " + ".join(str(launch.blocks) for launch in launches)
        cells = [budget.s, budget.C, budget.rows, len(launches), blocks]
        cells += [f"{sum(launch.of(budget.projection).bytes for launch in launches) / 1e6:.3f}", f"{total / 1e6:.3f}"]
        cells += [f"{budget.model(launches) / 1e6:.3f}", ratio(budget.projection), ratio(GRAD), ratio(WEIGHT)]
        product = launches[: 1 if budget.projection == P else 2]
        cells += [f"{sum(launch.of(SHARED).read for launch in product) / budget.multiply_adds:.2f}"]
        cells += [f"{conflicts:.3f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def test_table_is_up_to_date(counts):
    tables.update(TITLE, table(counts))
    assert tables.section(TITLE) == table(counts), "docs/kernels.md is out of date: run with MLA_EXT_UPDATE=1"


@dataclass(frozen=True)
class Defect:
    """Put into a copy of the kernels, behind the question whether this run is to show it: `file`, what is replaced
    there (once), by what, the call that shows it, and what the recorder says."""

    file: str
    old: str
    new: str
    call: Call
    says: str


MEAN_CALL = next(call for call, _ in mean_calls() if call.integers == [0, 257, 33, 33 + 257 % 3])
FUSION = fusion_call(*random_logits(3, 9, 101, torch.float32))
SMALL = HeadCase(40, 20, torch.float32, THREE)
RANK = RankCase(70, 6, torch.float32, THREE, steps=1, capacity=40, used=36)
FULL = RankCase(70, 6, torch.float32, THREE, steps=1, capacity=12, used=11)
RACE = "race in shared memory"
NO_BARRIER = "if (!PLANTED) __syncthreads();"
DEFECTS = {
    "barrier of the mean":
        Defect("feature_mean.cu", "    __syncthreads();", f"    {NO_BARRIER}", MEAN_CALL, RACE),
    "bounds check of the mean":
        Defect("feature_mean.cu", "if (column < s) {", "if (PLANTED || column < s) {", MEAN_CALL, "outside"),
    "bounds check of the result":
        Defect("feature_mean.cu", "thread_row == 0 && column < s", "thread_row == 0 && (PLANTED || column < s)",
               MEAN_CALL, "outside"),
    "barrier of the fusion's sums":
        Defect("entropy_fusion.cu", "  __syncthreads();\n  for", f"  {NO_BARRIER}\n  for", FUSION, RACE),
    "barrier of the entropies":
        Defect("entropy_fusion.cu", "  __syncthreads();\n  A smallest", f"  {NO_BARRIER}\n  A smallest", FUSION,
               RACE),
    "barrier after tiles arrive":
        Defect("product.cuh", "__syncthreads();  // the step's tiles have arrived", NO_BARRIER, SMALL.call(),
               RACE),
    "barrier before tiles go":
        Defect("product.cuh", "__syncthreads();  // the stage may be overwritten", NO_BARRIER, SMALL.call(),
               RACE),
    "wait for copies":
        Defect("product.cuh", "__pipeline_wait_prior(1)", "__pipeline_wait_prior(PLANTED ? 2 : 1)", SMALL.call(),
               "copy in flight"),
    "room for tiles":
        Defect("product.cuh", "static_cast<size_t>(kStages) * grad_rows()", "(PLANTED ? 1 : kStages) * grad_rows()",
               SMALL.call(), "outside"),
    "grid barrier":
        Defect("head_step.cu", "  grid_barrier();\n  if (a.step", "  if (!PLANTED) grid_barrier();\n  if (a.step",
               SMALL.call(), "race in global memory"),
    "grid barrier of the norm":
        Defect("head_step.cu", "    grid_barrier();\n    inverse", "    if (!PLANTED) grid_barrier();\n    inverse",
               replace(SMALL, hyper=NORMALIZED).call(), "race in global memory"),
    "step counted early":
        Defect("head_step.cu", "  multiply<kAligned>(tiling, shared, a.grad",
               "  if (PLANTED && blockIdx.x == 0 && threadIdx.x == 0) *a.step += 1.0f;\n"
               "  multiply<kAligned>(tiling, shared, a.grad", SMALL.call(), "race in global memory"),
    "barrier of u":
        Defect("head_step.cu", "rank_one.scaled(own_k[threadIdx.x]);\n  __syncthreads();",
               f"rank_one.scaled(own_k[threadIdx.x]);\n  {NO_BARRIER}", SMALL.call(), RACE),
    "barrier of u, two launches":
        Defect("head_step.cu", "rank_one.scaled(k[first_row + threadIdx.x]);\n  __syncthreads();",
               f"rank_one.scaled(k[first_row + threadIdx.x]);\n  {NO_BARRIER}", replace(SMALL, device=ONE).call(),
               RACE),
    "barrier of a block's sum":
        Defect("reduce.cuh", "= value;\n  __syncthreads();", f"= value;\n  {NO_BARRIER}",
               replace(SMALL, hyper=NORMALIZED).call(), RACE),
    "rows that are not aligned":
        Defect("head_step.cu", "const bool aligned = ", "const bool aligned = PLANTED ? true : ",
               replace(SMALL, s=33).call(), "alignment"),
    "strided accesses of P":
        Defect("rank_one.cuh", "int column = static_cast<int>(threadIdx.x) * kWidth;",
               "int column = static_cast<int>(PLANTED ? threadIdx.x % 32 * (blockDim.x / 32) + threadIdx.x / 32 "
               ": threadIdx.x) * kWidth;", Budget(256, 6, FORTY).call(), "sectors"),
    "banks of the tiles":
        Defect("product.cuh", "(part * kWarp + lane_index()) * kWidth; column < width;",
               "(part * kWarp + (PLANTED ? lane_index() % 8 * 4 + lane_index() / 8 : lane_index())) * kWidth; "
               "column < width;",
               Budget(256, 6, FORTY).call(), "bank conflicts"),
    "order of the launches":
        Defect("rank_step.cu", "wait_for_previous_launch();", "if (!PLANTED) wait_for_previous_launch();", RANK.call(),
               "chained launch"),
    "memory touched before the last launch's end":
        Defect("compress.cu", "wait_for_previous_launch();",
               "if (PLANTED && *P.old_count < 0) return;\n  wait_for_previous_launch();", RANK.call(),
               "before the previous launch"),
    "barrier before t goes":
        Defect("rank_step.cu", "__syncthreads();  // the last tile has been used", NO_BARRIER, RANK.call(), RACE),
    "barrier after t is there":
        Defect("rank_step.cu", "    __syncthreads();\n#pragma", f"    {NO_BARRIER}\n#pragma", RANK.call(), RACE),
    "barrier of the warps' parts":
        Defect("rank_step.cu", "lane] = k;\n  __syncthreads();", f"lane] = k;\n  {NO_BARRIER}", RANK.call(), RACE),
    "bounds check of a slice":
        Defect("rank_step.cu", "is_there = column < s;", "is_there = PLANTED || column < s;", RANK.call(), "outside"),
    "count read where it is written":
        Defect("rank.cuh", "count = *P.old_count", "count = *(PLANTED ? P.count : P.old_count)",
               replace(RANK, capacity=60).call(), "race in global memory"),
    "barrier of a round":
        Defect("eigen.cuh", "__syncthreads();  // the round is over", NO_BARRIER, FULL.call(), RACE),
    "barrier of the order":
        Defect("compress.cu", "    place[i] = larger;\n  }\n  __syncthreads();",
               f"    place[i] = larger;\n  }}\n  {NO_BARRIER}", FULL.call(), RACE),
    "barrier before rows go":
        Defect("compress.cu", "__syncthreads();  // all of the old rows", f"{NO_BARRIER}  // all of the old rows",
               FULL.call(), "race in global memory"),
    "gradients read for every row":
        Defect("rank_step.cu", "c < kClasses; c += kAtOnce) {\n      if (c >= classes) break;",
               "c < kClasses; c += kAtOnce) {\n      if (!PLANTED && c >= classes) break;",
               RankBudget(256, 6, H100, 8, 6).call(), "bytes"),
    "P read in every pass":
        Defect("product.cuh", "if (pass == 0 || !tiling.keep_rows)", "if (PLANTED || pass == 0 || !tiling.keep_rows)",
               Budget(256, 20, FORTY).call(), "bytes"),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """The recorder's program of a copy of the kernels in which every defect can be asked for."""
    kernels = tmp_path_factory.mktemp("planted") / "kernels"
    shutil.copytree(harness.KERNELS, kernels)
    for number, defect in enumerate(DEFECTS.values()):
        text = (kernels / defect.file).read_text()
        assert text.count(defect.old) >= 1, defect
        new = defect.new.replace("PLANTED", f"emulation::planted({number})")
        (kernels / defect.file).write_text(text.replace(defect.old, new, 1))
    return harness.build_recorder(kernels.parent / "build", kernels)


def reported(program: Path, directory: Path, name: str, number: int | None) -> str:
    """All that the recorder says of the defect's call. No result is looked at."""
    call = DEFECTS[name].call
    try:
        (launches,) = harness.record(program, [call], directory, number)
    except RuntimeError as stopped:
        return str(stopped)
    said = [what for launch in launches for what in launch.wrong]
    if call.operation == harness.HEAD_STEP and call.integers[2] == 256:
        budget = Budget(256, call.integers[1], call.device)
        if call.arrays[P] is None:
            budget = RankBudget(256, budget.C, budget.device, R=call.integers[9], used=int(call.arrays[COUNT]))
        said += budget.excess(launches)
    return ", ".join(said)


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defects_are_reported(planted, tmp_path, name):
    number = list(DEFECTS).index(name)
    assert DEFECTS[name].says in reported(planted, tmp_path, name, number)


def test_nothing_is_reported_without_a_defect(planted, tmp_path):
    assert [reported(planted, tmp_path, name, None) for name in DEFECTS] == [""] * len(DEFECTS)
