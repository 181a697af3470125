"""The pictures of the evidence."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..plots import COLORS, MUTED, STRONG, canvas, save
from .measures import unit_features
from .methods import METHODS
from .runs import Run, Trained, load, train


def mean_and_std(values: Sequence[float | None]) -> tuple[float, float]:
    """In %, of the runs that did not diverge; NaN where fewer than two are left."""
    finite = [100 * v for v in values if v is not None]
    return (statistics.mean(finite), statistics.stdev(finite)) if len(finite) > 1 else (float("nan"), float("nan"))


def dots(accuracies: Mapping[str, Mapping[str, Sequence[float | None]]], reference: str, path: Path) -> None:
    """{dataset: {method: accuracies}}: a panel for each dataset, a dot for each method, a line at `reference`."""
    figure, axes = canvas(1, len(accuracies), 3.2, 0.6 + 0.27 * max(map(len, accuracies.values())))
    for i, (ax, (dataset, methods)) in enumerate(zip(axes.flat, accuracies.items(), strict=True)):
        for y, (title, values) in enumerate(methods.items()):
            mean, std = mean_and_std(values)
            color = COLORS[0] if title.startswith("MLA") else STRONG if title == reference else MUTED
            ax.errorbar(mean, y, xerr=std, fmt="o", color=color, markersize=6, linewidth=1.6)
        ax.axvline(mean_and_std(methods[reference])[0], color=STRONG, linewidth=0.8, linestyle=":")
        ax.set(title=dataset, yticks=range(len(methods)), xlabel="test accuracy, %")
        ax.set_yticklabels(methods if i == 0 else [])
        ax.invert_yaxis()
    save(figure, path)


def gap(runs: Sequence[Sequence[Run]], path: Path) -> None:
    """A row for each dataset, a column for each method: two principal components of the head's inputs, by modality."""
    figure, axes = canvas(len(runs), len(runs[0]), 3.4, 3.0)
    for row, ax_row in zip(runs, axes, strict=True):
        for run, ax in zip(row, ax_row, strict=True):
            data = load(run.data, 0.0, 0)
            trained = train(run, data)
            assert isinstance(trained, Trained), trained
            features = unit_features(trained.model, data, "validation")
            x = torch.cat(list(features.values()))
            x = x - x.mean(dim=0)
            _, _, v = torch.pca_lowrank(x, q=2, center=False, niter=8)
            flat = (x @ v).split([len(f) for f in features.values()])
            for (modality, points), color in zip(zip(features, flat, strict=True), COLORS, strict=False):
                ax.scatter(*points.T, s=5, color=color, alpha=0.5, label=modality, linewidths=0)
            ax.set(title=f"{Path(run.data).stem}: {METHODS[run.method].title}", xticks=[], yticks=[])
        ax_row[0].legend(loc="best", fontsize=8, markerscale=2, frameon=True, edgecolor="none")
    save(figure, path)


def curves(
    drawn: Mapping[str, tuple[Sequence[float], Mapping[str, list]]], plain: Mapping[str, list], path: Path
) -> None:
    """{hyperparameter: (values, {dataset: accuracies of each})}; `plain`: {dataset: those without the projection}."""
    figure, axes = canvas(len(drawn), len(plain), 3.2, 2.7)
    for ax_row, (title, (values, datasets)) in zip(axes, drawn.items(), strict=True):
        for ax, (dataset, found) in zip(ax_row, datasets.items(), strict=True):
            means, stds = zip(*map(mean_and_std, found), strict=True)
            labels = [f"{v:g}" for v in values]
            ax.errorbar(labels, means, yerr=stds, fmt="o-", color=COLORS[0], linewidth=1.6, markersize=4)
            ax.axhline(mean_and_std(plain[dataset])[0], color=STRONG, linestyle=":", linewidth=1, label="no projection")
            ax.set(title=dataset, xlabel=title, ylabel="test accuracy, %")
    axes[0][0].legend(fontsize=8, frameon=False)
    save(figure, path)


def tolerance(lrs: Sequence[float], drawn: Mapping[str, Mapping[str, Mapping[str, list[float]]]], path: Path) -> None:
    """{epoch: {dataset: {method: the mean accuracy at each lr, %}}}: a row for each epoch, a panel for each dataset."""
    figure, axes = canvas(len(drawn), len(next(iter(drawn.values()))), 3.2, 2.7)
    for ax_row, (epoch, datasets) in zip(axes, drawn.items(), strict=True):
        for ax, (dataset, methods) in zip(ax_row, datasets.items(), strict=True):
            others, ours = itertools.cycle(COLORS[1:]), itertools.cycle(("-", ":"))
            for title, found in methods.items():
                mla = title.startswith("MLA")
                color = COLORS[0] if mla else STRONG if title == METHODS["alternating"].title else next(others)
                style, width = (next(ours), 2.2) if mla else ("--", 1.2)
                ax.plot(lrs, found, style, marker="o", markersize=3, linewidth=width, color=color, label=title)
            ax.set(title=f"{dataset}, {epoch} epoch", xscale="log", xlabel="lr", ylabel="test accuracy, %")
    labels = axes[0][0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save(figure, path)


def scatter(points: Mapping[str, Mapping[str, list[tuple[float, float]]]], path: Path) -> None:
    """{dataset: {method: [(gap, accuracy)]}}."""
    figure, axes = canvas(1, len(points), 3.4, 3.4)
    for ax, (dataset, groups) in zip(axes.flat, points.items(), strict=True):
        for title, found in groups.items():
            if found:
                color = COLORS[0] if title.startswith("MLA") else MUTED
                ax.scatter([g for g, _ in found], [100 * a for _, a in found], s=14, color=color, alpha=0.7)
        ax.set(title=dataset, xlabel="distance of the centroids", ylabel="test accuracy, %")
    handles = [
        axes.flat[0].scatter([], [], color=color, label=name) for color, name in ((COLORS[0], "MLA"), (MUTED, "others"))
    ]
    axes.flat[0].legend(handles=handles, fontsize=8, frameon=False)
    save(figure, path)


def entropy(drawn: Mapping[str, Mapping[str, tuple[list[int], list[int]]]], path: Path) -> None:
    """{dataset: {modality: (samples, right)}}, by bin of the entropy: accuracy as lines, samples as dots' sizes."""
    figure, axes = canvas(1, len(drawn), 3.2, 3.2)
    for ax, (dataset, modalities) in zip(axes.flat, drawn.items(), strict=True):
        for (modality, (samples, right)), color in zip(modalities.items(), COLORS, strict=False):
            kept = [(i + 0.5, 100 * r / n, n) for i, (n, r) in enumerate(zip(samples, right, strict=True)) if n >= 10]
            x, y, n = zip(*kept, strict=True) if kept else ((), (), ())
            x = [value / len(samples) for value in x]
            ax.plot(x, y, color=color, linewidth=1.4, label=modality)
            ax.scatter(x, y, color=color, s=[6 + 120 * count / sum(samples) for count in n])
        ax.set(title=dataset, xlabel="entropy / log C", ylabel="accuracy, %", ylim=(0, 102), xlim=(0, 1))
        ax.legend(fontsize=8, frameon=False)
    save(figure, path)
