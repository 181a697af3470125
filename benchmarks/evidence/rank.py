"""What the rank form costs in accuracy: R rows against dense P, and alternation alone.

`python -m benchmarks.evidence.rank --data digits FILE.npz … [--seeds 5]`; `make rank` for this and the picture.

Every run has the settings of `mla-ext train`, and differs from its neighbours in nothing but P. alpha is 0.1, the
default, or SCALED times the mean of ‖h̄‖² over the steps of alternation alone with seed 0, which protects less. Results
of runs are kept in a file and not made again. Writes rank.md and rank.csv to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import mla_ext
from mla_ext.multimodal import checkpoint
from mla_ext.multimodal.evaluate import Report
from mla_ext.multimodal.fit import CHECKPOINT, NonFiniteLossError
from mla_ext.multimodal.recipe import Settings

from .. import RESULTS
from .methods import ALPHA, METHODS, Setting, build_mla
from .runs import Results, load, workers

SCALED = 0.3
WIDTHS = (128, 512)
RANKS = (None, 64, 32, 16)
EPOCHS = 20
SAMPLES = 4000


@dataclasses.dataclass(frozen=True)
class RankRun:
    """alpha None: alternation alone; rank None: dense P. Of the training split at most `samples` are used."""

    data: str
    width: int
    alpha: float | None
    rank: int | None
    seed: int
    epochs: int = EPOCHS
    samples: int = SAMPLES

    @property
    def key(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "data": Path(self.data).stem})


@functools.lru_cache(maxsize=8)
def limited(source: str, samples: int) -> mla_ext.MultimodalData:
    """The data with at most so many training samples, the same ones every time; others lose their place in it."""
    data = load(source, 0.0, 0)
    training = data.indices("train")
    drawn = training[torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[:samples]]
    kept = torch.cat([drawn, data.indices("validation"), data.indices("test")])
    rows = {m: data.rows[m][kept] for m in data.modalities}
    return dataclasses.replace(data, rows=rows, labels=data.labels[kept], split=data.split[kept])


def accuracies(report: Report | dict[str, Any]) -> dict[str, float]:
    """Fused, and the mean of the modalities alone."""
    report = report if isinstance(report, dict) else report.as_dict()
    alone = [score["accuracy"] for score in report["modalities"].values()]
    return {"fused": report["fusions"][report["fused"]]["accuracy"], "alone": statistics.mean(alone)}


def execute(
    run: RankRun, watch: Callable[[torch.Tensor], object] = lambda mean: None, **projection: Any
) -> dict[str, Any]:
    """Test and validation accuracies at the best and at the last epoch, and the mean ‖h̄‖² of the steps.

    watch: called with the feature mean (s,) of every step; projection: further options of ProjectedSGD.
    """
    data, usual = limited(run.data, run.samples), Settings()
    setting = Setting(usual.lr, usual.weight_decay, run.alpha, run.seed, run.epochs, run.width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        if run.alpha is None:
            model, optimizer = METHODS["alternating"].build(data, setting)
        else:
            model, optimizer = build_mla(data, setting, rank=run.rank, **projection)
    squares: list[torch.Tensor] = []

    def record(head: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if head.training:
            mean = inputs[0].detach().mean(dim=0)
            squares.append(mean.square().sum())
            watch(mean)

    model.head.register_forward_pre_hook(record)
    options = {"epochs": run.epochs, "batch_size": usual.batch_size, "seed": run.seed, "progress": False}
    with tempfile.TemporaryDirectory() as out:
        try:
            history = mla_ext.fit(model, optimizer, data, **options, out=out)
        except NonFiniteLossError as error:
            return {"diverged": str(error).partition(":")[0]}
        best = max(index for index, record in enumerate(history) if record["best"])
        test = {"best": accuracies(mla_ext.evaluate(model, data, "test"))}
        model.load_state_dict(checkpoint.load(Path(out) / CHECKPOINT)["model"])
        test["last"] = accuracies(mla_ext.evaluate(model, data, "test"))
    validation = {"best": accuracies(history[best]["validation"]), "last": accuracies(history[-1]["validation"])}
    scale = torch.stack(squares).mean().item()
    return {"test": test, "validation": validation, "epoch": best + 1, "scale": scale}


@dataclasses.dataclass(frozen=True)
class Study:
    """The datasets ("digits" or paths), and the results so far."""

    sources: Sequence[str]
    results: Results
    seeds: int
    epochs: int
    samples: int

    def run(self, source: str, width: int, alpha: float | None, rank: int | None, seed: int) -> RankRun:
        return RankRun(source, width, alpha, rank, seed, self.epochs, self.samples)

    def scaled(self, source: str, width: int) -> float:
        """SCALED · mean ‖h̄‖² to two digits; `complete` has measured it."""
        return float(f"{SCALED * self.results[self.run(source, width, None, None, 0)]['scale']:.2g}")

    def complete(self, workers: int) -> None:
        """Seed by seed, so that a table of fewer seeds can be made before all are there."""
        pairs = [(source, width) for source in self.sources for width in WIDTHS]
        for seed in range(self.seeds):
            runs = [self.run(*pair, None, None, seed) for pair in pairs]
            self.results.complete(runs, f"seed {seed}, alternation alone", workers, execute)
            runs = [
                self.run(*pair, alpha, rank, seed)
                for pair in pairs
                for alpha in (ALPHA, self.scaled(*pair))
                for rank in RANKS
            ]
            self.results.complete(runs, f"seed {seed}, projected", workers, execute)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits"], help='files, or "digits" for the built-in data')
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the training split, at most")
    parser.add_argument("--workers", type=int, default=workers(), help="runs at a time (default: one a core)")
    parser.add_argument("--runs", type=Path, default=Path("runs/rank.jsonl"), help="where results are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    study = Study(arguments.data, Results(arguments.runs), arguments.seeds, arguments.epochs, arguments.samples)
    study.complete(arguments.workers)


if __name__ == "__main__":
    main()
