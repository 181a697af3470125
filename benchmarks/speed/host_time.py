"""The host's time for one step of a tiny head: Python, checks and dispatch. `python -m benchmarks.speed.host_time`.

With s = 8 and C = 2 the work itself is nothing on a CPU, and on a GPU the host does not wait for it. Timed are the op,
and what `attach` adds to a forward together with the optimizer's step of weight and bias, against the step alone of
torch.optim.SGD. One thread; single calls take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD

from mla_ext import ProjectedSGD, backends

from .baselines import LR, MOMENTUM, PlainProjectedSGD, best, make_state
from .head_step import step_with
from .report import OURS, Row, arguments, bars, write
from .timing import Candidate, time_interleaved

S, C = 8, 2
BASELINES = ["best", "SGD", "SGD fused", "plain"]
SETTINGS = {"lr": LR, "momentum": MOMENTUM, "weight_decay": 1e-4}


class FreeHead(nn.Linear):
    """A head whose output is there already: its call takes as long as its hooks."""

    def __init__(self, device: str) -> None:
        super().__init__(S, C, device=device)
        self.output = torch.zeros(4, C, device=device)
        for param in self.parameters():
            param.grad = torch.zeros_like(param)

    def forward(self, input: Tensor) -> Tensor:
        return self.output


def op_calls(device: str, names: list[str]) -> dict[str, Callable[[], object]]:
    """The op by each backend, and the same mathematics in plain PyTorch."""
    states = {name: make_state(C, S, device) for name in ("best", *names)}
    calls: dict[str, Callable[[], object]] = {"best": lambda: best(states["best"])}
    return calls | {f"{OURS} {name}": lambda name=name: step_with(states[name], name) for name in names}


def step_calls(device: str, names: list[str]) -> dict[str, Callable[[], object]]:
    """Hook and step() of the optimizers that project; step() of the others."""
    features = torch.rand(4, S, device=device)
    calls: dict[str, Callable[[], object]] = {
        "SGD": SGD(FreeHead(device).parameters(), **SETTINGS).step,
        "SGD fused": SGD(FreeHead(device).parameters(), **SETTINGS, fused=True).step,
    }

    def hook_and_step(head: FreeHead, step: Callable[[], object]) -> Callable[[], object]:
        return lambda: (head(features), step())

    head = FreeHead(device)
    calls["plain"] = hook_and_step(head, PlainProjectedSGD(head.parameters(), head, **SETTINGS).step)
    for name in names:
        head = FreeHead(device)
        optimizer = ProjectedSGD(head.parameters(), **SETTINGS, backend=name)
        optimizer.attach(head)
        calls[f"{OURS} {name}"] = hook_and_step(head, optimizer.step)
    return calls


def measure(timed: str, calls: Mapping[str, Callable[[], object]], device: str, seconds: float) -> Row:
    before = torch.cuda.synchronize if device == "cuda" else lambda: None
    candidates = {name: Candidate(call, before=before) for name, call in calls.items()}
    row = Row({"timed": timed, "s": S, "C": C})
    row.timings, row.skipped = time_interleaved(candidates, seconds, "cpu")  # by the host's clock on any device
    return row


def main() -> None:
    kinds = {"op": ("ops.head_step_", op_calls), "step": ("hook and step()", step_calls)}
    parsed = arguments(__doc__, [(kind,) for kind in kinds], [(kind,) for kind in kinds], ["float32"])
    torch.set_num_threads(1)
    names = backends.usable(torch.device(parsed.device))
    rows = []
    for (kind,) in parsed.sizes:
        timed, make = kinds[kind]
        rows.append(measure(timed, make(parsed.device, names), parsed.device, parsed.seconds))
    about = """Host time of one step of a tiny head with a bias, momentum and weight decay, one thread; median (p20–p80)
        of single calls that take turns. The hook is what attach() adds to a forward."""
    write("host_time", about, rows, BASELINES, parsed, bars)


if __name__ == "__main__":
    main()
