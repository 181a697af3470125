"""What the speed benchmarks write: Markdown to read, CSV (a line for each candidate), JSON (all of it) and plots."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mla_ext
from mla_ext.multimodal import checkpoint

from .. import RESULTS, plots
from ..machine import machine
from .timing import Timing

Sizes = tuple[int | str, ...]
DTYPES = ("float32", "float64", "bfloat16", "float16")
OURS = "mla_ext"  # what the names of our candidates begin with


@dataclass(frozen=True)
class Floor:
    """The least time that the work can take: bytes and FLOP by the model, over rates measured in the same run."""

    bytes: float
    flop: float
    bytes_per_second: float
    flop_per_second: float

    @property
    def ms(self) -> float:
        return 1e3 * max(self.bytes / self.bytes_per_second, self.flop / self.flop_per_second)

    @property
    def bound(self) -> str:
        return "bytes" if self.bytes / self.bytes_per_second >= self.flop / self.flop_per_second else "FLOP"


@dataclass
class Row:
    """One problem: its sizes, what was timed and what was not. Without any timing the row itself was skipped."""

    sizes: dict[str, int | str]
    timings: dict[str, Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # name or "all" -> reason
    floor: Floor | None = None
    memory: dict[str, int] = field(default_factory=dict)  # name -> bytes

    @property
    def title(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.sizes.items())

    @property
    def ours(self) -> str | None:
        """The fastest of ours."""
        names = [name for name in self.timings if name.startswith(OURS)]
        return min(names, key=lambda name: self.timings[name].median, default=None)

    def speedup(self, baseline: str) -> float | None:
        if self.ours is None or baseline not in self.timings:
            return None
        return self.timings[baseline].median / self.timings[self.ours].median

    @property
    def times_floor(self) -> float | None:
        return None if self.ours is None or self.floor is None else self.timings[self.ours].median / self.floor.ms


Draw = Callable[[Sequence[Row], Sequence[str]], Any]


def arguments(
    description: str, grid: Sequence[Sizes], quick: Sequence[Sizes], dtypes: Sequence[str] = DTYPES
) -> argparse.Namespace:
    """The options of every benchmark. `sizes`: what --only names of `grid`; else `quick` or all, as --quick says."""
    names = {",".join(map(str, sizes)): sizes for sizes in grid}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes, little time for each")
    parser.add_argument("--only", nargs="+", choices=names, metavar="SIZES", help="these only: " + " ".join(names))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=dtypes)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    parsed.sizes = [names[name] for name in parsed.only] if parsed.only else quick if parsed.quick else grid
    parsed.dtype = getattr(torch, parsed.dtype)
    parsed.seconds = 2.0 if parsed.quick or parsed.device == "cuda" else 4.0  # for the timing of a row
    return parsed


def write(
    name: str,
    about: str,
    rows: Sequence[Row],
    baselines: Sequence[str],
    parsed: argparse.Namespace,
    draw: Draw | None = None,
) -> None:
    """`name`_<device>.md, .csv, .json and .png; the Markdown is printed. Dtypes other than float32 are in the name.

    draw(rows with timings, baselines) makes the picture's figure; without it: `scaling`.
    """
    dtype = str(parsed.dtype).removeprefix("torch.")
    stem = parsed.out / "_".join([name, parsed.device, *([] if dtype == "float32" else [dtype])])
    made = f"{dtype}. {machine(parsed.device)}, kernels {mla_ext.build_info()['cpu_isa']}."
    names = candidates(rows)
    page = "\n\n".join([" ".join(about.split()) + " " + made, *_tables(rows, names, baselines)]) + "\n"
    parsed.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(stem.with_suffix(".md"), page)
    checkpoint.write_text(stem.with_suffix(".csv"), _csv(rows))
    content = {"about": made, "rows": [dataclasses.asdict(row) for row in rows]}
    checkpoint.write_text(stem.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    timed = [row for row in rows if row.timings]
    if timed and importlib.util.find_spec("matplotlib"):
        plots.save((draw or scaling)(timed, baselines), stem.with_suffix(".png"))
    elif timed:
        print("no plots: matplotlib is not installed")
    print(page)


def candidates(rows: Sequence[Row]) -> list[str]:
    """The names of all that was timed in any row."""
    return list(dict.fromkeys(name for row in rows for name in row.timings))


def _tables(rows: Sequence[Row], names: Sequence[str], baselines: Sequence[str]) -> list[str]:
    measured = [row for row in rows if row.timings]
    sizes = list(measured[0].sizes) if measured else []
    number = "{:.2f}".format
    floor = ["ours ÷ floor", "floor, ms", "MB", "GFLOP", "GB/s, ours of measured"]
    has_floor = any(row.floor for row in measured)
    times, ratios, memory = [], [], []
    for row in measured:
        start = list(row.sizes.values())
        times.append(start + [_time(row.timings.get(name)) for name in names])
        ratio = [row.ours or "-", *("-" if (x := row.speedup(b)) is None else number(x) for b in baselines)]
        if row.floor is not None:
            reached = "-" if row.ours is None else row.floor.bytes / row.timings[row.ours].median / 1e6
            ratio += [
                "-" if row.times_floor is None else number(row.times_floor),
                f"{row.floor.ms:.4g} ({row.floor.bound})",
                f"{row.floor.bytes / 1e6:.4g}",
                f"{row.floor.flop / 1e9:.4g}",
                reached if reached == "-" else f"{reached:.1f} of {row.floor.bytes_per_second / 1e9:.1f}",
            ]
        elif has_floor:
            ratio += ["-"] * len(floor)
        ratios.append(start + ratio)
        memory.append(start + [f"{row.memory[name] / 2**20:.4g}" if name in row.memory else "-" for name in names])
    columns = [*sizes, "ours", *(f"÷ {b}" for b in baselines), *(floor if has_floor else [])]
    heading = "Baselines ÷ the fastest of ours" + (", and ours ÷ the floor" if has_floor else "")
    tables = [
        _table([*sizes, *(f"{name}, ms" for name in names)], times),
        f"{heading}:\n\n" + _table(columns, ratios),
    ]
    if any(row.memory for row in measured):
        tables.append(
            "Memory in use, MiB: the tensors of a step, and the most it holds beside them.\n\n"
            + _table([*sizes, *names], memory)
        )
    skipped = [f"- {row.title}, {name}: {reason}" for row in rows for name, reason in row.skipped.items()]
    return tables + (["Not measured:\n\n" + "\n".join(skipped)] if skipped else [])


def _time(timing: Timing | None) -> str:
    return "-" if timing is None else f"{timing.median:.4g} ({timing.p20:.4g}–{timing.p80:.4g})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def _csv(rows: Sequence[Row]) -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    columns = ["candidate", "median ms", "p20 ms", "p80 ms", "floor ms", "memory bytes", "skipped"]
    writer.writerow([*rows[0].sizes, *columns])
    for row in rows:
        floor = row.floor.ms if row.floor else ""
        for name, t in row.timings.items():
            memory = row.memory.get(name, "")
            writer.writerow([*row.sizes.values(), name, t.median, t.p20, t.p80, floor, memory, ""])
        for name, reason in row.skipped.items():
            writer.writerow([*row.sizes.values(), name, "", "", "", "", "", reason])
    return file.getvalue()


def scaling(rows: Sequence[Row], baselines: Sequence[str]) -> Any:
    """A column for each group of rows that differ in their first size only: scaling, roofline, speed-up."""
    names = candidates(rows)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        _, *rest = row.sizes.items()
        groups.setdefault(", ".join(f"{name}={value}" for name, value in rest), []).append(row)
    has_floor = any(row.floor for row in rows)
    figure, axes = plots.canvas(3 if has_floor else 2, len(groups), 4.0, 3.0)
    colors = dict(zip([*baselines, *(n for n in names if n.startswith(OURS))], plots.COLORS, strict=False))
    for column, (title, group) in zip(axes.T, groups.items(), strict=True):
        size = next(iter(group[0].sizes))
        for name in names:
            points = [(row.sizes[size], row.timings[name].median) for row in group if name in row.timings]
            plots.line(column[0], points, color=colors.get(name, plots.MUTED), label=name)
        column[0].set(title=title, xscale="log", yscale="log", xlabel=size, ylabel="ms per step")
        compared = [row for row in group if row.ours]
        heights = {baseline: [row.speedup(baseline) or 0 for row in compared] for baseline in baselines}
        plots.ratios(column[-1], [row.sizes[size] for row in compared], heights, colors)
        column[-1].set(xlabel=size, ylabel="baseline ÷ ours", yscale="log")
        group = [row for row in group if row.floor]
        if not group:
            continue
        for name in (n for n in names if n in colors):
            points = [
                (row.floor.bytes, row.floor.bytes / row.timings[name].median / 1e6)
                for row in group
                if name in row.timings
            ]
            plots.line(column[1], points, color=colors[name])
        roof = [(row.floor.bytes, row.floor.bytes / row.floor.ms / 1e6) for row in group]
        column[1].plot(*zip(*roof, strict=True), ":", color=plots.STRONG, label="floor")
        column[1].set(xscale="log", yscale="log", xlabel="bytes of the model", ylabel="GB/s of the model's bytes")
        column[1].legend(fontsize=7, frameon=False)
    for ax in (axes[0][0], axes[-1][0]):
        ax.legend(fontsize=7, frameon=False)
    for ax in axes.flat:
        ax.xaxis.set_minor_formatter("")
    return figure


def bars(rows: Sequence[Row], baselines: Sequence[str]) -> Any:
    """A panel for each value of the first size, with each baseline's time over that of ours."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(next(iter(row.sizes.values()))), []).append(row)
    figure, axes = plots.canvas(len(groups), 1, 11, 3.2)
    colors = dict(zip(baselines, plots.COLORS, strict=False))
    for ax, (title, group) in zip(axes.flat, groups.items(), strict=True):
        labels = [", ".join(map(str, list(row.sizes.values())[1:])).replace(", ", "\n", 1) for row in group]
        compared = [name for name in baselines if any(name in row.timings for row in group)]
        heights = {name: [row.speedup(name) or 0 for row in group] for name in compared}
        plots.ratios(ax, labels, heights, colors)
        ax.set(title=title, ylabel="baseline ÷ ours")
        ax.legend(fontsize=7, frameon=False)
    return figure
