"""What the rank form gives and takes: the frontier of plasticity and interference, and the time of a step.

`python -m benchmarks.evidence.frontier [--data FILE.npz]`; `make rank` for this and the accuracies.

Left: plasticity and interference as in `plasticity`, for dense P and for R rows, each at several values of alpha.
Right: the time of a head's step by the kernels alone, one thread, in turns as in `benchmarks.speed.head_step`. Writes
rank_frontier.md and .png to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import mla_ext
from mla_ext import backends

from .. import RESULTS
from ..plots import COLORS, STRONG, canvas, line, save
from ..speed.baselines import make_state
from ..speed.head_step import HYPER, step_with
from ..speed.timing import Candidate, time_interleaved
from .plasticity import run
from .rank import FORMS
from .report import Table, write
from .runs import load

ALPHAS = (0.01, 0.1, 1.0, 10.0, 100.0)
WIDTH, CLASSES = 512, 6
SIZES = (128, 256, 512, 1024, 2048, 4096)
Point = tuple[float, ...]  # plasticity, interference, accuracy


def frontier(
    data: mla_ext.MultimodalData, alphas: Sequence[float], epochs: int, seeds: int, width: int
) -> dict[str, dict[float | None, Point]]:
    """{form: {alpha: means over the seeds}}, and "plain SGD" at alpha None."""
    points: dict[str, dict[float | None, Point]] = {"plain SGD": {}} | {name: {} for name in FORMS}
    for name, at in points.items():
        for alpha in (None,) if name == "plain SGD" else alphas:
            options = {} if alpha is None else {"rank": FORMS[name]}
            runs = [run(data, alpha, options, epochs, seed, width) for seed in range(seeds)]
            at[alpha] = tuple(statistics.mean(column) for column in zip(*runs, strict=True))
            print(name, alpha, *at[alpha], flush=True)
    return points


def times(sizes: Sequence[int], seconds: float) -> dict[str, dict[int, float]]:
    """{form: {s: microseconds of a step}}. A form that puts work off counts by whole cycles, which pay for it."""
    found: dict[str, dict[int, float]] = {name: {} for name in FORMS}
    cpu = backends.BACKENDS["cpu"]
    for s in sizes:
        candidates = {}
        for name, rank in FORMS.items():
            deferred = cpu.deferral(CLASSES, s, HYPER) if rank is None else 0
            state = make_state(CLASSES, s, "cpu", rank=rank, deferred=deferred)
            candidates[name] = Candidate(functools.partial(step_with, state, backend="cpu"), rank // 2 if rank else 16)
            for _ in range(candidates[name].steps * 2):
                candidates[name].call()
        timings, _ = time_interleaved(candidates, seconds, "cpu")
        for name, timing in timings.items():
            found[name][s] = 1e3 * timing.median
        print(s, {name: at[s] for name, at in found.items()}, flush=True)
    return found


def draw(
    points: Mapping[str, Mapping[float | None, Point]], found: Mapping[str, Mapping[int, float]], title: str, path: Path
) -> None:
    figure, ((left, right),) = canvas(1, 2, 5.2, 4.2)
    for (name, rank), color in zip(FORMS.items(), (STRONG, *COLORS), strict=False):
        style = {"color": color, "label": name, "linewidth": 2.4 if rank is None else 1.2}
        line(left, [(interference, plasticity) for plasticity, interference, _ in points[name].values()], **style)
        line(right, [*found[name].items()], **style)
    for alpha, (plasticity, interference, _) in points["dense"].items():
        place = {"textcoords": "offset points", "xytext": (-8, -3), "ha": "right", "fontsize": 8}
        left.annotate(f"alpha {alpha:g}", (interference, plasticity), **place)
    ((plasticity, interference, _),) = points["plain SGD"].values()
    left.plot(interference, plasticity, "s", color=COLORS[3], label="alternation alone")
    left.set(xlabel="interference with the other modalities", ylabel="plasticity", title=title)
    right.set(xlabel="s, features", ylabel="µs", title=f"one step of a head with {CLASSES} classes, one thread")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log")
        ax.margins(0.2 if ax is left else 0.12)
        ax.legend(fontsize=8, frameon=False)
    right.set_xticks([*found["dense"]], [str(s) for s in found["dense"]])
    right.minorticks_off()
    save(figure, path)


def tables(
    points: Mapping[str, Mapping[float | None, Point]], found: Mapping[str, Mapping[int, float]]
) -> tuple[Table, Table]:
    rows = [
        [name, "-" if alpha is None else f"{alpha:g}", f"{plasticity:.4f}", f"{interference:.4f}", f"{accuracy:.1%}"]
        for name, at in points.items()
        for alpha, (plasticity, interference, accuracy) in at.items()
    ]
    columns = ["P", "alpha", "plasticity", "interference", "fused validation accuracy, best epoch"]
    sizes = [*found["dense"]]
    steps = [[name, *(f"{at[s]:.1f}" for s in sizes)] for name, at in found.items()]
    return (
        Table("Plasticity and interference", columns, rows),
        Table(f"µs of a step of a head with {CLASSES} classes", ["P", *(f"s = {s}" for s in sizes)], steps),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help='a file, or "digits" for the built-in data')
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing for each size")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = load(arguments.data, 0.0, 0)
    title = f"{Path(arguments.data).stem}, width {arguments.width}, {arguments.epochs} epochs, {arguments.seeds} seeds"
    found = times(arguments.sizes, arguments.seconds)
    points = frontier(data, arguments.alphas, arguments.epochs, arguments.seeds, arguments.width)
    text = f"""{title}. Plasticity: how much of the head's gradient passes, the mean of ‖G P‖ / ‖G‖ over one more
    epoch after training. Interference: how far a step on one modality moves the head's answer to another one's mean
    feature, the mean of ‖ΔW h̄‖ / (‖ΔW‖ ‖h̄‖). Times are medians of steps that take turns, on one thread; a dense P puts
    its updates off by 16 steps, as by default."""
    write(arguments.out / "rank_frontier", "The frontier of the rank form", text, tables(points, found))
    draw(points, found, title, arguments.out / "rank_frontier.png")


if __name__ == "__main__":
    main()
