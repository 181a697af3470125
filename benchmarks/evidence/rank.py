"""What the rank form costs in accuracy: R rows against dense P, and alternation alone.

`python -m benchmarks.evidence.rank --data digits FILE.npz … [--seeds 5]`; `make rank` for this and the picture.

Every run has the settings of `mla-ext train`, and differs from its neighbours in nothing but P. alpha is fixed: 0.1,
or SCALED times the mean of ‖h̄‖² over the steps of alternation alone with seed 0, which protects less. Results
of runs are kept in a file and not made again. Writes rank.md and rank.csv to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from .report import Table, interval, percent, write
from .runs import Results, load, workers

SCALED = 0.3
WIDTHS = (128, 512)
FORMS = {"dense": None, "R = 64": 64, "R = 32": 32, "R = 16": 16}
USUAL_ALPHA, SCALED_ALPHA = ALPHAS = (f"{ALPHA:g}", f"{SCALED:g} · mean ‖h̄‖²")
EPOCHS = 20
SAMPLES = 4000


class Keyed:
    """A run, as a dataclass with its data's path, that results are kept under."""

    data: str

    @property
    def key(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "data": Path(self.data).stem})


@dataclasses.dataclass(frozen=True)
class RankRun(Keyed):
    """alpha None: alternation alone; rank None: dense P. Of the training split at most `samples` are used."""

    data: str
    width: int
    alpha: float | None
    rank: int | None
    seed: int
    epochs: int = EPOCHS
    samples: int = SAMPLES


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
            model, optimizer = build_mla(data, setting, rank=run.rank, alpha_scale=None, **projection)
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

    def alpha(self, source: str, width: int, name: str) -> float | None:
        """SCALED · mean ‖h̄‖² has two digits; alternation with seed 0, which has none, has measured it."""
        if name == SCALED_ALPHA:
            return float(f"{SCALED * self.results[self.run(source, width, None, None, 0)]['scale']:.2g}")
        return ALPHA if name == USUAL_ALPHA else None

    def complete(self, workers: int) -> None:
        """Seed by seed, so that a table of fewer seeds can be made before all are there."""
        pairs = [(source, width) for source in self.sources for width in WIDTHS]
        for seed in range(self.seeds):
            runs = [self.run(*pair, None, None, seed) for pair in pairs]
            self.results.complete(runs, f"seed {seed}, alternation alone", workers, execute)
            runs = [
                self.run(*pair, self.alpha(*pair, name), rank, seed)
                for pair in pairs
                for name in ALPHAS
                for rank in FORMS.values()
            ]
            self.results.complete(runs, f"seed {seed}, projected", workers, execute)

    def values(self, source: str, width: int, alpha: str, rank: int | None, *path: str) -> dict[int, float]:
        """A number of the result of each seed whose run is there, 0 where it diverged. alpha "": alternation alone."""
        runs = {
            seed: self.run(source, width, self.alpha(source, width, alpha), rank, seed) for seed in range(self.seeds)
        }
        results = {seed: self.results[run] for seed, run in runs.items() if run.key in self.results.found}
        return {
            seed: 0.0 if "diverged" in result else functools.reduce(dict.__getitem__, path, result)
            for seed, result in results.items()
        }

    def gain(self, width: int, alpha: str, rank: int | None, base: tuple[str, int | None], *path: str) -> Gain:
        """How much better than `base`, an alpha and a rank at the same width; path: as in a result."""
        over = {}
        for source in self.sources:
            ours = self.values(source, width, alpha, rank, *path)
            others = self.values(source, width, *base, *path)
            over |= {(Path(source).stem, seed): 100 * (ours[seed] - others[seed]) for seed in ours if seed in others}
        return Gain(over)


@dataclasses.dataclass(frozen=True)
class Gain:
    """Differences in points, paired: {(data set, seed): difference}."""

    over: dict[tuple[str, int], float]

    def __str__(self) -> str:
        """The mean, with its 95 % interval over the pairs."""
        low, high = interval([*self.over.values()])
        return f"{statistics.mean(self.over.values()):+.2f} [{low:+.2f}, {high:+.2f}]"

    def of(self, name: str) -> str:
        """The mean of one data set."""
        return f"{statistics.mean(value for (of, _), value in self.over.items() if of == name):+.1f}"

    def worst(self) -> str:
        """The data set that gains the least."""
        means = {
            name: statistics.mean(value for (of, _), value in self.over.items() if of == name) for name, _ in self.over
        }
        name = min(means, key=means.__getitem__)
        return f"{means[name]:+.1f} {name}"


def together(gains: Sequence[Gain]) -> Gain:
    """The mean of several, pair by pair."""
    common = [pair for pair in gains[0].over if all(pair in gain.over for gain in gains)]
    return Gain({pair: statistics.mean(gain.over[pair] for gain in gains) for pair in common})


