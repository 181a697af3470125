"""What the commands of `mla-ext` do with their arguments."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..doctor import diagnose
from ..info import build_info
from . import checkpoint, config, parallel, plots
from . import predict as predictions
from .calibration import calibrate
from .data import MultimodalData, digits
from .encoders import default_width
from .evaluate import Report, evaluate
from .files import load
from .fit import CHECKPOINT, METRICS, fit
from .library import is_library, untrained
from .metrics import Reliability
from .model import MultimodalModel, SharedHeadModel
from .options import GROUPS, settings_of
from .recipe import Settings, build, build_scheduler, standardized
from .reliability import FUSED, reliability_of

__all__ = ["REPORT", "demo", "doctor", "evaluate_run", "info", "plot", "predict", "table", "train"]

REPORT, PREDICTIONS = "report.json", "predictions.csv"
TRAINING, CONFUSION, RELIABILITY = "training.png", "confusion.png", "reliability.png"


def train(arguments: argparse.Namespace) -> None:
    out = arguments.out
    if arguments.data is None:
        raise ValueError("--data is required: an .npz file, a folder of .npy files, or `digits` (see mla-ext train -h)")
    if arguments.width is None:
        arguments.width = default_width([arguments.encoder, *arguments.encoders.values()])
    settings = settings_of(arguments)
    if out is None and (arguments.resume or arguments.tensorboard):
        flag, what = ("resume", "of the run to resume") if arguments.resume else ("tensorboard", "for the events")
        raise ValueError(f"--{flag}: expected --out too, the directory {what}")
    if out is not None and not arguments.resume and (out / CHECKPOINT).exists():
        raise ValueError(f"--out: expected a directory without a run, got {out}; --resume goes on with its run")
    data, described = _load(arguments.data, settings)
    if len(data.indices("test")) == 0:
        raise ValueError(f"--data: expected test samples, to score the model on, got none in {arguments.data}")
    model, optimizer = build(data, settings)
    resumed = out is not None and arguments.resume and (out / CHECKPOINT).exists()
    fixed = _known(settings, out / CHECKPOINT) if resumed else settings.fixed()
    notes = {"processes": os.environ.get("WORLD_SIZE", "1"), "checksum of the data": described["checksum"]}
    written = _written(arguments, notes)
    if out is not None and not resumed and parallel.is_main():
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(out / config.CONFIG, written)
    with _events(out / "tensorboard" if arguments.tensorboard else None) as on_epoch:
        history = fit(
            model,
            optimizer,
            data,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            order=settings.order,
            seed=settings.seed,
            device=arguments.device,
            amp=settings.amp,
            workers=arguments.workers,
            scheduler=build_scheduler(optimizer, settings),
            clip_grad_norm=settings.clip_grad_norm,
            loss=nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing) if settings.label_smoothing else None,
            compile=arguments.compile,
            reset_projection=settings.reset_projection,
            out=out,
            resume=arguments.resume,
            config=fixed | described,
            progress=arguments.progress,
            on_epoch=on_epoch,
        )
    if not parallel.is_main():
        return
    best = max(record["epoch"] for record in history if record["best"])
    if isinstance(model, SharedHeadModel):
        calibrate(model, data, workers=arguments.workers, amp=settings.amp)
        if out is not None:
            _keep(model, out / CHECKPOINT)
    report = evaluate(model, data, "test", workers=arguments.workers, amp=settings.amp)
    reliable = reliability_of(model, data, "test", workers=arguments.workers, amp=settings.amp)
    chosen = f"epoch {best} of {len(history)} (best on the validation split)"
    print(f"{settings.method}, fused: {report.fused}, {chosen}, trained on {arguments.device}, test split:")
    print(table(report, reliable))
    if out is not None:
        checkpoint.write_text(out / config.CONFIG, written)
        content = {"method": settings.method, "best_epoch": best, "epochs": len(history), "test": report.as_dict()}
        if isinstance(model, SharedHeadModel):
            content["temperatures"] = dict(zip(model.modalities, model.temperatures.tolist(), strict=True))
        content["reliability"] = {
            name: {when: dataclasses.asdict(curve) for when, curve in curves.items()}
            for name, curves in reliable.items()
        }
        checkpoint.write_text(out / REPORT, json.dumps(content, indent=2) + "\n")
        found = predictions.predict_split(model, data, "test", workers=arguments.workers, amp=settings.amp)
        predictions.write(found, out / PREDICTIONS)
        with contextlib.suppress(ImportError):  # of matplotlib: `mla-ext plot` says so
            _draw(out)
        print(f"written to {out}")


def evaluate_run(arguments: argparse.Namespace) -> None:
    settings, model, data, epoch = _trained(arguments)
    report = evaluate(
        model, data, arguments.split, fusion=arguments.fusion, workers=arguments.workers, amp=settings.amp
    )
    reliable = reliability_of(model, data, arguments.split, workers=arguments.workers, amp=settings.amp)
    chosen = f"epoch {epoch} (best on the validation split)"
    print(f"{settings.method}, fused: {report.fused}, {chosen}, {arguments.split} split:")
    print(table(report, reliable))


def predict(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix not in (".csv", ".npz"):
        raise ValueError(f"--out: expected a file that ends in .csv or .npz, got {arguments.out}")
    settings, model, data, _ = _trained(arguments)
    found = predictions.predict_split(
        model, data, arguments.split, fusion=arguments.fusion, workers=arguments.workers, amp=settings.amp
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    predictions.write(found, arguments.out)
    right = (found.fused_class == found.label).double().mean().item()
    print(f"{arguments.out}: {len(found.sample)} samples, fused accuracy {right:.2%}")


def plot(arguments: argparse.Namespace) -> None:
    histories = {}
    for run in arguments.runs:
        histories[str(run)] = _history(run)
    if arguments.out is not None and len(histories) < 2:
        raise ValueError(f"--out: expected two runs or more, to compare in one picture, got {len(histories)}")
    for run in arguments.runs:
        for path in _draw(run):
            print(f"written: {path}")
    if len(histories) > 1:
        path = Path("runs.png") if arguments.out is None else arguments.out
        plots.save(plots.draw_runs(histories), path)
        print(f"written: {path}")


def info(arguments: argparse.Namespace) -> None:
    facts = build_info()
    width = max(map(len, facts))
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        print(f"{name:<{width}}  {'none' if text in (None, '') else text}")


def doctor(arguments: argparse.Namespace) -> None:
    report, healthy = diagnose()
    print(report)
    if not healthy:
        raise SystemExit(1)


def demo(arguments: argparse.Namespace) -> None:
    from .demo import demo

    demo(arguments.out, epochs=arguments.epochs, seed=arguments.seed, progress=arguments.progress)


def table(report: Report, reliable: Mapping[str, Mapping[str, Reliability]]) -> str:
    """The report as aligned text: accuracy and macro F1 of each modality and of each fusion, and what is known of ECE.

    Of a modality the ECE is that before the temperatures, and after them.
    """
    errors = {name: [curve.ece for curve in curves.values()] for name, curves in reliable.items()}
    fused = errors.pop(FUSED)
    errors |= {"mean fusion": fused[:1], "calibrated fusion": fused[1:]} if len(fused) > 1 else {"joint": fused}
    rows = [*report.modalities.items()]
    rows += [(name if name == "joint" else f"{name} fusion", score) for name, score in report.fusions.items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':<{width}}  accuracy   macro F1   samples   ECE"]
    for name, s in rows:
        ece = ", ".join(f"{error:.2%}" for error in errors.get(name, []))
        line = f"{name:<{width}}  {s.accuracy:>7.2%}    {s.macro_f1:>7.2%}   {s.samples:>7}   {ece}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _load(source: str, settings: Settings) -> tuple[MultimodalData, dict[str, Any]]:
    """The data of a run, as its encoders want them, and what tells it from other data."""
    data = digits() if source == "digits" else load(source)
    described = {"shapes": {m: list(data.shape(m)) for m in data.modalities}, "checksum": data.checksum()}
    if settings.missing:
        data = data.with_missing(settings.missing, settings.seed)
    return standardized(data, settings), described


def _known(settings: Settings, path: Path) -> dict[str, Any]:
    """The settings that the run at `path` must have; not those at their default that its version did not know."""
    saved, default = checkpoint.load(path)["settings"], Settings()
    fixed = settings.fixed()
    return {name: value for name, value in fixed.items() if name in saved or value != getattr(default, name)}


def _written(arguments: argparse.Namespace, notes: dict[str, Any]) -> str:
    """The options of a run as a configuration file."""
    values = vars(arguments) | {"device": str(arguments.device)}
    if arguments.data != "digits":
        values["data"] = str(Path(arguments.data).resolve())
    values["encoder"] = [arguments.encoder, *(f"{m}={name}" for m, name in arguments.encoders.items())]
    values |= {name: "none" for name in ("alpha_scale", "rank") if values[name] is None}
    tables = {group: {o.name: values[o.name] for o in options} for group, options in GROUPS.items()}
    del tables["results"]
    return config.text(tables, notes)


def _trained(arguments: argparse.Namespace) -> tuple[Settings, MultimodalModel, MultimodalData, int]:
    """Of a run: its settings, the model of its best epoch on the device, its data, and which epoch that is."""
    path = arguments.run_directory / CHECKPOINT
    if not path.exists():
        raise ValueError(f"--run: expected the directory of a training run, got {arguments.run_directory}")
    content = checkpoint.load(path)
    saved, best = content["settings"], content["best"]
    try:
        settings = Settings.of_run(saved)
    except ValueError as error:
        raise ValueError(f"--run: {error}") from error
    data, described = _load(arguments.data, settings)
    for name, value in described.items():
        if saved[name] != value:
            raise ValueError(f"--data: expected {name} {saved[name]}, as the run's data has, got {value}")
    model, _ = build(data, _without_weights(settings))
    model.load_state_dict(best["model"])
    return settings, model.to(arguments.device), data, best["epoch"]


def _keep(model: SharedHeadModel, path: Path) -> None:
    """Put the temperatures and the choice of a fusion beside the best epoch's weights in the checkpoint."""
    content = checkpoint.load(path)
    content["best"]["model"] |= {name: value.cpu() for name, value in model.named_buffers(recurse=False)}
    checkpoint.save(path, content)


