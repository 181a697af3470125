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
from torch import nn
from torch.optim import SGD, Optimizer

from ..info import build_info
from ..optimizer import ProjectedSGD
from . import checkpoint
from .data import MultimodalData, digits
from .evaluate import Report, evaluate
from .fit import fit
from .precision import choose_device
from .recipe import Settings, build

__all__ = ["PICTURE", "demo", "time_step"]

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
    print("optimizer.step() in a training loop, encoder and a head of 10 classes: SGD, which does not project, and the")
    print(f"projection in plain PyTorch and by the {build_info()['backends'][0]} kernels.")
    print(_timing_table(time_step((Settings().width, 512, 1024))))
    print()
    path = out / PICTURE
    figure = _draw(data, histories, reports)
    checkpoint.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=150))
    print(f"Picture: {path}")
    return path


def time_step(widths: Sequence[int], classes: int = 10, repeats: int = 60) -> dict[int, dict[str, float]]:
    """Median seconds of one optimizer.step() in a training loop, for an encoder (s, s) and a head of s features.

    {s: {"SGD": ..., "reference": ..., "mla_ext": ...}}: torch.optim.SGD, which does not project, the projection in
    plain PyTorch, and the best backend here. They take turns, so that whatever else the machine does hits all.
    """
    result = {}
    for s in widths:
        generator = torch.Generator().manual_seed(s)
        inputs, labels = torch.randn(64, s, generator=generator), torch.arange(64) % classes
        trained: dict[str, tuple[nn.Sequential, Optimizer]] = {}
        for name in ("SGD", "reference", "mla_ext"):
            model = nn.Sequential(nn.Linear(s, s), nn.ReLU(), head := nn.Linear(s, classes))
            optimizer: Optimizer
            if name == "SGD":
                optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
            else:
                backend = "auto" if name == "mla_ext" else name
                optimizer = ProjectedSGD(model.parameters(), lr=0.01, momentum=0.9, backend=backend)
                optimizer.attach(head)
            trained[name] = model, optimizer
        seconds: dict[str, list[float]] = {name: [] for name in trained}
        for repeat in range(repeats + 5):
            for name, (model, optimizer) in trained.items():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                start = time.perf_counter()
                optimizer.step()
                if repeat >= 5:  # the first ones warm up
                    seconds[name].append(time.perf_counter() - start)
        result[s] = {name: statistics.median(values) for name, values in seconds.items()}
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
    lines = [f"{'features':>10}{'SGD':>14}{'PyTorch':>14}{'mla_ext':>14}"]
    for s, row in times.items():
        lines.append(f"{s:>10}" + "".join(f"{1e6 * seconds:>11.0f} µs" for seconds in row.values()))
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
