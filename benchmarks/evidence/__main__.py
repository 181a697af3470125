"""`python -m benchmarks.evidence {table0,…,all} --data digits FILE.npz … [--seeds 5]`; `make evidence` for all.

Results of runs are kept in a file and not made again; tables and pictures go to benchmarks/results/evidence/. With
--quick all is smaller and says so, and goes to build/evidence-quick/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import RESULTS
from .estimate import estimate
from .experiments import EXPERIMENTS, everything
from .protocol import Evidence
from .runs import EPOCHS, Results, load, workers

QUICK_EPOCHS = 8
FULL = {"seeds": 5, "epochs": EPOCHS, "runs": Path("runs/evidence.jsonl"), "out": RESULTS / "evidence"}
QUICK = {"seeds": 2, "epochs": QUICK_EPOCHS, "runs": Path("runs/quick.jsonl"), "out": Path("build/evidence-quick")}


def main(argv: Sequence[str] | None = None) -> int:
    commands = {**EXPERIMENTS, "all": everything}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=commands, help="which table, figure or question; all: every one")
    parser.add_argument("--data", nargs="+", default=["digits"], help='files, or "digits" for the built-in data')
    parser.add_argument("--quick", action="store_true", help="2 seeds, 4 trials, fewer epochs: a look, no evidence")
    parser.add_argument("--seeds", type=int, help="runs of each setting, at least 2 (default 5; quick 2)")
    parser.add_argument("--epochs", type=int, help=f"of every run (default {EPOCHS}; quick {QUICK_EPOCHS})")
    parser.add_argument("--workers", type=int, default=workers(), help="runs at a time (default: one a core)")
    parser.add_argument("--runs", type=Path, help="where results are kept (default runs/evidence.jsonl)")
    parser.add_argument("--out", type=Path, help="directory for tables and pictures")
    arguments = parser.parse_args(argv)
    usual = QUICK if arguments.quick else FULL
    for name, value in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name, least in (("seeds", 2), ("epochs", 1), ("workers", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(arguments, name)}")
    stems = [Path(source).stem for source in arguments.data]
    if len(set(stems)) != len(stems):
        parser.error(f"--data: expected files of different names, got {arguments.data}")
    try:
        for source in arguments.data:
            load(source, 0.0, 0)
    except (OSError, ValueError, ImportError) as error:
        parser.error(f"--data: {error}")
    results = Results(arguments.runs)
    options = (arguments.seeds, arguments.epochs, arguments.workers, arguments.quick)
    evidence = Evidence(arguments.data, results, arguments.out, *options)
    if arguments.what == "all":
        print(estimate(evidence), flush=True)
    commands[arguments.what](evidence)
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
