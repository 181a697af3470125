"""Numbers as people read them: mean ± std, paired differences with confidence intervals, tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mla_ext.multimodal import checkpoint

from ..machine import machine


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return f"## {self.title}\n\n" + "\n".join(lines)


def write(stem: Path, heading: str, text: str, tables: Sequence[Table]) -> None:
    """`stem`.md with all of it, and `stem`.csv with the rows of the tables, each after the title of its table."""
    made = f"{machine('cpu')}."
    page = "\n\n".join([f"# {heading}", " ".join(text.split()), made, *(table.markdown() for table in tables)])
    stem.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(stem.with_suffix(".md"), page + "\n")
    file = io.StringIO()
    writer = csv.writer(file)
    for table in tables:
        writer.writerow(["table", *table.columns])
        writer.writerows([table.title, *row] for row in table.rows)
    checkpoint.write_text(stem.with_suffix(".csv"), file.getvalue())


def percent(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation in %. Runs that diverged (None) or had no sample (NaN) are counted and left out."""
    total, found = len(values), [100 * value for value in numbers(values)]
    diverged = sum(value is None for value in values)
    lost = {"diverged": diverged, "no sample": total - len(found) - diverged}
    if len(found) < 2:
        return ", ".join(f"{what} in {n} of {total}" for what, n in lost.items() if n) or f"{found[0]:.1f}"
    notes = ", ".join(f"{n} of {total} {what}" for what, n in lost.items() if n)
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}" + (f" ({notes})" if notes else "")


def numbers(values: Sequence[float | None]) -> list[float]:
    """The values of the runs that have one: neither None nor NaN."""
    return [value for value in values if value is not None and not math.isnan(value)]


def difference(values: Sequence[float | None], others: Sequence[float | None]) -> str:
    """The mean difference of runs with the same seeds in percentage points, with its 95 % interval by Student's t."""
    pairs = [100 * (a - b) for a, b in zip(values, others, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return "-"
    low, high = interval(pairs)
    return f"{statistics.mean(pairs):+.1f} [{low:+.1f}, {high:+.1f}]"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of at least two values, by Student's t."""
    from scipy.stats import t

    mean = statistics.mean(values)
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half


def correlation(x: Sequence[float], y: Sequence[float]) -> str:
    """Pearson's r with its 95 % interval (Fisher), and Spearman's ρ; "-" for fewer than 4 pairs or a constant."""
    from scipy.stats import pearsonr, spearmanr

    if len(x) < 4 or min(x) == max(x) or min(y) == max(y):
        return "-"
    r = pearsonr(x, y)
    low, high = r.confidence_interval()
    return f"r = {r.statistic:+.2f} [{low:+.2f}, {high:+.2f}], ρ = {spearmanr(x, y).statistic:+.2f} ({len(x)} runs)"
