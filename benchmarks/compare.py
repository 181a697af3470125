"""What got slower, and what faster, between two runs of a speed benchmark.

`python -m benchmarks.compare BEFORE.json AFTER.json [--threshold 0.1]`

A candidate got slower if its median grew by more than the threshold and the spreads (p20–p80) of the two runs do not
overlap; faster likewise. The exit status is 1 if something got slower. Both runs should be of one machine, as busy then
as now.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Timings = dict[tuple[str, str], dict[str, float]]  # (row, candidate) -> median, p20, p80 in ms


def load(path: Path) -> Timings:
    """The timings of a result file. ValueError where it is no such file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {(_title(row["sizes"]), name): t for row in rows for name, t in row["timings"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a JSON file that a speed benchmark wrote ({error!r})") from error


def _title(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sizes.items())


def verdict(before: dict[str, float], after: dict[str, float], threshold: float) -> str:
    """ "slower", "faster" or "", where the change is within the threshold or the spreads overlap."""
    ratio = after["median"] / before["median"]
    if ratio > 1 + threshold and after["p20"] > before["p80"]:
        return "slower"
    if ratio < 1 / (1 + threshold) and after["p80"] < before["p20"]:
        return "faster"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="how much slower counts (default 0.1: by a tenth)")
    arguments = parser.parse_args(argv)
    if not arguments.threshold >= 0:
        parser.error(f"--threshold: expected a number >= 0, got {arguments.threshold:g}")
    try:
        before, after = load(arguments.before), load(arguments.after)
    except ValueError as error:
        parser.error(str(error))
    common = [key for key in before if key in after]
    if not common:
        parser.error("before, after: expected files with a candidate in common, found none")
    verdicts = {key: verdict(before[key], after[key], arguments.threshold) for key in common}
    print("| sizes | candidate | before, ms | after, ms | after ÷ before | |\n|---|---|---|---|---|---|")
    for (title, name), word in verdicts.items():
        a, b = before[title, name], after[title, name]
        cells = [f"{t['median']:.4g} ({t['p20']:.4g}–{t['p80']:.4g})" for t in (a, b)]
        print(f"| {title} | {name} | {' | '.join(cells)} | {b['median'] / a['median']:.2f} | {word} |")
    for key in [*(key for key in before if key not in after), *(key for key in after if key not in before)]:
        print(f"{' '.join(key)}: only in {arguments.before if key in before else arguments.after}")
    counts = {word: sum(v == word for v in verdicts.values()) for word in ("slower", "faster")}
    print(f"{counts['slower']} slower, {counts['faster']} faster, of {len(common)}")
    return int(counts["slower"] > 0)


if __name__ == "__main__":
    sys.exit(main())
