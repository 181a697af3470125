"""What a method gives that nobody tuned for the data, and how much its learning rate matters."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import mla_ext
from mla_ext.multimodal.model import MultimodalModel

from . import figures
from .methods import METHODS
from .protocol import DECAYS, LRS, MAIN, Evidence, modalities_of, name_of
from .report import Table, percent
from .runs import Run, Trained, load, train

TOLERANCE_METHODS = ("concat", "late", "alternating", "slow-head", "igm", "released", "mla", "mla-rank")
TOLERANCE_LRS = (*LRS, 0.3, 1.0)
NEAR = 2.0  # points: a learning rate is as good as the best if it loses no more
EPOCHS = ("best", "last")


@dataclasses.dataclass(frozen=True)
class EndsRun(Run):
    """A run that is told of at its best epoch and at its last."""

    ends: tuple[str, ...] = EPOCHS


@dataclasses.dataclass(frozen=True)
class TimedRun(Run):
    """A run of which only the time is told. It is trained alone."""

    timed: bool = True


def measure(run: EndsRun, trained: Trained | str | None = None) -> dict[str, Any]:
    """The test accuracies at both epochs."""
    data = load(run.data, 0.0, 0)
    trained = trained or train(run, data)
    if isinstance(trained, str):
        return {"diverged": trained}
    best = accuracies(trained.model, data)
    trained.model.load_state_dict(trained.last)
    return {"best": best, "last": accuracies(trained.model, data)}


def timed(run: TimedRun) -> dict[str, Any]:
    """Seconds of training and validation."""
    data = load(run.data, 0.0, 0)
    train(dataclasses.replace(run, epochs=1), data)  # what is done once is not counted
    started = time.perf_counter()
    train(run, data)
    return {"seconds": time.perf_counter() - started}


def accuracies(model: MultimodalModel, data: mla_ext.MultimodalData) -> dict[str, Any]:
    report = mla_ext.evaluate(model, data, "test").as_dict()
    alone = {m: score["accuracy"] for m, score in report["modalities"].items()}
    return {"together": report["fusions"][report["fused"]]["accuracy"], "modalities": alone}


def untuned(e: Evidence, source: str, method: str, lr: float) -> list[EndsRun]:
    """A run for each seed, with everything but lr at its default."""
    first = EndsRun(source, method, lr, DECAYS[1], METHODS[method].default, 0, epochs=e.epochs_of(source))
    return [dataclasses.replace(first, seed=seed) for seed in range(e.seeds)]


def mean(values: Sequence[float | None]) -> float:
    """In %; a run that diverged counts as 0."""
    return 100 * statistics.mean(0.0 if value is None else value for value in values)


def table0(e: Evidence) -> None:
    """Defaults: one setting of each method for all data."""
    first = e.sources[0]

    def sweep(method: str, lr: float) -> Run:
        own, seed = METHODS[method].default, e.tuning_seeds[0]
        return Run(first, method, lr, DECAYS[1], own, seed, "validation", epochs=e.epochs_of(first))

    trials = [dataclasses.replace(sweep(m, lr), seed=seed) for m in MAIN for lr in LRS for seed in e.tuning_seeds]
    e.complete(trials, "table 0, one sweep of lr")
    lrs = {m: max(LRS, key=lambda lr, m=m: e.mean_validation(sweep(m, lr))) for m in MAIN}
    runs = {(s, m): untuned(e, s, m, lrs[m]) for s in e.sources for m in MAIN}
    e.complete([run for group in runs.values() for run in group], "table 0", measure)
    times = {m: TimedRun(first, m, lrs[m], DECAYS[1], METHODS[m].default, 0, epochs=e.epochs_of(first)) for m in MAIN}
    e.results.complete(times.values(), "table 0, seconds", 1, timed)

    names = [name_of(s) for s in e.sources]
    tables = []
    for epoch in EPOCHS:
        found = {key: e.values(group, epoch, "together") for key, group in runs.items()}
        rows = []
        for m in MAIN:
            own = METHODS[m].own
            setting = f"lr {lrs[m]:g}" + ("" if own is None else f", {own} {METHODS[m].default:g}")
            cells = [percent(found[s, m]) for s in e.sources]
            worst, name = min((mean(found[s, m]) - mean(found[s, "alternating"]), name_of(s)) for s in e.sources)
            seconds = e.results[times[m]]["seconds"]
            rows.append([METHODS[m].title, setting, *cells, f"{worst:+.1f} {name}", f"{seconds:.1f}"])
        columns = ["method", "setting", *names, "worst difference from alternation", "seconds a run"]
        tables.append(Table(f"Test accuracy of all modalities together, {epoch} epoch", columns, rows))
    for s in e.sources:
        rows = [
            [METHODS[m].title, *(percent(e.values(runs[s, m], epoch, "modalities", x)) for epoch in EPOCHS for x in of)]
            for of in [modalities_of(s)]
            for m in MAIN
        ]
        columns = ["method", *(f"{x}, {epoch} epoch" for epoch in EPOCHS for x in modalities_of(s))]
        tables.append(Table(f"{name_of(s)}: each modality alone", columns, rows))
    text = f"""{e.label}Nothing is tuned for the data. Every method has one setting: weight decay {DECAYS[1]:g}, the
    default of its own hyperparameter (its authors' where they give one), and the lr among
    {", ".join(f"{lr:g}" for lr in LRS)} with the best mean validation accuracy over {len(e.tuning_seeds)} seeds on
    {names[0]}. {e.seeds} other seeds, {e.epochs} epochs. Best epoch: the one best on the validation split. Values: mean
    ± standard deviation over the seeds, in %. In differences a run that diverged counts as 0. Seconds: of one run alone
    on {names[0]}, training and validation."""
    e.write("table0", "Table 0: defaults", text, tables)


def tolerance(e: Evidence) -> None:
    """How much does the learning rate matter, everything else fixed?"""
    runs = {(s, m, lr): untuned(e, s, m, lr) for s in e.sources for m in TOLERANCE_METHODS for lr in TOLERANCE_LRS}
    e.complete([run for group in runs.values() for run in group], "tolerance of lr", measure)
    found = {(epoch, *key): e.values(group, epoch, "together") for epoch in EPOCHS for key, group in runs.items()}
    tables = []
    for epoch in EPOCHS:
        rows = []
        for m in TOLERANCE_METHODS:
            means = [statistics.mean(mean(found[epoch, s, m, lr]) for s in e.sources) for lr in TOLERANCE_LRS]
            good = [lr for lr, value in zip(TOLERANCE_LRS, means, strict=True) if value >= max(means) - NEAR]
            cells = [f"{value:.1f}" for value in means]
            rows.append([METHODS[m].title, *cells, f"{len(good)} of {len(means)}: {min(good):g} to {max(good):g}"])
        columns = ["method", *(f"lr {lr:g}" for lr in TOLERANCE_LRS), f"within {NEAR:g} points of its best"]
        tables.append(Table(f"Mean over the data, {epoch} epoch", columns, rows))
    for s in e.sources:
        rows = [
            [METHODS[m].title, epoch, *(percent(found[epoch, s, m, lr]) for lr in TOLERANCE_LRS)]
            for m in TOLERANCE_METHODS
            for epoch in EPOCHS
        ]
        tables.append(Table(name_of(s), ["method", "epoch", *(f"lr {lr:g}" for lr in TOLERANCE_LRS)], rows))
    text = f"""{e.label}Test accuracy in %, {e.seeds} seeds, {e.epochs} epochs. Everything but lr is fixed: weight decay
    {DECAYS[1]:g}, and the default of the own hyperparameter. In the means and in the picture a run
    that diverged counts as 0. No setting was chosen by these numbers."""
    e.write("tolerance", "How much does the learning rate matter?", text, tables)
    drawn = {
        epoch: {
            name_of(s): {
                METHODS[m].title: [mean(found[epoch, s, m, lr]) for lr in TOLERANCE_LRS] for m in TOLERANCE_METHODS
            }
            for s in e.sources
        }
        for epoch in EPOCHS
    }
    figures.tolerance(TOLERANCE_LRS, drawn, e.out / "tolerance.png")
