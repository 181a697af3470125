"""Protection against plasticity: what `alpha` and `forget` trade.

`python -m benchmarks.evidence.plasticity [--data FILE.npz]`.

P only ever shrinks, so what protects early modalities also hinders later steps. After training with each setting:

- plasticity: how much of the head's gradient passes, the mean of ‖G P‖ / ‖G‖ over the last epoch;
- interference: how far a step on one modality moves the head's answer to another modality's mean feature, the mean
  of ‖ΔW h̄‖ / (‖ΔW‖ ‖h̄‖) over the last epoch (0: not at all);
- the fused accuracy on the validation split, mean ± standard deviation over the seeds.

Writes a Markdown table and a picture to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD, Optimizer

import mla_ext
from mla_ext.multimodal.model import MultimodalModel
from mla_ext.multimodal.recipe import Settings, build

from .. import RESULTS
from ..machine import machine
from ..plots import canvas, save

CURVE: list[tuple[str, float | None, dict[str, float]]] = [("plain SGD", None, {})]
CURVE += [(f"forget {forget:g}", 0.1, {"forget": forget}) for forget in (0.3, 0.1, 0.03, 0.01, 1e-3, 0.0)]
CURVE += [(f"alpha {alpha:g}", alpha, {}) for alpha in (100.0, 10.0, 1.0, 0.01)]


def last_epoch(
    model: MultimodalModel, optimizer: Optimizer, data: mla_ext.MultimodalData, batch_size: int, seed: int
) -> tuple[float, float]:
    """Plasticity and interference of one more epoch."""
    head = model.head
    means: dict[str, torch.Tensor] = {}
    passed, moved = [], []
    for step in model.steps(data, batch_size, "given", torch.Generator().manual_seed(seed)):
        (modality,) = step.modalities
        optimizer.zero_grad(set_to_none=True)
        model.loss(data, step).backward()
        grad, before = head.weight.grad.clone(), head.weight.detach().clone()
        P = torch.eye(grad.shape[1]) if isinstance(optimizer, SGD) else optimizer.projection(head.weight)
        passed.append((grad @ P).norm() / grad.norm())
        optimizer.step()
        change = head.weight.detach() - before
        for other, mean in means.items():
            if other != modality:
                moved.append((change @ mean).norm() / (change.norm() * mean.norm()))
        with torch.no_grad():
            means[modality] = model.encoders[modality](model.inputs(data, modality, step.indices)).mean(0)
    return torch.stack(passed).mean().item(), torch.stack(moved).mean().item()


def run(
    data: mla_ext.MultimodalData,
    alpha: float | None,
    options: dict[str, Any],
    epochs: int,
    seed: int,
    width: int = Settings.width,
) -> tuple[float, ...]:
    """Plasticity, interference and accuracy. alpha None: plain SGD; options: further ones of ProjectedSGD."""
    settings = replace(Settings(), method="alternating" if alpha is None else "mla", seed=seed, epochs=epochs)
    settings = replace(settings, width=width, alpha=Settings.alpha if alpha is None else alpha, alpha_scale=None)
    model, optimizer = build(data, settings)
    for group in optimizer.param_groups:
        group.update(options)
    history = mla_ext.fit(model, optimizer, data, epochs=epochs, seed=seed, progress=False)
    accuracy = max(record["validation"]["fusions"]["entropy"]["accuracy"] for record in history)
    return *last_epoch(model, optimizer, data, settings.batch_size, seed), accuracy


def draw(rows: list[tuple[str, float, float, float, float]], path: Path, title: str) -> None:
    figure, ((axes,),) = canvas(1, 1, 7, 4.5)
    points = axes.scatter(
        [r[2] for r in rows], [r[1] for r in rows], c=[100 * r[3] for r in rows], cmap="viridis", s=70
    )
    for name, plasticity, interference, *_ in rows:
        axes.annotate(name, (interference, plasticity), textcoords="offset points", xytext=(7, 4), fontsize=8)
    axes.set(xlabel="interference with the other modalities", ylabel="plasticity", title=title)
    axes.set(xscale="log", yscale="log")
    axes.margins(0.2)
    figure.colorbar(points, label="fused validation accuracy, %")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npz; without it the built-in digits")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    data = (mla_ext.load_npz(arguments.data) if arguments.data else mla_ext.digits()).standardized()
    rows = []
    for name, alpha, options in CURVE:
        runs = [run(data, alpha, options, arguments.epochs, seed) for seed in range(arguments.seeds)]
        plasticity, interference, accuracy = (statistics.mean(column) for column in zip(*runs, strict=True))
        rows.append((name, plasticity, interference, accuracy, statistics.stdev(r[2] for r in runs)))
        print(*rows[-1], flush=True)
    source = arguments.data.stem if arguments.data else "digits"
    title = f"{source}, {arguments.epochs} epochs, {arguments.seeds} seeds"
    lines = [
        f"Protection against plasticity: {title}. {machine('cpu')}.",
        "",
        "| setting | plasticity | interference | fused validation accuracy, % |",
        "|---|---|---|---|",
    ]
    lines += [f"| {n} | {p:.3f} | {i:.3f} | {100 * a:.1f} ± {100 * sd:.1f} |" for n, p, i, a, sd in rows]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"plasticity_{source}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(rows, arguments.out / f"plasticity_{source}.png", title)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
