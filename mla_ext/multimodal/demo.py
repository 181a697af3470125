"""The demo: MLA, alternation alone and joint training on built-in data, in tables and a picture."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..info import build_info
from ..ops import Hyperparameters, head_step_
from . import checkpoint
from .data import MultimodalData, digits
from .evaluate import Report, evaluate
from .fit import fit
from .precision import choose_device
from .recipe import Settings, build

__all__ = ["PICTURE", "demo", "time_head_step"]

PICTURE = "mla_ext_demo.png"
TITLES = {"concat": "Concatenation", "alternating": "Alternation alone", "mla": "MLA"}
COLORS = {"concat": "#a8b3bd", "alternating": "#e0a458", "mla": "#2a6f97"}
FUSED_COLOR, MODALITY_COLORS = "#1d1d1f", ("#2a6f97", "#d1495b", "#66a182", "#edae49")


def demo(out: Path = Path("."), epochs: int = 20, seed: int = 0, progress: bool = True) -> Path:
    """Train the three methods, print what came of it and draw it; returns the picture's path, in directory `out`."""
    try:
        from matplotlib.figure import Figure  # noqa: F401  (before minutes are spent on training)
    except ImportError as error:
        raise ImportError("the demo needs matplotlib: pip install matplotlib") from error
    data = digits(seed).standardized()
    out.mkdir(parents=True, exist_ok=True)
    device = choose_device("auto")
    histories: dict[str, list[dict[str, Any]]] = {}
    reports: dict[str, Report] = {}
    seconds: dict[str, float] = {}
    for method in TITLES:
        settings = replace(Settings(), method=method, epochs=epochs, seed=seed)
        model, optimizer = build(data, settings)
        start = time.perf_counter()
        with _one_thread():
            options: dict[str, Any] = {
                "epochs": epochs,
                "batch_size": settings.batch_size,
                "seed": seed,
                "device": device,
            }
            histories[method] = fit(model, optimizer, data, **options, progress=progress)
            reports[method] = evaluate(model, data, "test")
        seconds[method] = time.perf_counter() - start

    print(f"Trained on {device}.")
    print("Test accuracy: each modality alone, then all together by the mean of the logits, by entropy fusion, and by")
    print("the joint prediction of the model that has one.")
    print(_accuracy_table(data, reports, seconds))
    print()
    print(f"One step of the shared head, 10 classes: {build_info()['backends'][0]} kernels against plain PyTorch.")
    print(_timing_table(time_head_step((Settings().width, 512, 2048))))
    print()
    path = out / PICTURE
    figure = _draw(data, histories, reports)
    checkpoint.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=150))
    print(f"Picture: {path}")
    return path


def time_head_step(widths: Sequence[int], classes: int = 10, repeats: int = 50) -> dict[int, dict[str, float]]:
    """Median seconds of one `head_step_` for each feature width s: {s: {"auto": ..., "reference": ...}}.

    The two backends take turns on equal inputs, so that whatever else the machine does hits both.
    """
    hyper = Hyperparameters(lr=0.01, momentum=0.9, weight_decay=1e-4)
    result = {}
    for s in widths:
        generator = torch.Generator().manual_seed(s)
        mean = torch.rand(s, generator=generator)
        weight, grad = torch.randn(2, classes, s, generator=generator).unbind()
        states = {
            backend: (weight.clone(), torch.zeros(classes, s), torch.eye(s), torch.zeros(()))
            for backend in ("auto", "reference")
        }
        seconds: dict[str, list[float]] = {backend: [] for backend in states}
        for repeat in range(repeats + 5):
            for backend, (W, buffer, P, step) in states.items():
                start = time.perf_counter()
                head_step_(W, grad, buffer, P, mean, step, hyper, backend=backend)
                if repeat >= 5:  # the first ones warm up
                    seconds[backend].append(time.perf_counter() - start)
        result[s] = {backend: statistics.median(values) for backend, values in seconds.items()}
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """The networks are tiny: more threads gain nothing, and wait for each other when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _accuracy_table(data: MultimodalData, reports: dict[str, Report], seconds: dict[str, float]) -> str:
    columns = [*data.modalities, "mean", "entropy", "joint"]
    lines = [f"{'':<18}" + "".join(f"{name:>10}" for name in columns) + f"{'training':>12}"]
    for method, report in reports.items():
        scores = {**report.modalities, **report.fusions}
        cells = [f"{scores[name].accuracy:.1%}" if name in scores else "-" for name in columns]
        line = f"{TITLES[method]:<18}" + "".join(f"{cell:>10}" for cell in cells)
        lines.append(f"{line}{seconds[method]:>10.1f} s")
    return "\n".join(lines)


def _timing_table(times: dict[int, dict[str, float]]) -> str:
    lines = [f"{'features':>10}{'kernels':>14}{'PyTorch':>14}{'ratio':>8}"]
    for s, row in times.items():
        ours, plain = row["auto"] * 1e6, row["reference"] * 1e6
        lines.append(f"{s:>10}{ours:>11.0f} µs{plain:>11.0f} µs{plain / ours:>7.1f}x")
    return "\n".join(lines)


def _draw(data: MultimodalData, histories: dict[str, list[dict[str, Any]]], reports: dict[str, Report]) -> Any:
    """Learning curves of concatenation and MLA side by side, and bars of the test accuracy of every method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(13.5, 4.6), layout="constrained")
    figure.suptitle(f"{len(data)} digits: {', '.join(data.modalities[:-1])} and {data.modalities[-1]}", fontsize=14)
    concat, mla, bars = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    for axes, method in ((concat, "concat"), (mla, "mla")):
        history = histories[method]
        epochs = [record["epoch"] for record in history]
        fused = history[0]["validation"]["fused"]
        colors = [MODALITY_COLORS[i % len(MODALITY_COLORS)] for i in range(len(data.modalities))]
        for modality, color in zip(data.modalities, colors, strict=True):
            curve = [record["validation"]["modalities"][modality]["accuracy"] for record in history]
            axes.plot(epochs, curve, color=color, linewidth=1.8, label=f"{modality} alone")
        curve = [record["validation"]["fusions"][fused]["accuracy"] for record in history]
        axes.plot(epochs, curve, color=FUSED_COLOR, linewidth=2.4, label="all together")
        axes.set(title=f"{TITLES[method]}: learning curves", xlabel="epoch", ylabel="validation accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)

    groups = [*data.modalities, "all together"]
    width = 0.8 / len(reports)
    for i, (method, report) in enumerate(reports.items()):
        values = [report.modalities[m].accuracy for m in data.modalities] + [report.accuracy]
        places = [group + (i - (len(reports) - 1) / 2) * width for group in range(len(groups))]
        drawn = bars.bar(places, values, width * 0.92, color=COLORS[method], label=TITLES[method])
        bars.bar_label(drawn, [f"{100 * value:.0f}" for value in values], fontsize=8, padding=1.5)
    bars.set(title="Test accuracy", ylabel="test accuracy", xticks=range(len(groups)), xticklabels=groups)
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(reports), frameon=False, fontsize=9)

    for axes in (concat, mla, bars):
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="y", color="#e3e6e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
