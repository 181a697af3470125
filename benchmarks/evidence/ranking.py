"""Which method wins over all data, and how sure that is."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from .methods import METHODS
from .protocol import MAIN, Evidence, name_of
from .report import Table

DRAWS = 2000
SURE = 0.95


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Of each method: the mean rank over the data sets, its interval, how often it is the lowest of all, and the mean
    difference from the reference with its interval, in points."""

    mean: NDArray[np.float64]
    interval: NDArray[np.float64]  # (2, methods)
    first: NDArray[np.float64]
    difference: NDArray[np.float64]
    difference_interval: NDArray[np.float64]


def bootstrap(accuracies: NDArray[np.float64], reference: int, draws: int = DRAWS, seed: int = 0) -> Ranks:
    """accuracies (methods, data sets, seeds). Rank 1 is the best; methods that tie share the mean of their ranks.

    A draw takes as many data sets as there are, with replacement, and of each as many seeds, the same for all methods.
    Intervals hold 95 % of the draws. Methods that tie for the lowest mean rank share the draw.
    """
    methods, sets, seeds = accuracies.shape
    generator = np.random.default_rng(seed)
    drawn, differences = np.empty((draws, methods)), np.empty((draws, methods))
    for i in range(draws):
        chosen = generator.integers(sets, size=sets)
        repeats = generator.integers(seeds, size=(sets, seeds))
        means = accuracies[:, chosen[:, None], repeats].mean(axis=2)
        drawn[i] = mean_ranks(means)
        differences[i] = 100 * (means - means[reference]).mean(axis=1)
    lowest = np.isclose(drawn, drawn.min(axis=1, keepdims=True))
    means = accuracies.mean(axis=2)
    return Ranks(
        mean_ranks(means),
        np.quantile(drawn, (0.025, 0.975), axis=0),
        (lowest / lowest.sum(axis=1, keepdims=True)).mean(axis=0),
        100 * (means - means[reference]).mean(axis=1),
        np.quantile(differences, (0.025, 0.975), axis=0),
    )


def mean_ranks(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """means (methods, data sets) -> the mean rank of each method."""
    ranks: NDArray[np.float64] = rankdata(-means.round(12), axis=0).mean(axis=1)
    return ranks


def ranking(e: Evidence) -> None:
    """The methods of Table 1, ranked over the data sets."""
    e.tune(MAIN)
    e.complete([run for s in e.sources for m in MAIN for run in e.final(s, m)], "ranking")
    found = [[[value or 0.0 for value in e.accuracies(e.final(s, m))] for s in e.sources] for m in MAIN]
    ranks = bootstrap(np.array(found), MAIN.index("alternating"))
    order = np.argsort(ranks.mean, kind="stable")
    rows = []
    for i in order:
        low, high = ranks.interval[:, i]
        against = "-"
        if MAIN[i] != "alternating":
            below, above = ranks.difference_interval[:, i]
            against = f"{ranks.difference[i]:+.2f} [{below:+.2f}, {above:+.2f}]"
        cells = [f"{ranks.mean[i]:.1f} [{low:.1f}, {high:.1f}]", f"{100 * ranks.first[i]:.0f} %", against]
        rows.append([METHODS[MAIN[i]].title, *cells])
    best = int(np.argmax(ranks.first))
    claim = f"{METHODS[MAIN[best]].title} has the lowest mean rank in {100 * ranks.first[best]:.0f} % of the draws"
    verdict = f"{claim}: it wins." if ranks.first[best] >= SURE else f"{claim}, more than any other: no method wins."
    text = f"""{e.protocol} Ranks are of the mean test accuracies of Table 1 on {", ".join(map(name_of, e.sources))}; 1
    is the best. Intervals are of {DRAWS} bootstrap draws of data sets and of seeds. A run that diverged counts as 0.
    {verdict} (A method wins here if that is so in {SURE:.0%} of the draws.)"""
    columns = ["method", "mean rank", "lowest of all", "against alternation, points"]
    e.write("ranking", "Which method wins over all data?", text, [Table("Ranks", columns, rows)])
