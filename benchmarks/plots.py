"""What the pictures of benchmarks draw beside what those of training runs do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mla_ext.multimodal.plots import COLORS, MUTED, STRONG, canvas, save

__all__ = ["COLORS", "MUTED", "STRONG", "canvas", "line", "ratios", "save"]


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
