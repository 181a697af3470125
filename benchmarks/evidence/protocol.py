"""How settings are chosen and runs are repeated, the same for every table and method."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .methods import BATCH_SIZE, METHODS
from .report import Table, write
from .runs import Results, Run, group, load

MAIN = tuple(name for name in METHODS if not name.endswith("-shared"))  # the rows of the tables
MOST_BATCHES, QUICK_BATCHES = 900, 250  # of one run
LRS = (0.003, 0.01, 0.03, 0.1)
FINER = (0.35, 0.6, 1.0, 1.7)  # times the best of LRS
DECAYS = (1e-4, 1e-3, 1e-2)
FINALISTS = 4
TUNING_SEEDS = (1000, 1001, 1002)
PROTOCOL = """All methods have the same encoders: two linear layers of 64 features on the recording as one standardised
vector; SGD with momentum 0.9 (or AdamW, where the row says so), batches of 64. {trials} Then {seeds} seeds are trained,
{epochs} epochs each{fewer} (MMIN twice: it begins with a whole concatenation model); the epoch is the one best on the
validation split, and the test split is read once. Values: mean ± standard deviation over the seeds, in %; differences
are paired by seed, with 95 % confidence intervals (Student's t)."""
TRIALS = """For every dataset and method the settings are chosen by the best validation accuracy in 15 trials: lr among
{lrs}; then, at the best of them, weight decay among {decays} together with four values of the method's own
hyperparameter, or of a finer lr where it has none. A trial is one run; the best {finalists} are run with {more} more
seeds, and the best mean is taken. These seeds are not used again."""
QUICK_TRIALS = """For every dataset and method lr is chosen by the best validation accuracy among {lrs}, one run each,
of a seed that is not used again; nothing else is chosen."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The datasets ("digits" or paths), the results so far, and where tables and pictures go."""

    sources: Sequence[str]
    results: Results
    out: Path
    seeds: int
    epochs: int
    workers: int
    quick: bool = False  # one stage of trials instead of three

    @property
    def protocol(self) -> str:
        lrs, decays = (", ".join(f"{value:g}" for value in values) for values in (LRS, DECAYS))
        trials = QUICK_TRIALS if self.quick else TRIALS
        trials = trials.format(lrs=lrs, decays=decays, finalists=FINALISTS, more=len(TUNING_SEEDS) - 1)
        fewer = [f"{self.epochs_of(s)} on {name_of(s)}" for s in self.sources if self.epochs_of(s) < self.epochs]
        fewer = f", {', '.join(fewer)}, which has more batches" if fewer else ""
        return self.label + PROTOCOL.format(trials=trials, seeds=self.seeds, epochs=self.epochs, fewer=fewer)

    def epochs_of(self, source: str) -> int:
        """As many as `epochs`, or the most that take no more than MOST_BATCHES."""
        batches = -(-len(load(source, 0.0, 0).indices("train")) // BATCH_SIZE)
        return max(1, min(self.epochs, (QUICK_BATCHES if self.quick else MOST_BATCHES) // batches))

    @property
    def label(self) -> str:
        """What every page of a quick look begins with."""
        return f"A QUICK LOOK: {self.seeds} seeds, {len(LRS)} trials, epochs {self.epochs}. " if self.quick else ""

    def write(self, name: str, heading: str, text: str, tables: Sequence[Table]) -> None:
        write(self.out / name, heading + (" (a quick look)" if self.quick else ""), text, tables)

    # -- choosing hyperparameters --

    def tune(self, methods: Sequence[str], missing: float = 0.0) -> None:
        """The trials on the validation split, in three stages."""
        cases = [(source, method, missing) for source in self.sources for method in methods]
        for number, stage in enumerate((self._learning_rates, self._rest, self._finals), 1):
            self.complete([run for case in cases for run in stage(*case)], f"choosing settings, {number} of 3")

    def chosen(self, source: str, method: str, missing: float = 0.0) -> Run:
        """The best setting on data of which so much is missing, as the run of seed 0 that reads the test split."""
        best = max(self._finals(source, method, missing), key=self.mean_validation)
        return dataclasses.replace(best, seed=0, split="test")

    def best_of(self, source: str, methods: Sequence[str]) -> str:
        """Which method's setting did best on the validation split."""

        def score(method: str) -> float:
            return max(map(self.mean_validation, self._finals(source, method)))

        return max(methods, key=score)

    def _learning_rates(self, source: str, method: str, missing: float = 0.0) -> list[Run]:
        own = METHODS[method].candidates[1] if METHODS[method].own is not None else None
        options = {"missing": missing, "epochs": self.epochs_of(source)}
        return [Run(source, method, lr, DECAYS[1], own, TUNING_SEEDS[0], "validation", **options) for lr in LRS]

    def _rest(self, source: str, method: str, missing: float = 0.0) -> list[Run]:
        if self.quick:
            return []
        best = max(self._learning_rates(source, method, missing), key=self.validation)
        if METHODS[method].own is not None:
            settings = [dataclasses.replace(best, own=own) for own in METHODS[method].candidates]
        else:
            settings = [dataclasses.replace(best, lr=round(best.lr * factor, 6)) for factor in FINER]
        return [dataclasses.replace(setting, weight_decay=decay) for setting in settings for decay in DECAYS]

    def _finals(self, source: str, method: str, missing: float = 0.0) -> list[Run]:
        """The best trials, seed by seed."""
        case = (source, method, missing)
        trials = dict.fromkeys(self._learning_rates(*case) + self._rest(*case))
        best = sorted(trials, key=self.validation, reverse=True)[: 1 if self.quick else FINALISTS]
        return [dataclasses.replace(run, seed=seed) for run in best for seed in self.tuning_seeds]

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        return TUNING_SEEDS[:1] if self.quick else TUNING_SEEDS

    def mean_validation(self, run: Run) -> float:
        """Over the seeds of the trials."""
        return statistics.mean(self.validation(dataclasses.replace(run, seed=seed)) for seed in self.tuning_seeds)

    def validation(self, run: Run) -> float:
        """Its accuracy; that of a run that diverged is 0."""
        return self.results[run].get("validation", 0.0)

    # -- runs and their values --

    def over_seeds(self, run: Run, **changes: object) -> list[Run]:
        return [dataclasses.replace(run, seed=seed, **changes) for seed in range(self.seeds)]

    def final(self, source: str, method: str, **changes: object) -> list[Run]:
        return self.over_seeds(self.chosen(source, method), **changes)

    def complete(self, runs: Sequence[Run], title: str, work: Callable[..., dict[str, Any]] | None = None) -> None:
        """work: as of `Results.complete`."""
        self.results.complete(runs, title, self.workers, work, group)

    def values(self, runs: Sequence[Run], *path: str) -> list[float | None]:
        """A number of each run's result. None: the run diverged. NaN: it has none, as of a modality without samples."""
        found = []
        for run in runs:
            value = self.results[run]
            absent = None if "diverged" in value else math.nan
            for name in path:
                value = value.get(name) if value is not None else None
            found.append(absent if value is None else value)
        return found

    def accuracies(self, runs: Sequence[Run]) -> list[float | None]:
        return self.values(runs, "accuracy")


def name_of(source: str) -> str:
    return Path(source).stem


def modalities_of(source: str) -> tuple[str, ...]:
    return load(source, 0.0, 0).modalities
