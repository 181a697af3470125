"""How the pictures of all benchmarks look: a canvas of panels, its colours, and how it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mla_ext.multimodal import checkpoint

COLORS = ("#2a6f97", "#d1495b", "#66a182", "#edae49", "#6d597a", "#8d99ae")
MUTED, STRONG = "#a8b3bd", "#1d1d1f"


def canvas(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns), each of `width` × `height` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e3e6e8", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def line(ax: Any, points: Sequence[tuple[float, float]], **style: Any) -> None:
    """A line through the points, if there are any."""
    if points:
        ax.plot(*zip(*points, strict=True), "o-", markersize=3, **style)


def ratios(
    ax: Any, labels: Sequence[object], heights: Mapping[str, Sequence[float]], colors: Mapping[str, str]
) -> None:
    """A group of bars for each label, a bar of each series in it, and a line at 1."""
    width = 0.8 / max(len(heights), 1)
    for offset, (name, values) in enumerate(heights.items()):
        ax.bar(
            [x + width * offset for x in range(len(labels))], values, width, color=colors.get(name, MUTED), label=name
        )
    ax.axhline(1, color=STRONG, linewidth=0.8)
    ax.set_xticks([x + width * (len(heights) - 1) / 2 for x in range(len(labels))], labels)


def save(figure: Any, path: Path) -> None:
    """As a PNG, whole or not at all; its directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))
