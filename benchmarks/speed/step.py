"""The optimizer's step and the whole training step, as users call them. `python -m benchmarks.speed.step [--quick]`.

Encoder and head are in one optimizer. A training step is zero_grad, forward, loss, backward and step, on one batch
again and again; step() is timed after the rest of a training step, whose hook has recorded the head's features by then.
*SGD* and *SGD fused* do not project; *plain* is the method in twenty lines of PyTorch, *compiled* its step() compiled.

Before anything is timed, those that compute the same thing must have trained alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Optimizer

from mla_ext import ProjectedSGD
from mla_ext.multimodal.encoders import build_encoder

from .baselines import MOMENTUM, PlainProjectedSGD
from .report import OURS, Row, arguments, bars, write
from .timing import Candidate, time_interleaved

N, LR, DECAY = 64, 0.01, 1e-4
LINEAR = [(64, 10), (128, 6), (512, 6), (768, 6), (768, 101), (2048, 6), (2048, 101)]
IMAGES = [("small", 128, 10), ("resnet18", 512, 101)]  # encoders of images 3 × 64 × 64
GRID = [("linear", s, C) for s, C in LINEAR] + IMAGES
QUICK = [("linear", 64, 10), ("linear", 512, 6)]
BASELINES = ["SGD", "SGD fused", "plain", "compiled"]
STEP, WHOLE = "step()", "training step"
CHECKED_STEPS = {"linear": 5}  # of an encoder; of others 2, as many layers make much of a rounding


class Way:
    """One way to train a model, on the same batch again and again."""

    def __init__(self, model: nn.Sequential, optimizer: Optimizer, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.model, self.optimizer, self.inputs, self.labels = model, optimizer, inputs, labels
        self.step: Callable[[], object] = optimizer.step

    def backward(self) -> None:
        """A training step up to the optimizer's."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.inputs), self.labels).backward()

    def whole(self) -> None:
        self.backward()
        self.step()


def make_model(encoder: str, s: int, C: int) -> nn.Sequential:
    torch.manual_seed(0)
    linear = [nn.Linear(s, s), nn.ReLU()]
    return nn.Sequential(*linear if encoder == "linear" else [build_encoder(encoder, (3, 64, 64), s)], nn.Linear(s, C))


def make_ways(encoder: str, s: int, C: int, device: str) -> dict[str, Way]:
    """All contestants, at the same point."""
    model = make_model(encoder, s, C).to(device)
    inputs = torch.randn(N, *((s,) if encoder == "linear" else (3, 64, 64)), device=device)
    labels = torch.arange(N, device=device) % C
    settings = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}

    def way(make: Callable[[nn.Sequential], Optimizer]) -> Way:
        own = copy.deepcopy(model)
        return Way(own, make(own), inputs, labels)

    def ours(own: nn.Sequential) -> Optimizer:
        optimizer = ProjectedSGD(own.parameters(), **settings, alpha_scale=None)  # as the plain one
        optimizer.attach(own[-1])
        return optimizer

    ways = {
        "SGD": way(lambda own: SGD(own.parameters(), **settings)),
        "SGD fused": way(lambda own: SGD(own.parameters(), **settings, fused=True)),
        "plain": way(lambda own: PlainProjectedSGD(own.parameters(), own[-1], **settings)),
        "compiled": way(lambda own: PlainProjectedSGD(own.parameters(), own[-1], **settings)),
        OURS: way(ours),
    }
    torch._dynamo.reset()  # compiled anew for each size
    ways["compiled"].step = torch.compile(ways["compiled"].optimizer.step)
    return ways


def check(ways: Mapping[str, Way], steps: int) -> None:
    """After a few steps those that compute the same thing must agree, before anything is timed."""
    start = copy.deepcopy(ways["SGD"].model)
    for way in ways.values():
        for _ in range(steps):
            way.whole()
    for name, truth in (("SGD fused", "SGD"), ("compiled", "plain"), (OURS, "plain")):
        parameters = zip(*(model.parameters() for model in (ways[name].model, ways[truth].model, start)), strict=True)
        for actual, expected, before in parameters:
            moved = (expected - before).abs().max().item()  # what the weights share from the start tells nothing
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3 * moved, msg=f"{name} is not {truth}")


def measure(encoder: str, s: int, C: int, device: str, seconds: float) -> list[Row]:
    """A row for step() and one for the training step."""
    ways = make_ways(encoder, s, C, device)
    check(ways, CHECKED_STEPS.get(encoder, 2))
    timed = {WHOLE: {name: Candidate(way.whole) for name, way in ways.items()}}
    if encoder == "linear":
        timed[STEP] = {name: Candidate(way.step, before=way.backward) for name, way in ways.items()}
    together = {(what, name): candidate for what, group in timed.items() for name, candidate in group.items()}
    timings, skipped = time_interleaved(together, seconds, device)
    rows = []
    for what, group in timed.items():
        row = Row({"timed": what, "encoder": encoder, "s": s, "C": C})
        row.timings = {name: timings[what, name] for name in group if (what, name) in timings}
        row.skipped = {name: skipped[what, name] for name in group if (what, name) in skipped}
        rows.append(row)
    return rows


def main() -> None:
    parsed = arguments(__doc__, GRID, QUICK, ["float32"])
    rows = []
    for encoder, s, C in parsed.sizes:
        slow = 10 if encoder == "resnet18" and parsed.device == "cpu" else 1  # a step of it takes most of a second
        rows += measure(encoder, s, C, parsed.device, slow * parsed.seconds)
        print(rows[-1].title, rows[-1].skipped or "", flush=True)
    rows.sort(key=lambda row: row.sizes["timed"] != STEP)
    about = f"""Encoder and head (with bias) in one optimizer, {N} samples, momentum {MOMENTUM}, weight decay {DECAY};
        linear: Linear(s, s) and ReLU; small and resnet18: images of 3 × 64 × 64. Median (p20–p80) of calls that take
        turns. A training step is zero_grad, forward, loss, backward and step()."""
    write("step", about, rows, BASELINES, parsed, bars)


if __name__ == "__main__":
    main()
