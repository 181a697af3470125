"""Which fusion of the modalities' logits is best: their mean, entropy weights, or the mean after `calibrate`?

python -m benchmarks.evidence.fusion --data digits a.npz b.npz. Every model is trained and calibrated on complete data;
the test split is read as it is and with MISSING of its recordings taken away. Writes fusion_methods.md and .csv.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mla_ext
from mla_ext.multimodal.recipe import Settings

from .methods import Setting
from .methods.alternation import build_mla
from .protocol import name_of
from .rank import RankRun, limited, parser_of
from .report import Table, difference, percent, write
from .runs import Results

MISSING = 0.6
METHODS_OF_FUSION = ("mean", "entropy", "calibrated")
CASES = {"full": "complete test data", "missing": f"{MISSING:.0%} missing at test"}


def measure(run: RankRun) -> dict[str, Any]:
    """The test accuracy of each fusion in each case, and the temperatures."""
    data, usual = limited(run.data, run.samples), Settings()
    setting = Setting(usual.lr, usual.weight_decay, run.alpha, run.seed, run.epochs, run.width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model, optimizer = build_mla(data, setting, alpha_scale=usual.alpha_scale, rank=usual.rank)
    mla_ext.fit(model, optimizer, data, epochs=run.epochs, seed=run.seed, progress=False)
    temperatures = mla_ext.calibrate(model, data).tolist()
    result: dict[str, Any] = {"temperatures": temperatures}
    for case, tested in {"full": data, "missing": data.with_missing(MISSING, run.seed)}.items():
        fusions = mla_ext.evaluate(model, tested).fusions
        result[case] = {name: fusions[name].accuracy for name in METHODS_OF_FUSION}
    return result


def page(sources: Sequence[str], seeds: int, epochs: int, samples: int, results: Results, out: Path) -> None:
    def run(source: str, seed: int) -> RankRun:
        return RankRun(source, 64, Settings().alpha, None, seed, epochs, samples)

    work: Any = measure
    results.complete([run(source, seed) for source in sources for seed in range(seeds)], "fusions", 1, work)

    def values(source: str, case: str, method: str) -> list[float]:
        return [results[run(source, seed)][case][method] for seed in range(seeds)]

    tables = []
    for case, title in CASES.items():
        of = functools.partial(values, case=case)
        found = {name_of(s): {m: of(s, method=m) for m in METHODS_OF_FUSION} for s in sources}
        found["mean of the sets"] = {
            m: [statistics.mean(by_seed) for by_seed in zip(*(of(s, method=m) for s in sources), strict=True)]
            for m in METHODS_OF_FUSION
        }
        rows = [
            [
                name,
                *map(percent, row.values()),
                difference(row["calibrated"], row["mean"]),
                difference(row["calibrated"], row["entropy"]),
            ]
            for name, row in found.items()
        ]
        columns = ["data", *METHODS_OF_FUSION, "calibrated minus mean", "calibrated minus entropy"]
        tables.append(Table(title, columns, rows))
    text = f"""Test accuracy in %, mean ± standard deviation over {seeds} seeds. Differences are in points, paired by
    seed, with 95 % intervals (Student's t). MLA with the defaults of `mla-ext train`, alpha {Settings().alpha:g},
    alpha_scale "{Settings().alpha_scale}",
    nothing tuned, {epochs} epochs, linear encoders of 64 features. Of each training split at most {samples} samples are
    used. Temperatures are fitted on the complete validation split. In the last row the
    accuracies of one seed are averaged over the data first."""
    write(out / "fusion_methods", "Mean, entropy and calibrated fusion", text, tables)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "runs/fusion.jsonl")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        parser.error(f"--seeds: expected at least 2, got {arguments.seeds}")
    limits = (arguments.seeds, arguments.epochs, arguments.samples)
    page(arguments.data, *limits, Results(arguments.runs), arguments.out)


if __name__ == "__main__":
    main()
