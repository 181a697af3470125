"""Which alpha is the default: alpha times ν, the running mean of ‖h̄‖², at several alphas and rates of ν.

`python -m benchmarks.evidence.defaults --data digits FILE.npz … [--seeds 5]`

Every run is one of `mla-ext train` with its defaults, and differs from its neighbours in nothing but P. CHOICE_SEEDS of
every setting are for the choice, on the validation split; then --seeds of the default, of the fixed alpha, and of
alternation alone. Results of runs are kept in a file and not made again. Writes defaults.md and defaults.csv to
benchmarks/results/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mla_ext
from mla_ext import reference
from mla_ext.multimodal.fit import NonFiniteLossError
from mla_ext.multimodal.recipe import Settings, build

from .methods import ALPHA
from .rank import Gain, Keyed, accuracies, limited, parser_of
from .report import Table, write
from .runs import Results, load

ALPHAS = (0.03, 0.1, 0.3, 1.0)
RATES = (0.01, 0.1)
CHOICE_SEEDS = 2
EPOCHS = 15
SAMPLES = 2000
MEASURES = ("fused", "alone")


@dataclasses.dataclass(frozen=True)
class DefaultsRun(Keyed):
    """alpha None: alternation alone; rate None: a fixed alpha. Of the training split at most `samples` are used."""

    data: str
    alpha: float | None
    rate: float | None
    seed: int
    epochs: int = EPOCHS
    samples: int = SAMPLES


@contextmanager
def rate_of_nu(rate: float) -> Iterator[None]:
    """In the reference backend; the kernels have NU_RATE."""
    usual, reference.NU_RATE = reference.NU_RATE, rate
    try:
        yield
    finally:
        reference.NU_RATE = usual


def execute(run: DefaultsRun) -> dict[str, Any]:
    """Validation and test accuracies at the epoch that is best on the validation split."""
    data, own = limited(run.data, run.samples), {} if run.alpha is None else {"alpha": run.alpha}
    scale = None if run.rate is None else "features"
    method = "alternating" if run.alpha is None else "mla"
    settings = Settings(method=method, alpha_scale=scale, seed=run.seed, epochs=run.epochs, **own)
    model, optimizer = build(data, settings)
    if isinstance(optimizer, mla_ext.ProjectedSGD) and run.rate not in (None, reference.NU_RATE):
        optimizer.backend = "reference"
    options = {"epochs": run.epochs, "batch_size": settings.batch_size, "seed": run.seed, "progress": False}
    try:
        with rate_of_nu(run.rate or reference.NU_RATE):
            history = mla_ext.fit(model, optimizer, data, **options)
    except NonFiniteLossError as error:
        return {"diverged": str(error).partition(":")[0]}
    best = max(index for index, record in enumerate(history) if record["best"])
    test = accuracies(mla_ext.evaluate(model, data, "test"))
    return {"validation": accuracies(history[best]["validation"]), "test": test, "epoch": best + 1}


@dataclasses.dataclass(frozen=True)
class Study:
    sources: Sequence[str]
    results: Results
    epochs: int
    samples: int

    def runs(self, alpha: float | None, rate: float | None, seeds: int) -> list[DefaultsRun]:
        return [
            DefaultsRun(s, alpha, rate, seed, self.epochs, self.samples) for s in self.sources for seed in range(seeds)
        ]

    def gain(self, alpha: float | None, rate: float | None, seeds: int, split: str, measure: str) -> Gain:
        """How much better than alternation alone. A run that diverged counts as 0."""

        def value(run: DefaultsRun) -> float:
            return self.results[run].get(split, {}).get(measure, 0.0)

        pairs = zip(self.runs(alpha, rate, seeds), self.runs(None, None, seeds), strict=True)
        return Gain({(Path(a.data).stem, a.seed): 100 * (value(a) - value(b)) for a, b in pairs})


def table(study: Study, title: str, settings: Sequence[tuple[float, float | None]], seeds: int, split: str) -> Table:
    rows = []
    for alpha, rate in settings:
        name = f"{alpha:g}, fixed" if rate is None else f"{alpha:g} ν, rate {rate:g}"
        cells = []
        for measure in MEASURES:
            gain = study.gain(alpha, rate, seeds, split, measure)
            cells += [str(gain), gain.worst(), *(gain.of(Path(source).stem) for source in study.sources)]
        rows.append([name, *cells])
    names = [Path(source).stem for source in study.sources]
    columns = ["alpha", *(f"{m}: {what}" for m in MEASURES for what in ("mean", "worst", *names))]
    return Table(title, columns, rows)


def page(study: Study, out: Path, seeds: int) -> None:
    """defaults.md and defaults.csv."""
    default, rate = Settings().alpha, reference.NU_RATE
    sizes = {Path(s).stem: len(load(s, 0.0, 0).indices("train")) for s in study.sources}
    cut = [f"{name} has {size}" for name, size in sizes.items() if size > study.samples]
    text = f"""Accuracy minus that of alternation alone with the same seed, in points. Everything is the default of
    `mla-ext train`, nothing is tuned; {study.epochs} epochs, the one best on the validation split. ν: the running mean
    of ‖h̄‖², of which the newest has the weight `rate`. Fused: by entropy; alone: the mean of the single modalities.
    Means are over data sets and seeds, with 95 % intervals over those pairs (Student's t); worst: the data set that
    gains the least, and then each. The default is {default:g} ν with rate {rate:g}; {ALPHA:g}, fixed, was it before.
    Rates other than that are made by the backend "reference". """
    text += f"At most {study.samples} training samples are used: {', '.join(cut)}." if cut else ""
    every = [(ALPHA, None), *((alpha, rate) for rate in RATES for alpha in ALPHAS)]
    two = [(ALPHA, None), (default, rate)]
    few = f"{CHOICE_SEEDS} seeds: the choice"
    tables = [
        table(study, f"Validation, {few}", every, CHOICE_SEEDS, "validation"),
        table(study, f"Validation, {seeds} seeds", two, seeds, "validation"),
        table(study, f"Test, {seeds} seeds", two, seeds, "test"),
    ]
    write(out / "defaults", "The default of alpha", text, tables)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "runs/defaults.jsonl")
    parser.set_defaults(epochs=EPOCHS, samples=SAMPLES)
    arguments = parser.parse_args(argv)
    if arguments.seeds < CHOICE_SEEDS:
        parser.error(f"--seeds: expected at least {CHOICE_SEEDS}, got {arguments.seeds}")
    study = Study(arguments.data, Results(arguments.runs), arguments.epochs, arguments.samples)
    settings = [(None, None), (ALPHA, None), (Settings().alpha, reference.NU_RATE)]
    runs = [run for setting in settings for run in study.runs(*setting, arguments.seeds)]
    runs += [run for rate in RATES for alpha in ALPHAS for run in study.runs(alpha, rate, CHOICE_SEEDS)]
    study.results.complete(runs, "defaults", arguments.workers, execute)
    page(study, arguments.out, arguments.seeds)


if __name__ == "__main__":
    main()