def _without_weights(settings: Settings) -> Settings:
    """The same encoders, which need no weights of a library, as the checkpoint has them all."""

    def plain(name: str) -> str:
        return untrained(name) if is_library(name) else name

    encoders = {modality: plain(name) for modality, name in settings.encoders.items()}
    return dataclasses.replace(settings, encoder=plain(settings.encoder), encoders=encoders)


def _history(run: Path) -> list[dict[str, Any]]:
    path = run / METRICS
    if not path.exists():
        raise ValueError(f"RUN: expected the directory of a training run, got {run}")
    history = [json.loads(line) for line in path.read_text().splitlines()]
    if not history:
        raise ValueError(f"RUN: expected a run with an epoch that is done, got none in {run}")
    return history


def _draw(run: Path) -> list[Path]:
    """Draw a run from its files, into its directory."""
    drawn = [(TRAINING, plots.draw_training(_history(run), run.name))]
    if (run / PREDICTIONS).exists():
        labels, found = predictions.read_classes(run / PREDICTIONS)
        drawn.append((CONFUSION, plots.draw_confusion(labels, found, f"{run.name}: test split, fused")))
    if (run / REPORT).exists():
        curves = json.loads((run / REPORT).read_text()).get("reliability")
        if curves:
            drawn.append((RELIABILITY, plots.draw_reliability(curves, f"{run.name}: test split")))
    for name, figure in drawn:
        plots.save(figure, run / name)
    return [run / name for name, _ in drawn]


@contextlib.contextmanager
def _events(directory: Path | None) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """What writes each record of the history as events for TensorBoard, or None. ImportError where it is missing."""
    if directory is None or not parallel.is_main():
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs TensorBoard: pip install tensorboard") from error

    with SummaryWriter(str(directory)) as writer:

        def write(record: dict[str, Any]) -> None:
            epoch, validation = record["epoch"], record["validation"]
            scalars = {f"loss/training {name}": value for name, value in record["training_loss"].items()}
            scalars |= {"loss/validation": validation["loss"], "lr": record["lr"][0]}
            for name, score in (validation["modalities"] | validation["fusions"]).items():
                scalars[f"accuracy/{name}"] = score["accuracy"]
            scalars |= {name: record[name] for name in ("plasticity", "gradient_passed") if name in record}
            for name, value in scalars.items():
                writer.add_scalar(name, value, epoch)
            writer.flush()

        yield write
