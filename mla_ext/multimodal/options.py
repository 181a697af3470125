"""The options of `mla-ext train`, in groups: those of its --help, and the tables of a configuration file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .encoders import ENCODERS
from .model import ORDERS
from .precision import AMP, choose_device
from .recipe import METHODS, SCHEDULES, Settings

__all__ = ["DATA", "DEVICE", "EPOCHS", "GROUPS", "PROGRESS", "SEED", "WORKERS", "Option", "add", "settings_of"]


class Option(NamedTuple):
    """A flag, its help, and what argparse is told besides. One named like a field of Settings has its default."""

    name: str
    text: str
    keywords: dict[str, Any]

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def default(self) -> Any:
        own = {f.name: getattr(Settings(), f.name) for f in fields(Settings)}
        return self.keywords.get("default", own.get(self.name))


def add(parser: argparse._ActionsContainer, *options: Option) -> None:
    """To a parser, or a group of one."""
    for option in options:
        keywords = {"default": option.default} | option.keywords
        is_flag = "action" in keywords
        shown = "" if is_flag or keywords["default"] is None else f" ({keywords['default']})"
        if not is_flag and "choices" not in keywords:
            keywords.setdefault("metavar", "X")
        parser.add_argument(option.flag, help=option.text + shown, **keywords)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that were asked for."""
    return Settings(**{f.name: getattr(arguments, f.name) for f in fields(Settings)})


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


_count = _number(int, lambda v: v >= 1, "an integer of at least 1")
_not_negative_count = _number(int, lambda v: v >= 0, "an integer of at least 0")
_seed = _number(int, lambda v: 0 <= v < 2**31, "an integer from 0 to 2**31 - 1")
_real = _number(float, lambda v: True, "a number")
_not_negative = _number(float, lambda v: v >= 0, "a number of at least 0")
_positive = _number(float, lambda v: v > 0, "a number above 0")
_rate = _number(float, lambda v: 0 <= v < 1, "a number from 0 to 1, less than 1")
_share = _number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")


def _rank(text: str) -> int | str | None:
    if text in ("auto", "none"):
        return "auto" if text == "auto" else None
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected auto, none or an integer of at least 2, got {text!r}")
    return int(text)


def _alpha_scale(text: str) -> str | None:
    if text not in ("features", "none"):
        raise argparse.ArgumentTypeError(f"expected features or none, got {text!r}")
    return None if text == "none" else text


def _device(text: str) -> torch.device:
    try:
        return choose_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class _Encoder(argparse.Action):
    """NAME is the encoder of all modalities, MODALITY=NAME that of one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        text = str(values)
        modality, equals, name = text.partition("=")
        if not equals or ":" in modality:  # a library's name may hold a path
            modality, name = "", text
        if name not in ENCODERS and ":" not in name:
            choices = ", ".join(map(repr, ENCODERS))
            raise argparse.ArgumentError(
                self, f"invalid choice: {name!r} (choose from {choices}, torchvision:MODEL, transformers:MODEL)"
            )
        if modality:
            namespace.encoders = {**namespace.encoders, modality: name}
        else:
            namespace.encoder = name


def _switch(text_name: str, text: str, default: bool = False) -> Option:
    return Option(text_name, text, {"action": argparse.BooleanOptionalAction, "default": default})


DATA = Option("data", "an .npz file, a folder of .npy files, or `digits`: built-in data", {"metavar": "PATH"})
EPOCHS = Option("epochs", "passes over the training split", {"type": _count})
SEED = Option("seed", "of weights, shuffling and the like", {"type": _seed})
DEVICE = Option(
    "device",
    "cpu, cuda, cuda:1 and so on; auto: a GPU if there is one that works",
    {"type": _device, "default": "auto"},
)
WORKERS = Option("workers", "processes that read the data ahead", {"type": _not_negative_count, "default": 0})
PROGRESS = _switch("progress", "a progress bar on standard error", True)

GROUPS: dict[str, tuple[Option, ...]] = {
    "data": (
        DATA,
        Option("missing", "drop this share of the modalities, of training and test samples alike", {"type": _rate}),
    ),
    "model": (
        Option("method", "docs/training.md says what they are", {"choices": tuple(METHODS)}),
        Option(
            "encoder",
            "small, resnet18, torchvision:MODEL[@WEIGHTS], transformers:MODEL[@WEIGHTS] (small)",
            {"action": _Encoder, "metavar": "[MODALITY=]NAME"},
        ),
        Option(
            "width",
            "features that encoders give the head (default: the encoders' own)",
            {"type": _count, "default": None},
        ),
    ),
    "optimizer": (
        Option("lr", "learning rate", {"type": _positive}),
        Option("momentum", "of SGD", {"type": _not_negative}),
        Option("dampening", "of the momentum", {"type": _real}),
        Option("weight_decay", "of SGD", {"type": _not_negative}),
        _switch("nesterov", "Nesterov's momentum"),
        Option("alpha", "of the projection: smaller protects more", {"type": _positive}),
        Option("alpha_scale", "features: times the mean of their square; none: as it is", {"type": _alpha_scale}),
        Option("absorb", "a step's features after or before it", {"choices": ("after", "before")}),
        Option("forget", "rate at which the projection forgets", {"type": _share}),
        _switch("normalize", "divide the projection by its norm"),
        Option("rank", "rows of the projection's rank form; none: a dense matrix", {"type": _rank}),
        _switch("reset_projection", "the identity again at the start of each epoch"),
    ),
    "training": (
        EPOCHS,
        Option("batch_size", "samples per step", {"type": _count}),
        SEED,
        Option("order", "of the modalities within an epoch", {"choices": ORDERS}),
        Option("schedule", "of the learning rate: cosine to 0, or in steps", {"choices": SCHEDULES}),
        Option("step_size", "epochs between the steps of --schedule step", {"type": _count}),
        Option("gamma", "factor of each of them", {"type": _positive}),
        Option("label_smoothing", "of the cross entropy", {"type": _rate}),
        Option("clip_grad_norm", "largest norm of a step's gradients (default: any)", {"type": _positive}),
        Option("amp", "mixed precision (default: none)", {"choices": tuple(AMP)}),
    ),
    "run": (
        DEVICE,
        WORKERS,
        _switch("compile", "run the encoders through torch.compile"),
        PROGRESS,
        _switch("tensorboard", "write events to OUT/tensorboard"),
    ),
    "results": (
        Option("out", "directory for settings, checkpoint, metrics, report, predictions, pictures", {"type": Path}),
        Option("resume", "go on with the run in --out, if there is one", {"action": "store_true", "default": False}),
        Option("config", "a .toml file of options, as --out gets one; those given here win", {"type": Path}),
    ),
}
