"""Numbers as people read them: mean ± std, paired differences with confidence intervals, tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
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
    """Mean ± standard deviation in %; a run without a value, None, is counted and left out."""
    finite = [100 * value for value in values if value is not None]
    lost = len(values) - len(finite)
    note = f" ({lost} of {len(values)} diverged)" if lost else ""
    if len(finite) < 2:
        return f"diverged in {lost} of {len(values)}" if lost else f"{finite[0]:.1f}"
    return f"{statistics.mean(finite):.1f} ± {statistics.stdev(finite):.1f}{note}"


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