def gains(study: Study, split: str, title: str, forms: Mapping[str, int | None], dense: bool) -> Table:
    """Against dense P with the same alpha, or against alternation alone; then the mean of both values of alpha."""
    measures = (("best", "fused"), ("last", "fused"), ("best", "alone"), ("last", "alone"))
    rows = []
    for width in WIDTHS:
        for name, rank in forms.items():
            found = {
                alpha: [
                    study.gain(width, alpha, rank, (alpha if dense else "", None), split, *measure)
                    for measure in measures
                ]
                for alpha in ALPHAS
            }
            found["both"] = [together(pair) for pair in zip(*found.values(), strict=True)]
            for alpha, (best, last, *alone) in found.items():
                cells = [*map(str, (best, last, *alone)), best.worst(), last.worst()]
                rows.append([str(width), name, alpha, str(len(best.over)), *cells])
    columns = ["width", "P", "alpha", "pairs", "fused, best epoch", "fused, last epoch", "alone, best", "alone, last"]
    return Table(title, [*columns, "worst, fused, best", "worst, fused, last"], rows)


def by_data(study: Study, epoch: str) -> Table:
    """Fused test accuracies of every data set."""
    rows = []
    for source in study.sources:
        for width in WIDTHS:

            def shown(alpha: str, rank: int | None, source: str = source, width: int = width) -> str:
                return percent([*study.values(source, width, alpha, rank, "test", epoch, "fused").values()])

            for alpha in ALPHAS:
                value = f"{study.alpha(source, width, alpha):g}"
                cells = [shown("", None), *(shown(alpha, rank) for rank in FORMS.values())]
                rows.append([Path(source).stem, str(width), value, *cells])
    return Table(f"Fused test accuracy, {epoch} epoch, %", ["data", "width", "alpha", "alternation", *FORMS], rows)


def page(study: Study, out: Path) -> None:
    """rank.md and rank.csv: of the runs that are there."""
    cut = [
        f"{Path(source).stem} has {count}"
        for source in study.sources
        if (count := len(load(source, 0.0, 0).indices("train"))) > study.samples
    ]
    text = f"""Settings of `mla-ext train`; {study.epochs} epochs, {study.seeds} seeds. alpha is {USUAL_ALPHA}, or
    {SCALED} times the mean of ‖h̄‖² over the steps of alternation alone with seed 0. Fused: by entropy; alone: the mean
    of the single modalities. Best epoch: the one best on the validation split. A run that diverged counts as 0. Gains
    are means over the pairs of runs with the same data and seed, with 95 % intervals over the pairs (Student's t);
    worst: the data set that gains the least. rank="auto" is dense at width 128, and R = 64 at width 512. """
    text += f"At most {study.samples} training samples are used: {', '.join(cut)}." if cut else ""
    for source in study.sources:
        alphas = {width: [None, *(study.alpha(source, width, name) for name in ALPHAS)] for width in WIDTHS}
        runs = [
            study.run(source, width, alpha, rank, seed)
            for seed in range(study.seeds)
            for width, each in alphas.items()
            for alpha in each
            for rank in (FORMS.values() if alpha is not None else [None])
        ]
        made = sum(run.key in study.results.found for run in runs)
        text += f" Of {Path(source).stem} only {made} of {len(runs)} runs were made." if made < len(runs) else ""
    reduced = {name: rank for name, rank in FORMS.items() if rank is not None}
    tables = [
        gains(study, "test", "Test accuracy minus that of dense P, points", reduced, dense=True),
        gains(study, "validation", "Validation accuracy minus that of dense P, points", reduced, dense=True),
        gains(study, "test", "Test accuracy minus that of alternation alone, points", FORMS, dense=False),
        by_data(study, "best"),
        by_data(study, "last"),
    ]
    write(out / "rank", "The rank form against dense P", text, tables)


def parser_of(description: str | None, runs: str) -> argparse.ArgumentParser:
    """The command line of a study of the rank form. `runs`: where its results are kept, unless the user says so."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits"], help='files, or "digits" for the built-in data')
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the training split, at most")
    parser.add_argument("--workers", type=int, default=workers(), help="runs at a time (default: one a core)")
    parser.add_argument("--runs", type=Path, default=Path(runs), help="where results are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "runs/rank.jsonl")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        parser.error(f"--seeds: expected at least 2, got {arguments.seeds}")
    limits = (arguments.seeds, arguments.epochs, arguments.samples)
    study = Study(arguments.data, Results(arguments.runs), *limits)
    study.complete(arguments.workers)
    page(study, arguments.out)


if __name__ == "__main__":
    main()
