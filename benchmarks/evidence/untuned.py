"""What a method gives that nobody tuned for the data, and how much its learning rate matters."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

import mla_ext
from mla_ext.multimodal.fit import NonFiniteLossError
from mla_ext.multimodal.model import MultimodalModel

from . import figures
from .methods import METHODS
from .protocol import DECAYS, LRS, MAIN, Evidence, modalities_of, name_of
from .report import Table, percent
from .runs import Run, load, trained

TOLERANCE_METHODS = ("concat", "late", "alternating", "slow-head", "igm", "released", "mla", "mla-rank")
TOLERANCE_LRS = (*LRS, 0.3, 1.0)
NEAR = 2.0  # points: a learning rate is as good as the best if it loses no more
EPOCHS = ("best", "last")


@dataclasses.dataclass(frozen=True)
class EndsRun(Run):
    """A run that is told of at its best epoch and at its last."""

    ends: tuple[str, ...] = EPOCHS


def measure(run: EndsRun) -> dict[str, Any]:
    """The test accuracies at both epochs, and how long the training took."""
    data = load(run.data, 0.0, 0)
    last: dict[str, Tensor] = {}

    def keep(model: MultimodalModel, *_: object) -> None:  # `fit` ends by loading the best epoch over the last
        last.update(copy.deepcopy(model.state_dict()))

    started = time.perf_counter()
    try:
        model, _ = trained(run, data, lambda model: model.register_load_state_dict_pre_hook(keep))
    except NonFiniteLossError as error:
        return {"diverged": str(error).partition(":")[0]}
    seconds = time.perf_counter() - started
    best = accuracies(model, data)
    model.load_state_dict(dict(last))
    return {"best": best, "last": accuracies(model, data), "seconds": seconds}


def accuracies(model: MultimodalModel, data: mla_ext.MultimodalData) -> dict[str, Any]:
    report = mla_ext.evaluate(model, data, "test").as_dict()
    alone = {m: score["accuracy"] for m, score in report["modalities"].items()}
    return {"together": report["fusions"][report["fused"]]["accuracy"], "modalities": alone}


def untuned(e: Evidence, source: str, method: str, lr: float) -> list[EndsRun]:
    """A run for each seed, with everything but lr at its default."""
    first = EndsRun(source, method, lr, DECAYS[1], METHODS[method].default, 0, epochs=e.epochs)
    return [dataclasses.replace(first, seed=seed) for seed in range(e.seeds)]


def mean(values: Sequence[float | None]) -> float:
    """In %; a run that diverged counts as 0."""
    return 100 * statistics.mean(0.0 if value is None else value for value in values)


def table0(e: Evidence) -> None:
    """Defaults: one setting of each method for all data."""

    def sweep(method: str, lr: float) -> Run:
        own, seed = METHODS[method].default, e.tuning_seeds[0]
        return Run(e.sources[0], method, lr, DECAYS[1], own, seed, "validation", epochs=e.epochs)

    trials = [dataclasses.replace(sweep(m, lr), seed=seed) for m in MAIN for lr in LRS for seed in e.tuning_seeds]
    e.complete(trials, "table 0, one sweep of lr")
    lrs = {m: max(LRS, key=lambda lr, m=m: e.mean_validation(sweep(m, lr))) for m in MAIN}
    runs = {(s, m): untuned(e, s, m, lrs[m]) for s in e.sources for m in MAIN}
    e.complete([run for group in runs.values() for run in group], "table 0", measure)

    names = [name_of(s) for s in e.sources]
    tables = []
    for epoch in EPOCHS:
        found = {key: e.values(group, epoch, "together") for key, group in runs.items()}
        rows = []
        for m in MAIN:
            own = METHODS[m].own
            setting = f"lr {lrs[m]:g}" + ("" if own is None else f", {own} {METHODS[m].default:g}")
            cells = [percent(found[s, m]) for s in e.sources]
            seconds = [second for s in e.sources for second in e.values(runs[s, m], "seconds") if second is not None]
            taken = f"{statistics.mean(seconds):.1f}" if seconds else "-"
            worst, name = min((mean(found[s, m]) - mean(found[s, "alternating"]), name_of(s)) for s in e.sources)
            rows.append([METHODS[m].title, setting, *cells, f"{worst:+.1f} {name}", taken])
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
    ± standard deviation over the seeds, in %. In differences a run that diverged counts as 0. Seconds: of training and
    validation, one thread a run, {e.workers} runs at a time, the mean over all data."""
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
