"""Pictures of training runs, and how all pictures look: a canvas of panels, its colours, and how it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint

__all__ = [
    "COLORS",
    "MUTED",
    "STRONG",
    "canvas",
    "draw_confusion",
    "draw_reliability",
    "draw_runs",
    "draw_training",
    "save",
]

COLORS = ("#2a6f97", "#d1495b", "#66a182", "#edae49", "#6d597a", "#8d99ae")
MUTED, STRONG = "#a8b3bd", "#1d1d1f"

Record = Mapping[str, Any]  # of the history that `fit` returns


def canvas(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns), each of `width` × `height` inches. ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e3e6e8", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """As a PNG, whole or not at all; its directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_training(history: Sequence[Record], title: str) -> Any:
    """By epoch: the validation accuracy of each modality and of the fusion, the losses, and the plasticity if noted."""
    plasticity = [record["plasticity"] for record in history if record.get("plasticity")]
    figure, axes = canvas(1, 3 if plasticity else 2, 4.6, 3.6)
    figure.suptitle(title)
    accuracy, loss = axes[0, :2]
    epochs = [record["epoch"] for record in history]
    validation = [record["validation"] for record in history]
    modalities = list(validation[0]["modalities"])
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(modalities)}
    for name in modalities:
        _line(accuracy, epochs, [v["modalities"][name]["accuracy"] for v in validation], name, colors[name])
    fused = validation[0]["fused"]
    scores = [v["fusions"][fused]["accuracy"] for v in validation]
    _line(accuracy, epochs, scores, "joint" if fused == "joint" else f"{fused} fusion", STRONG)
    best = max(record["epoch"] for record in history if record["best"])
    accuracy.axvline(best, color=MUTED, linewidth=0.8, linestyle="--", label=f"best epoch ({best})")
    accuracy.set(title="validation accuracy", ylim=(0, 1.02))
    for name in history[0]["training_loss"]:
        losses = [record["training_loss"][name] for record in history]
        _line(loss, epochs, losses, f"training, {name}", colors.get(name, MUTED))
    _line(loss, epochs, [v["loss"] for v in validation], "validation, fused", STRONG)
    loss.set(title="loss", ylim=(0, None))
    if plasticity:
        _line(axes[0, 2], epochs[-len(plasticity) :], plasticity, "mean eigenvalue of P", COLORS[0])
        passed = {record["epoch"]: record["gradient_passed"] for record in history if "gradient_passed" in record}
        if passed:
            _line(axes[0, 2], [*passed], [*passed.values()], "last gradient, ‖G P‖ / ‖G‖", COLORS[1])
        axes[0, 2].set(title="plasticity of the head", ylim=(0, 1.02))
    _finish(axes)
    return figure


def draw_confusion(labels: Sequence[str], predicted: Sequence[str], title: str) -> Any:
    """How often each true class (row) was taken for each class (column), as shares of the row; counts where few."""
    classes = sorted({*labels, *predicted})
    place = {name: i for i, name in enumerate(classes)}
    counts = [[0] * len(classes) for _ in classes]
    for label, guess in zip(labels, predicted, strict=True):
        counts[place[label]][place[guess]] += 1
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    side = min(max(3.6, 1.6 + 0.42 * len(classes)), 14)
    figure, axes = canvas(1, 1, side + 0.8, side)
    ax = axes[0, 0]
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=ax, shrink=0.8, label="share of the true class")
    size = 9 if len(classes) <= 20 else 5
    ax.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0, fontsize=size)
    ax.set_yticks(range(len(classes)), classes, fontsize=size)
    ax.set(title=title, xlabel="predicted", ylabel="true")
    ax.grid(False)
    if len(classes) <= 20:
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                color = "white" if shares[i][j] > 0.5 else STRONG
                if count:
                    ax.text(j, i, str(count), ha="center", va="center", color=color, fontsize=8)
    return figure


def draw_reliability(found: Mapping[str, Mapping[str, Record]], title: str) -> Any:
    """A panel for each modality and the fusion: accuracy over confidence, before and after the temperatures."""
    figure, axes = canvas(1, len(found), 3.4, 3.6)
    figure.suptitle(title)
    for ax, (name, curves) in zip(axes[0], found.items(), strict=True):
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle="--")
        for (when, curve), color in zip(curves.items(), (COLORS[1], COLORS[0]), strict=False):
            rows = zip(curve["samples"], curve["confidence"], curve["accuracy"], strict=True)
            points = [row for row in rows if row[0] > 0]
            counts, confidence, accuracy = zip(*points, strict=True)
            ax.plot(confidence, accuracy, color=color, linewidth=1, label=f"{when}, ECE {curve['ece']:.1%}")
            areas = [6 + 90 * count / sum(counts) for count in counts]  # of the share of the samples in the bin
            ax.scatter(confidence, accuracy, areas, color=color, alpha=0.7)
        ax.set(title=name, xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="confidence")
        ax.legend(fontsize=8, frameon=False, loc="upper left")
    axes[0, 0].set_ylabel("accuracy")
    return figure


def draw_runs(histories: Mapping[str, Sequence[Record]]) -> Any:
    """Several runs in one picture: the validation accuracy and the loss of each one's fusion, by epoch."""
    figure, axes = canvas(1, 2, 5.4, 3.8)
    for i, (name, history) in enumerate(histories.items()):
        epochs, color = [record["epoch"] for record in history], COLORS[i % len(COLORS)]
        validation = [record["validation"] for record in history]
        _line(axes[0, 0], epochs, [v["fusions"][v["fused"]]["accuracy"] for v in validation], name, color)
        _line(axes[0, 1], epochs, [v["loss"] for v in validation], name, color)
    axes[0, 0].set(title="validation accuracy, fused", ylim=(0, 1.02))
    axes[0, 1].set(title="validation loss, fused", ylim=(0, None))
    _finish(axes)
    return figure


def _line(ax: Any, x: Sequence[float], y: Sequence[float], label: str, color: str) -> None:
    ax.plot(x, y, "o-" if len(x) < 40 else "-", markersize=3, label=label, color=color)


def _finish(axes: Any) -> None:
    for ax in axes.flat:
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(fontsize=8, frameon=False)
