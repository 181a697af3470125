"""The time of one head step: ours against plain PyTorch. `python -m benchmarks.head_step [--quick]`, or `make bench`.

Writes a Markdown table and a CSV file to benchmarks/results/ and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from pathlib import Path

import torch

import mla_ext
from mla_ext import backends, ops
from mla_ext.reference import Hyperparameters

from .baselines import ALPHA, LR, MOMENTUM, State, best, make_state, released
from .timing import machine, time_interleaved

SIZES = [(s, C) for C in (6, 101) for s in (128, 512, 768, 1024, 2048, 4096)]
QUICK = [(512, 6), (2048, 6), (768, 101)]
HYPER = Hyperparameters(lr=LR, momentum=MOMENTUM, alpha=ALPHA)


def ours(state: State, backend: str) -> None:
    ops.head_step_(
        state.weight,
        state.grad,
        state.momentum_buffer,
        state.projection,
        state.feature_mean,
        state.step,
        HYPER,
        backend=backend,
    )


def check(states: dict[str, State]) -> None:
    """All that compute the same thing must agree before anything is timed."""
    for name, state in states.items():
        if name != "released":
            torch.testing.assert_close(state.projection, states["best"].projection, rtol=1e-3, atol=1e-4, msg=name)
            torch.testing.assert_close(state.weight, states["best"].weight, rtol=1e-3, atol=1e-4, msg=name)


def measure(s: int, C: int, device: str, seconds: float) -> dict[str, object]:
    compiled_best = torch.compile(best)
    start = make_state(C, s, device)
    usable = [name for name in backends.usable(torch.device(device)) if name != "reference"]
    steps = {"released": released, "best": best, "compiled": compiled_best}
    steps |= {f"mla_ext {name}": lambda state, name=name: ours(state, name) for name in usable}
    states = {name: start.clone() for name in steps}
    copy = torch.empty_like(start.projection)
    for _ in range(3):
        for name, step in steps.items():
            step(states[name])
    check(states)
    candidates = {name: lambda step=step, name=name: step(states[name]) for name, step in steps.items()}
    # The floor: P read once and written once, at the speed of a plain copy.
    candidates["copy of P"] = lambda: copy.copy_(start.projection)
    timings = time_interleaved(candidates, seconds, device)
    mine = min((timings[f"mla_ext {name}"].median for name in usable), default=float("nan"))
    row: dict[str, object] = {"s": s, "C": C}
    for name, timing in timings.items():
        row[f"{name} ms"] = f"{timing.median:.4g} ({timing.p20:.4g}–{timing.p80:.4g})"
    for name in ("released", "best", "compiled"):
        row[f"÷ {name}"] = f"{timings[name].median / mine:.2f}"
    row["ours ÷ floor"] = f"{mine / timings['copy of P'].median:.2f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three sizes, a minute in all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows = []
    for s, C in QUICK if arguments.quick else SIZES:
        rows.append(measure(s, C, arguments.device, 3 if arguments.quick else 6))
        print(rows[-1], flush=True)
    header = (
        "Head step, float32, momentum 0.9, absorb after; ms: median (p20–p80), interleaved. "
        f"{machine(arguments.device)}, mla_ext {mla_ext.__version__}, "
        f"kernels {mla_ext.build_info()['cpu_isa']}, {datetime.date.today()}."
    )
    columns = list(rows[0])
    lines = [header, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"head_step_{arguments.device}"
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
