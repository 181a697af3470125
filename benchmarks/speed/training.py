"""A whole alternating training step: ours against the same loop in plain PyTorch.

`python -m benchmarks.speed.training`.

A step is all that `fit` does for one: the batch is gathered on the host and moved to the device, forward, backward, the
head's gradient projected, SGD. *plain* projects with the products of `best` and steps with torch.optim.SGD; *no
projection* is SGD alone, what is left when the projection costs nothing. A call makes a step of each modality.

Before anything is timed both must train alike, and a step of ours that makes the host wait for the device ends the run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from mla_ext import MultimodalData, ProjectedSGD, SharedHeadModel
from mla_ext.multimodal.encoders import build_encoder
from mla_ext.multimodal.model import Step

from .baselines import ALPHA, LR, MOMENTUM, PlainProjection
from .report import OURS, Row, arguments, write
from .timing import Candidate, peak_memory, time_interleaved

GRID = [(s, C) for C in (6, 101, 1000) for s in (128, 512, 768, 2048)]
QUICK = [(512, 6), (768, 101)]
BASELINES = ["plain", "no projection"]
BATCH, WIDTH, SAMPLES = 64, 128, 1024
MODALITIES = ("audio", "image")


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a value: `.item()`, `bool(tensor)` and their kin."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.count += 1
        return func(*args, **(kwargs or {}))


class Training:
    """One way to train a model, a step at a time."""

    def __init__(self, model: SharedHeadModel, data: MultimodalData, projected: str | None) -> None:
        self.model, self.data = model, data
        generator = torch.Generator().manual_seed(0)
        self.steps = cycle(model.steps(data, BATCH, "given", generator))
        settings = {"lr": LR, "momentum": MOMENTUM}
        self.project: Callable[[], None] = lambda: None
        if projected == OURS:
            self.optimizer = ProjectedSGD(model.parameters(), **settings, alpha=ALPHA, alpha_scale=None)
            self.optimizer.attach(model.head)
        else:
            self.optimizer = SGD(model.parameters(), **settings)
            if projected == "plain":
                self.project = PlainProjection(model.head)

    def fetch(self, step: Step) -> tuple[str, Tensor, Tensor]:
        (modality,) = step.modalities
        return (
            modality,
            self.model.inputs(self.data, modality, step.indices),
            self.model.labels(self.data, step.indices),
        )

    def learn(self, modality: str, inputs: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(modality, inputs), labels).backward()
        self.project()
        self.optimizer.step()

    def round(self) -> None:
        """A step of each modality."""
        for _ in MODALITIES:
            self.learn(*self.fetch(next(self.steps)))

    def waits(self) -> int:
        """How often the host waits for the device in one step. What is on its way to the device may be waited for."""
        batch = self.fetch(next(self.steps))
        on_gpu = batch[1].is_cuda
        if on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            with Waits() as waits:
                self.learn(*batch)
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        return waits.count


def make_data(C: int) -> MultimodalData:
    """Noise: the time of a step does not depend on it."""
    generator = torch.Generator().manual_seed(0)
    return MultimodalData(
        modalities=MODALITIES,
        features={m: torch.randn(SAMPLES, WIDTH, generator=generator) for m in MODALITIES},
        rows={m: torch.arange(SAMPLES) for m in MODALITIES},
        labels=torch.arange(SAMPLES) % C,
        classes=tuple(map(str, range(C))),
        split=torch.zeros(SAMPLES, dtype=torch.int8),
    )


def make_model(s: int, C: int, device: str) -> SharedHeadModel:
    torch.manual_seed(0)
    encoders = {m: build_encoder("small", (WIDTH,), s) for m in MODALITIES}
    return SharedHeadModel(encoders, nn.Linear(s, C)).to(device)


def measure(s: int, C: int, device: str, seconds: float) -> Row:
    model, data = make_model(s, C, device), make_data(C)
    names = {"plain": "plain", "no projection": None, OURS: OURS}
    ways = {name: Training(copy.deepcopy(model), data, projected) for name, projected in names.items()}
    for way in ways.values():
        for _ in range(3):
            way.round()
    for mine, other in zip(ways[OURS].model.parameters(), ways["plain"].model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    if waits := ways[OURS].waits():
        raise AssertionError(f"the host waits for the device {waits} times in a step")
    row = Row({"s": s, "C": C, "batch": BATCH})
    candidates = {name: Candidate(way.round, len(MODALITIES)) for name, way in ways.items()}
    row.timings, row.skipped = time_interleaved(candidates, seconds, device)
    row.memory = {
        name: sum(p.nbytes for p in way.model.parameters()) + peak_memory(way.round, device)
        for name, way in ways.items()
    }
    return row


def main() -> None:
    parsed = arguments(__doc__, GRID, QUICK, ["float32"])
    rows = []
    for s, C in parsed.sizes:
        rows.append(measure(s, C, parsed.device, parsed.seconds))
        print(rows[-1].title, rows[-1].skipped or "", flush=True)
    about = f"""A whole alternating step: data movement, forward, backward, projection, SGD.
        {len(MODALITIES)} modalities of {WIDTH} features, encoders of two linear layers, batch {BATCH};
        median (p20–p80) of interleaved rounds, per step. No step of ours makes the host wait for the device."""
    write("training", about, rows, BASELINES, parsed)


if __name__ == "__main__":
    main()
