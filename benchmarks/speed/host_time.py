"""The host's time for one head step, per backend: what Python, the checks and the dispatch take before any work.

`python -m benchmarks.speed.host_time`.
The head is tiny (s = 8, C = 2), so that on the CPU the work itself is nothing; on a
GPU the host does not wait for it. Writes a Markdown table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mla_ext import ProjectedSGD, backends

from .baselines import best, make_state
from .head_step import step_with
from .timing import machine


def microseconds(call: Callable[[], object], device: str, calls: int = 200, repeats: int = 15) -> float:
    """The median over the repeats of the mean of some calls, after as many that do not count."""
    values = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        values.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(values[1:])


def optimizer_step(backend: str, device: str) -> Callable[[], object]:
    """A whole ProjectedSGD.step of one attached weight that has observed features."""
    weight = torch.nn.Parameter(torch.ones(2, 8, device=device))
    weight.grad = torch.zeros_like(weight)
    features = torch.rand(4, 8, device=device)
    optimizer = ProjectedSGD([weight], momentum=0.9, backend=backend)

    def step() -> None:
        optimizer.observe(weight, features)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out = parser.parse_args().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    lines = [
        f"Host time of one head step, µs (s = 8, C = 2). {machine(device)}, {datetime.date.today()}.",
        "",
        "| backend | `ops.head_step_` | observe and `ProjectedSGD.step` |",
        "|---|---|---|",
    ]
    usable = backends.usable(torch.device(device))
    for name in backends.BACKENDS:
        if name in usable:
            state = make_state(2, 8, device)
            op = microseconds(lambda state=state, name=name: step_with(state, name), device)
            lines.append(f"| {name} | {op:.0f} | {microseconds(optimizer_step(name, device), device):.0f} |")
        elif device == "cpu" or name != "cpu":
            lines.append(f"| {name} | not measured yet | not measured yet |")
    state = make_state(2, 8, device)
    lines.append(f"| plain PyTorch (*best*) | {microseconds(lambda: best(state), device):.0f} | - |")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"host_time_{device}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
