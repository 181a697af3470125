"""The command line: `python -m mla_ext {demo,train,evaluate,info}`, also installed as `mla-ext`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..info import build_info
from . import checkpoint, parallel
from .data import MultimodalData, digits
from .encoders import ENCODERS, WIDTHS
from .evaluate import Report, evaluate
from .files import load
from .fit import CHECKPOINT, fit
from .precision import AMP, choose_device
from .recipe import METHODS, Settings, build

__all__ = ["REPORT", "main", "table"]

REPORT = "report.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for bad input (one line on standard error), 130 if interrupted."""
    try:
        arguments = _parser().parse_args(argv)
        with parallel.joined(getattr(arguments, "device", torch.device("cpu"))):
            arguments.run(arguments)
    except (ValueError, OverflowError, OSError, ImportError, MemoryError, RuntimeError) as error:
        print("mla-ext: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mla-ext: interrupted; a run with --out goes on with --resume", file=sys.stderr)
        return 130
    return 0


def _train(arguments: argparse.Namespace) -> None:
    if arguments.width is None:
        arguments.width = WIDTHS[arguments.encoder]
    settings = Settings(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings)})
    if arguments.resume and arguments.out is None:
        raise ValueError("--resume: expected --out too, the directory of the run to resume")
    if arguments.out is not None and not arguments.resume and (arguments.out / CHECKPOINT).exists():
        raise ValueError(
            f"--out: expected a directory without a run, got {arguments.out}; --resume goes on with its run"
        )
    data, described = _load(arguments.data, settings)
    if len(data.indices("test")) == 0:
        raise ValueError(f"--data: expected test samples, to score the model on, got none in {arguments.data}")
    model, optimizer = build(data, settings)
    history = fit(
        model,
        optimizer,
        data,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        device=arguments.device,
        amp=arguments.amp,
        workers=arguments.workers,
        out=arguments.out,
        resume=arguments.resume,
        config=_config(settings) | described,
        progress=arguments.progress,
    )
    if not parallel.is_main():
        return
    best = max(record["epoch"] for record in history if record["best"])
    report = evaluate(model, data, "test", workers=arguments.workers, amp=arguments.amp)
    chosen = f"epoch {best} of {len(history)} (best on the validation split)"
    print(f"{settings.method}, {chosen}, trained on {arguments.device}, test split:")
    print(table(report))
    if arguments.out is not None:
        content = {"method": settings.method, "best_epoch": best, "epochs": len(history), "test": report.as_dict()}
        checkpoint.write_text(arguments.out / REPORT, json.dumps(content, indent=2) + "\n")
        print(f"written to {arguments.out}")


def _evaluate(arguments: argparse.Namespace) -> None:
    path = arguments.run_directory / CHECKPOINT
    if not path.exists():
        raise ValueError(f"--run: expected the directory of a training run, got {arguments.run_directory}")
    content = checkpoint.load(path)
    saved, best = content["settings"], content["best"]
    missing = _config(Settings()).keys() - saved.keys()
    if missing:
        raise ValueError(f"--run: expected a run of `mla-ext train`, got one without {', '.join(sorted(missing))}")
    settings = Settings(**{name: saved[name] for name in _config(Settings())})
    data, described = _load(arguments.data, settings)
    for name, value in described.items():
        if saved[name] != value:
            raise ValueError(f"--data: expected {name} {saved[name]}, as the run's data has, got {value}")
    model, _ = build(data, settings)
    model.load_state_dict(best["model"])
    print(f"{settings.method}, epoch {best['epoch']} (best on the validation split), test split:")
    print(table(evaluate(model, data, "test", amp=saved.get("amp"))))


def _info(arguments: argparse.Namespace) -> None:
    facts = build_info()
    width = max(map(len, facts))
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        print(f"{name:<{width}}  {'none' if text in (None, '') else text}")


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import demo

    demo(arguments.out, epochs=arguments.epochs, seed=arguments.seed, progress=arguments.progress)


