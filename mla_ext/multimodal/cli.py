"""The command line: `python -m mla_ext {demo,train,evaluate,predict,plot,info,doctor}`, also installed as `mla-ext`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from . import commands, config, parallel
from .data import SPLITS
from .model import FUSIONS
from .options import DEVICE, EPOCHS, GROUPS, PROGRESS, SEED, WORKERS, Option, add

__all__ = ["main"]

_FROM_THE_COMMAND_LINE = {"resume", "config"}  # options that a configuration file does not hold


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for bad input (one line on standard error), 130 if interrupted."""
    try:
        arguments = _parser().parse_args(_with_configuration(sys.argv[1:] if argv is None else list(argv)))
        with parallel.joined(getattr(arguments, "device", torch.device("cpu"))):
            arguments.run(arguments)
    except (ValueError, OverflowError, OSError, ImportError, MemoryError, RuntimeError) as error:
        print("mla-ext: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mla-ext: interrupted; a run with --out goes on with --resume", file=sys.stderr)
        return 130
    return 0


def _with_configuration(argv: list[str]) -> list[str]:
    """The arguments, after those of the file that --config of `train` names, so that they win."""
    if argv[:1] != ["train"]:
        return argv
    finder = _Parser(prog="mla-ext train", add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(argv[1:])[0].config
    if path is None:
        return argv
    known = {option.name for options in GROUPS.values() for option in options} - _FROM_THE_COMMAND_LINE
    return ["train", *config.read(path, known), *argv[1:]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


class _Compact(argparse.HelpFormatter):
    """Wide enough that most options take one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=44, width=120)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mla-ext",
        description="Multimodal learning by alternating unimodal adaptation (MLA, arXiv 2311.10707).",
    )
    commands_ = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], None], name: str, text: str, usage: str | None = None
    ) -> argparse.ArgumentParser:
        description = text[0].upper() + text[1:] + "."
        sub = commands_.add_parser(name, help=text, description=description, usage=usage, formatter_class=_Compact)
        sub.set_defaults(run=run)
        return sub

    demo = command(commands.demo, "demo", "train MLA and two baselines on built-in data, and draw what came of it")
    demo.add_argument("--out", type=Path, default=Path("."), help="directory for the picture (default: this one)")
    add(demo, EPOCHS, SEED, PROGRESS)

    text = "train a model and score it on the test split; values in brackets are defaults"
    train = command(commands.train, "train", text, "mla-ext train --data PATH [options]")
    train.set_defaults(encoders={})
    for title, options in GROUPS.items():
        add(train.add_argument_group(title), *options)

    for run, name, text in (
        (commands.evaluate_run, "evaluate", "score a trained model"),
        (commands.predict, "predict", "write what a trained model says about each sample"),
    ):
        sub = command(run, name, text)
        sub.add_argument("--data", required=True, metavar="PATH", help="what the run was trained on")
        sub.add_argument("--run", required=True, type=Path, metavar="DIR", dest="run_directory", help="its --out")
        splits = SPLITS if name == "evaluate" else (*SPLITS, "all")
        add(sub, Option("split", "whose samples", {"choices": splits, "default": "test"}), DEVICE, WORKERS)
        fusions = {"choices": ("auto", *FUSIONS), "default": "auto"}
        add(sub, Option("fusion", "what stands for the model; auto: what was best on the validation split", fusions))
        if name == "predict":
            sub.add_argument("--out", required=True, type=Path, metavar="FILE", help="ends in .csv or .npz")

    plot = command(commands.plot, "plot", "draw training runs, each into its directory, and several in one picture")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the --out of a training run")
    plot.add_argument("--out", type=Path, metavar="FILE", help="the picture of several runs (default: runs.png)")

    command(commands.info, "info", "print what this installation was built with and can use")
    command(commands.doctor, "doctor", "test what is installed, and print a report that an issue can hold")
    return parser
