"""`python -m benchmarks.evidence {table1,…,all} --data digits FILE.npz … [--seeds 5]`; `make evidence` for all.

Results of runs are kept in a file and not made again; tables and pictures go to benchmarks/results/evidence/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import RESULTS
from .experiments import EXPERIMENTS, Evidence, everything
from .runs import EPOCHS, Results, load, workers


def main(argv: Sequence[str] | None = None) -> int:
    commands = {**EXPERIMENTS, "all": everything}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=commands, help="which table, figure or question; all: every one")
    parser.add_argument("--data", nargs="+", default=["digits"], help='files, or "digits" for the built-in data')
    parser.add_argument("--seeds", type=int, default=5, help="runs of each setting, at least 2 (default 5)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of every run (default {EPOCHS})")
    parser.add_argument("--workers", type=int, default=workers(), help="runs at a time (default: one a core)")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence.jsonl"), help="where results are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "evidence", help="directory for tables and pictures")
    arguments = parser.parse_args(argv)
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
    options = (arguments.seeds, arguments.epochs, arguments.workers)
    commands[arguments.what](Evidence(arguments.data, results, arguments.out, *options))
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
