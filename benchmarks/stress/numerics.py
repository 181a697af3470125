"""Drift of P and of the weights in float32 over long runs, against the same run in float64.

    python -m benchmarks.stress.numerics    # half an hour on one core; writes benchmarks/results/numerics.{md,png}

Both runs are a ProjectedSGD of their own, fed the same features (8 rows a step) and the same errors of the logits: the
gradient does not depend on the weights, so nothing pulls a weight that has drifted back.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mla_ext import ProjectedSGD

from .. import RESULTS
from ..machine import machine
from ..plots import canvas, save

CLASSES, ROWS, CHUNK = 6, 8, 500


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    features: Callable[[Tensor, int], Tensor]  # of float32 normals (CHUNK, ROWS, s) and the first step's number
    s: int = 64
    steps: int = 100_000
    options: dict[str, Any] = field(default_factory=dict)


def _usual(x: Tensor, first: int) -> Tensor:
    return x.relu()


def _low_rank(x: Tensor, first: int) -> Tensor:
    basis = torch.randn(4, x.shape[-1], generator=torch.Generator().manual_seed(1))
    return 100 * x[..., :4] @ basis


def _columns_apart(x: Tensor, first: int) -> Tensor:
    return x * torch.logspace(-6, 6, x.shape[-1])


def _identical(scale: float) -> Callable[[Tensor, int], Tensor]:
    def features(x: Tensor, first: int) -> Tensor:
        same = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(1))
        return scale * same.relu().expand_as(x)

    return features


def _zeros_after_a_while(x: Tensor, first: int) -> Tensor:
    return x.relu() * (first < 1000)


CASES = (
    Case("usual (ReLU of normals)", _usual, steps=1_000_000),
    Case("usual, s = 512", _usual, s=512, options={"rank": None}),
    Case("usual, forget 0.001", _usual, options={"forget": 1e-3}),
    Case("usual, normalize", _usual, options={"normalize": True}),
    Case("usual × 10⁶", lambda x, first: 1e6 * x.relu()),
    Case("usual × 10⁻⁶", lambda x, first: 1e-6 * x.relu()),
    Case("columns from 10⁻⁶ to 10⁶", _columns_apart),
    Case("rank 4, × 100", _low_rank),
    Case("the same every step", _identical(1.0)),
    Case("the same every step, × 1000", _identical(1e3)),
    Case("zero", lambda x, first: 0 * x),
    Case("denormal (10⁻⁴⁰)", lambda x, first: 1e-40 * x),
    Case("forget 0.01, zero after 1000 steps", _zeros_after_a_while, steps=20_000, options={"forget": 0.01}),
)
# Where float32 meets denormal numbers: run again with flush-to-zero.
DENORMAL = CASES[-2:]
# A compression in every 8 steps, or 32.
RANK_CASES = (
    Case("usual (ReLU of normals)", _usual, steps=1_000_000, options={"rank": 16}),
    Case("usual, s = 512", _usual, s=512, steps=20_000, options={"rank": 64}),
    Case("rank 4, × 100", _low_rank, options={"rank": 16}),
    Case("the same every step, × 1000", _identical(1e3), options={"rank": 16}),
)


class Run:
    """A head and its optimizer in one dtype."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        start = torch.randn(CLASSES, case.s, generator=torch.Generator().manual_seed(2))
        self.weight = nn.Parameter(start.to(dtype))
        self.optimizer = ProjectedSGD([self.weight], lr=0.01, momentum=0.9, alpha_scale=None, **case.options)
        self.seconds = 0.0

    def steps(self, features: Tensor, errors: Tensor) -> None:
        start = time.process_time()  # of this process alone, whatever else runs
        dtype = self.weight.dtype
        for x, error in zip(features.to(dtype), errors.to(dtype), strict=True):
            self.optimizer.observe(self.weight, x)
            self.weight.grad = error @ x
            self.optimizer.step()
        self.seconds += time.process_time() - start

    def projection(self) -> Tensor:
        return self.optimizer.projection(self.weight)


@dataclass(frozen=True)
class Record:
    """After so many steps: relative errors in the Frobenius norm, the largest |P − Pᵀ|, extreme eigenvalues of P.

    trace_error: of P's trace, relative.
    """

    steps: int
    P_error: float
    W_error: float
    asymmetry: float
    lowest: float
    highest: float
    lowest64: float
    highest64: float
    trace_error: float = 0.0