def table(report: Report) -> str:
    """The report as aligned text: accuracy and macro F1 of each modality and of each fusion."""
    rows = [*report.modalities.items()]
    rows += [(name if name == "joint" else f"{name} fusion", score) for name, score in report.fusions.items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':<{width}}  accuracy   macro F1   samples"]
    lines += [f"{n:<{width}}  {s.accuracy:>7.2%}    {s.macro_f1:>7.2%}   {s.samples:>7}" for n, s in rows]
    return "\n".join(lines)


def _load(source: str, settings: Settings) -> tuple[MultimodalData, dict[str, Any]]:
    """The data of a run, standardised with the statistics of its training split, and what tells it from other data."""
    data = digits() if source == "digits" else load(source)
    described = {"shapes": {m: list(data.shape(m)) for m in data.modalities}, "checksum": data.checksum()}
    if settings.missing:
        data = data.with_missing(settings.missing, settings.seed)
    return data.standardized(), described


def _config(settings: Settings) -> dict[str, Any]:
    """What a run must be resumed with: all but the number of epochs, which may grow."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name != "epochs"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _number(kind: type, holds: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def _device(text: str) -> torch.device:
    try:
        return choose_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


_count = _number(int, lambda v: v >= 1, "an integer of at least 1")
_not_negative_count = _number(int, lambda v: v >= 0, "an integer of at least 0")
_seed = _number(int, lambda v: 0 <= v < 2**31, "an integer from 0 to 2**31 - 1")
_not_negative = _number(float, lambda v: v >= 0, "a number of at least 0")
_positive = _number(float, lambda v: v > 0, "a number above 0")
_rate = _number(float, lambda v: 0 <= v < 1, "a number from 0 to 1, less than 1")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mla-ext",
        description="Multimodal learning by alternating unimodal adaptation (MLA, arXiv 2311.10707).",
    )
    commands = parser.add_subparsers(required=True, metavar="{demo,train,evaluate,info}")

    def command(run: Callable[[argparse.Namespace], None], name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    def setting(sub: argparse.ArgumentParser, name: str, text: str, **options: Any) -> None:
        """An option named after a field of Settings, with its default."""
        default = getattr(Settings(), name)
        flag = f"--{name.replace('_', '-')}"
        sub.add_argument(flag, default=default, help=f"{text} (default {default})", **options)

    demo = command(_demo, "demo", "train MLA and two baselines on built-in data, and draw what came of it")
    demo.add_argument("--out", type=Path, default=Path("."), help="directory for the picture (default: this one)")

    train = command(_train, "train", "train a model and score it on the test split")
    train.add_argument(
        "--data", required=True, metavar="PATH", help="a .npz file, a folder of .npy files, or `digits`: built-in data"
    )
    methods = "; ".join(f"{name}: {text}" for name, text in METHODS.items())
    setting(train, "method", methods, choices=tuple(METHODS))
    setting(train, "batch_size", "samples per step", type=_count)
    setting(train, "lr", "learning rate", type=_positive)
    setting(train, "momentum", "of SGD", type=_not_negative)
    setting(train, "weight_decay", "of SGD", type=_not_negative)
    setting(train, "alpha", "of the projection: smaller protects more", type=_positive)
    setting(train, "encoder", "of images and spectrograms; vectors always get the small one", choices=tuple(ENCODERS))
    widths = ", ".join(f"{width} with {name}" for name, width in WIDTHS.items())
    train.add_argument("--width", type=_count, help=f"features that each encoder gives the head (default {widths})")
    setting(train, "missing", "drop this share of the modalities, of training and test samples alike", type=_rate)
    device = "cpu, cuda, cuda:1 and so on; auto (default): a GPU if there is one that works"
    train.add_argument("--device", type=_device, default="auto", help=device)
    train.add_argument("--amp", choices=tuple(AMP), help="mixed precision (default: none)")
    workers = "processes that read the data ahead (default 0: none)"
    train.add_argument("--workers", type=_not_negative_count, default=0, help=workers)
    train.add_argument("--out", type=Path, help="directory for checkpoint, metrics and report")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")

    for sub in (demo, train):
        setting(sub, "epochs", "passes over the training split", type=_count)
        setting(sub, "seed", "of weights, shuffling and the like", type=_seed)
        sub.add_argument("--no-progress", action="store_false", dest="progress", help="show no progress bar")

    evaluation = command(_evaluate, "evaluate", "score a trained model on the test split")
    evaluation.add_argument("--data", required=True, metavar="PATH", help="what the run was trained on")
    evaluation.add_argument("--run", required=True, type=Path, metavar="DIR", dest="run_directory", help="its --out")

    command(_info, "info", "print what this installation was built with and can use")
    return parser
