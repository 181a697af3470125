"""How long the evidence will take, before it starts."""

from __future__ import annotations

import dataclasses
import time

from .experiments import CHOSEN_MISSING, CURVE_ALPHAS, CURVE_FORGETS, MISSING_METHODS, RATES
from .methods import METHODS
from .protocol import DECAYS, FINALISTS, LRS, MAIN, Evidence
from .runs import Run, load, train
from .untuned import TOLERANCE_LRS, TOLERANCE_METHODS

OTHERS = 1.0  # a run of the usual row takes so many times what one of alternation does
ORDERS = 3  # other than the given one, where none of them is the same


def runs(e: Evidence) -> int:
    """About how many runs `all` takes on one data set."""
    seeds, tuning = e.seeds, len(e.tuning_seeds)
    trials = len(LRS) if e.quick else len(LRS) + 4 * len(DECAYS) - 1 + FINALISTS * (tuning - 1)
    table0 = len(MAIN) * (len(LRS) * tuning / len(e.sources) + seeds)
    table1 = len(METHODS) * (trials + seeds)
    table2 = len(MISSING_METHODS) * (len(RATES) - 1) * seeds + len(CHOSEN_MISSING) * (trials + seeds)
    rest = 2 * seeds + 2 * ORDERS * seeds + (len(CURVE_ALPHAS) + len(CURVE_FORGETS)) * seeds
    tolerance = len(TOLERANCE_METHODS) * (len(TOLERANCE_LRS) - 1) * seeds
    return round(table0 + table1 + table2 + rest + tolerance)


def seconds(e: Evidence, source: str) -> float:
    """Of a usual run, from two epochs of alternation."""
    data = load(source, 0.0, 0)
    run = Run(source, "alternating", LRS[0], DECAYS[1], None, 0, "validation", epochs=1)
    train(run, data)
    started = time.perf_counter()
    train(dataclasses.replace(run, epochs=2), data)
    return OTHERS * e.epochs_of(source) * (time.perf_counter() - started) / 2


def estimate(e: Evidence) -> str:
    each = runs(e)
    done = min(1.0, len(e.results.found) / (each * len(e.sources)))
    left = (1 - done) * each * sum(seconds(e, s) for s in e.sources) / e.workers
    return (
        f"About {each * len(e.sources)} runs, {len(e.results.found)} of them done: {left / 60:.0f} minutes on a quiet "
        f"machine, {e.workers} at a time. An interrupted run continues where it was."
    )