def inputs(case: Case) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(the steps before, features (CHUNK, ROWS, s), errors of the logits (CHUNK, CLASSES, ROWS)), float32."""
    generator = torch.Generator().manual_seed(0)
    for first in range(0, case.steps, CHUNK):
        x = torch.randn(CHUNK, ROWS, case.s, generator=generator)
        errors = (2 * torch.rand(CHUNK, CLASSES, ROWS, generator=generator) - 1) / ROWS
        yield first, case.features(x, first), errors


def compare(single: Run, double: Run, steps: int) -> Record:
    P, exact = single.projection(), double.projection()
    ours, theirs = (torch.linalg.eigvalsh(p.double()) for p in (P, exact))
    W, exact_W = single.weight.detach().double(), double.weight.detach()
    return Record(
        steps,
        ((P.double() - exact).norm() / exact.norm()).item(),
        ((W - exact_W).norm() / exact_W.norm()).item(),
        (P - P.T).abs().max().item(),
        ours[0].item(),
        ours[-1].item(),
        theirs[0].item(),
        theirs[-1].item(),
        (P.double().trace() / exact.trace() - 1).abs().item(),
    )


def run(case: Case, truth: str = "auto") -> tuple[list[Record], float]:
    """Records at steps that grow by a fifth or so, and the microseconds of a float32 step.

    truth: the backend of the float64 run.
    """
    exact = replace(case, options=case.options | {"backend": truth})
    single, double = Run(case, torch.float32), Run(exact, torch.float64)
    records, due = [], 0
    for first, features, errors in inputs(case):
        single.steps(features, errors)
        double.steps(features, errors)
        done = first + CHUNK
        if done >= due or done == case.steps:
            records.append(compare(single, double, done))
            due = done * 1.2
    return records, single.seconds / case.steps * 1e6


def run_flushed(case: Case) -> tuple[float, float, float, float]:
    """Microseconds of a float32 step without and with flush-to-zero, and the largest differences of P and W."""
    runs = []
    for flush in (False, True):
        if not torch.set_flush_denormal(flush) and flush:
            raise RuntimeError("this CPU cannot flush denormal numbers to zero")
        single = Run(case, torch.float32)
        for _, features, errors in inputs(case):
            single.steps(features, errors)
        runs.append(single)
    torch.set_flush_denormal(False)
    plain, flushed = runs
    P = (plain.projection() - flushed.projection()).abs().max().item()
    W = (plain.weight - flushed.weight).abs().max().item()
    per_step = 1e6 / case.steps
    return plain.seconds * per_step, flushed.seconds * per_step, P, W


def heading(columns: str) -> list[str]:
    """Of a table in Markdown."""
    return [columns, "|---" * (columns.count(" | ") + 1) + "|"]


SPECTRUM = "\\|P − Pᵀ\\| | eigenvalues of P | in float64 |"


def spectrum(records: list[Record]) -> str:
    """The columns of SPECTRUM, the last ones of both tables."""
    last, lowest = records[-1], min(r.lowest for r in records)
    return (
        f"{max(r.asymmetry for r in records):g} | {last.lowest:.2g} … {last.highest:.3g} "
        f"(lowest ever {lowest:.2g}) | {last.lowest64:.2g} … {last.highest64:.3g} |"
    )


def table(results: dict[Case, list[Record]]) -> list[str]:
    lines = heading(f"| features | s | steps | error of P | largest on the way | error of W | {SPECTRUM}")
    for case, records in results.items():
        last = records[-1]
        lines.append(
            f"| {case.name} | {case.s} | {case.steps:,} | {last.P_error:.1e} | {max(r.P_error for r in records):.1e} "
            f"| {last.W_error:.1e} | {spectrum(records)}"
        )
    return lines


def rank_table(results: dict[Case, list[Record]]) -> list[str]:
    lines = heading(f"| features | s | R | steps | error of P's trace | of P | of W | {SPECTRUM}")
    for case, records in results.items():
        last = records[-1]
        errors = (
            f"{getattr(last, name):.1e} (≤ {max(getattr(r, name) for r in records):.1e})"
            for name in ("trace_error", "P_error", "W_error")
        )
        lines.append(
            f"| {case.name} | {case.s} | {case.options['rank']} | {case.steps:,} | {' | '.join(errors)} "
            f"| {spectrum(records)}"
        )
    return lines


def draw(results: dict[Case, list[Record]], path: Path) -> None:
    figure, (axes,) = canvas(1, 3, 4, 4.6)
    for case, records in results.items():
        steps = [r.steps for r in records]
        axes[0].plot(steps, [max(r.P_error, 1e-17) for r in records], label=case.name, linewidth=1.2)
        axes[1].plot(steps, [max(r.W_error, 1e-17) for r in records], linewidth=1.2)
        axes[2].plot(steps, [r.lowest for r in records], linewidth=1.2)
    for ax, title in zip(axes, ("error of P", "error of W", "lowest eigenvalue of P"), strict=True):
        ax.set(title=f"{title}, float32", xlabel="steps", xscale="log")
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[2].set_yscale("symlog", linthresh=1e-9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--divide", type=int, default=1, help="take so many times fewer steps")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for numerics.md and numerics.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[Case, list[Record]] = {}
    ranked: dict[Case, list[Record]] = {}
    begin = time.perf_counter()
    for case in (*CASES, *RANK_CASES):
        short = replace(case, steps=max(case.steps // arguments.divide, CHUNK))
        records, microseconds = run(short)
        (ranked if case in RANK_CASES else results)[short] = records
        print(f"{case.name}: {microseconds:.0f} µs a step; {records[-1]}", flush=True)
    lines = [
        "# Long runs in float32",
        "",
        f"{machine('cpu')}; {(time.perf_counter() - begin) / 60:.0f} minutes (`python -m benchmarks.stress.numerics`).",
        "",
        "Two runs of ProjectedSGD on the same inputs, in float32 and in float64: error is the relative difference in",
        f"the Frobenius norm. lr 0.01, momentum 0.9, α = 0.1, {CLASSES} classes, {ROWS} rows a step.",
        "",
        *table(results),
        "",
        "## The rank form",
        "",
        "The same for P in R rows and one number, which are compressed every R/2 steps. In parentheses: the largest on",
        "the way.",
        "",
        *rank_table(ranked),
        "",
        "## Denormal numbers",
        "",
        "| features | µs a step | with flush-to-zero | largest difference of P | of W |",
        "|---|---|---|---|---|",
    ]
    for case in DENORMAL:
        plain, flushed, P, W = run_flushed(case)
        lines.append(f"| {case.name} | {plain:.0f} | {flushed:.0f} | {P:.1e} | {W:.1e} |")
    lines += ["", "![drift](numerics.png)", ""]
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(results, arguments.out / "numerics.png")
    (arguments.out / "numerics.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
