"""The state of a training run: its history, its best epoch, and the checkpoint that holds all of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..head_state import DOES_NOT_FIT
from . import checkpoint, parallel
from .evaluate import Report
from .model import MultimodalModel, SharedHeadModel

__all__ = ["CHECKPOINT", "METRICS", "Run"]

CHECKPOINT = "last.pt"
METRICS = "metrics.jsonl"


class Run:
    """The state of one training run: what a checkpoint holds."""

    def __init__(
        self,
        model: MultimodalModel,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        scaler: torch.amp.GradScaler,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.scaler = model, optimizer, scheduler, scaler
        self.settings = settings
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"accuracy": -1.0, "loss": math.inf}

    def record(self, epoch: int, training_loss: dict[str, float], report: Report, plasticity: dict[str, float]) -> None:
        """Note an epoch, keep its weights if they are the best so far, and step the scheduler."""
        better = (report.accuracy, -report.loss) > (self.best["accuracy"], -self.best["loss"])
        if better:
            weights = copy.deepcopy(self.model.state_dict())
            self.best = {"epoch": epoch, "accuracy": report.accuracy, "loss": report.loss, "model": weights}
        self.history.append(
            {
                "epoch": epoch,
                "training_loss": training_loss,
                "lr": [float(group["lr"]) for group in self.optimizer.param_groups],
                "validation": report.as_dict(),
                "best": better,
            }
        )
        self.history[-1] |= plasticity
        if self.scheduler is not None:
            self.scheduler.step()

    def open(self, directory: Path) -> None:
        """Make `directory` agree with the history: a new run removes the old one, a resumed one repairs its metrics."""
        if not parallel.is_main():
            return
        directory.mkdir(parents=True, exist_ok=True)
        if not self.history:
            (directory / CHECKPOINT).unlink(missing_ok=True)
        self._write_metrics(directory)

    def save(self, directory: Path) -> None:
        if not parallel.is_main():
            return
        checkpoint.save(directory / CHECKPOINT, self.content())
        self._write_metrics(directory)  # after the checkpoint: if killed in between, resuming repairs them

    def content(self) -> dict[str, Any]:
        """What the checkpoint holds."""
        return {
            "format": checkpoint.FORMAT,
            "settings": self.settings,
            "epoch": len(self.history),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),  # empty unless it scales
            "history": self.history,
            "best": self.best,
        }

    def _write_metrics(self, directory: Path) -> None:
        checkpoint.write_text(directory / METRICS, "".join(json.dumps(record) + "\n" for record in self.history))

    def restore(self, path: Path) -> None:
        """Take over a checkpoint. ValueError, before anything is changed, if it is of another run."""
        content = checkpoint.load(path)
        for name, value in {**self.settings, "scheduler": self.scheduler is not None}.items():
            saved = content["scheduler"] is not None if name == "scheduler" else content["settings"].get(name)
            if saved != value:
                raise ValueError(f"resume: expected a run with {name} {value!r}, got {saved!r} in {path}{DOES_NOT_FIT}")
        here = self.content()
        if isinstance(self.model, SharedHeadModel):
            self.model.complete(content["model"])
            self.model.complete(content["best"]["model"])
        _check_same("the model's state", _shapes(here["model"]), _shapes(content["model"]), path)
        _check_same("the best epoch's weights", _shapes(here["model"]), _shapes(content["best"]["model"]), path)
        if self.scheduler is not None:
            _check_same("the scheduler's state", set(here["scheduler"]), set(content["scheduler"]), path)
        ours, theirs = ([g["params"] for g in c["optimizer"]["param_groups"]] for c in (here, content))
        _check_same("the optimizer's parameter groups", ours, theirs, path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.model.load_state_dict(content["model"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(content["scheduler"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        self.history, self.best = content["history"], content["best"]


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()}


def _check_same(what: str, expected: Any, saved: Any, path: Path) -> None:
    if saved != expected:
        raise ValueError(f"resume: expected a run in which {what} is {expected}, got {saved} in {path}{DOES_NOT_FIT}")
