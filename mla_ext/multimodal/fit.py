"""`fit` trains a model, keeping the epoch that is best on the validation split; `evaluate` scores it on a split."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from ..optimizer import ProjectedSGD
from . import checkpoint, parallel
from .data import SPLITS, MultimodalData
from .evaluate import Report, check_model_and_data, check_positive, evaluate
from .model import ORDERS, MultimodalModel, Step, mode_of

__all__ = ["CHECKPOINT", "METRICS", "NonFiniteLossError", "fit"]

CHECKPOINT = "last.pt"
METRICS = "metrics.jsonl"
_ADVICE = "lower the learning rate, or scale the inputs (MultimodalData.standardized)"


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN."""


def fit(
    model: MultimodalModel,
    optimizer: Optimizer,
    data: MultimodalData,
    *,
    epochs: int,
    batch_size: int = 64,
    order: str = "given",
    seed: int = 0,
    scheduler: LRScheduler | None = None,
    reset_projection: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    config: dict[str, Any] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train on the training split; leave the model with the weights of the epoch best on the validation split.

    The model says what a step is: a SharedHeadModel alternates between modalities (eq. 2), a ConcatModel trains all
    at once. Best is the highest validation accuracy of the model's fusion (see `Report.fused`), then the lowest
    validation loss, then the earliest epoch. The test split is never read.

    Where torch.distributed is initialised every rank takes its share of each batch, gradients are summed, and the
    first rank writes the files: the result is that of one process, but for rounding.

    Args:
        epochs: passes over the training split.
        order: of the modalities within an epoch: "given", "reversed" or "random" (drawn anew each epoch).
        seed: of shuffling and of the model's own randomness (dropout). Each epoch draws from a generator seeded by
            `seed` and the epoch; the global generators are left as they were.
        scheduler: stepped after every epoch.
        reset_projection: start every epoch with the projections of a ProjectedSGD at the identity.
        out: a directory for the checkpoint `last.pt`, written after every epoch and never left half-written, and
            for `metrics.jsonl`, one record per line. A run that is in it already is removed, unless resumed.
        resume: go on from the checkpoint in `out`, to the same bits as a run that was never interrupted (where the
            device's arithmetic is deterministic); start anew if there is none. The hyperparameters of optimizer and
            scheduler are those of the checkpoint.
        config: plain values that say more about the run, such as how the data was made. They are kept in the checkpoint
            under "settings", and a run that is resumed must agree in them.
        progress: show a progress bar on standard error.

    Returns the history, one record per epoch: {"epoch", "training_loss": {modality: mean}, "lr": of each parameter
    group, "validation": the report as a dict, "best": whether it was the best so far}.

    Raises ValueError or TypeError for bad arguments and for a checkpoint of another run, before anything is changed;
    NonFiniteLossError, a RuntimeError, at the end of an epoch whose training or validation loss was not finite: the
    checkpoint of the epoch before is kept.
    """
    check_model_and_data(model, data)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    check_positive("epochs", epochs)
    check_positive("batch_size", batch_size)
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, got {seed!r}")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed: expected 0 <= seed < 2**31, got {seed}")
    if scheduler is not None and (not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau)):
        raise TypeError(f"scheduler: expected an LRScheduler that needs no metric, got {type(scheduler).__name__}")
    if reset_projection and not isinstance(optimizer, ProjectedSGD):
        raise TypeError(f"reset_projection: expected a ProjectedSGD as optimizer, got {type(optimizer).__name__}")
    if resume and out is None:
        raise ValueError("resume: expected `out` too, the directory of the run to resume, got None")
    for modality in model.modalities:
        if len(data.indices("train", modality)) == 0:
            raise ValueError(f"data: expected a training sample that has modality {modality!r}, got none")
    if len(data.indices("validation")) == 0:
        raise ValueError("data: expected validation samples, to choose the epoch by, got none")

    settings = _settings(model, optimizer, data)
    settings |= {"batch_size": batch_size, "order": order, "seed": seed, "reset_projection": reset_projection}
    settings |= config or {}
    run = _Run(model, optimizer, scheduler, settings)
    directory = None if out is None else Path(out)

    def epoch_steps(epoch: int) -> list[Step]:
        return model.steps(data, batch_size, order, torch.Generator().manual_seed(_epoch_seed(seed, epoch)))

    _check_single_samples(model, data, (step for epoch in range(1, epochs + 1) for step in epoch_steps(epoch)))
    if directory is not None:
        checkpoint.plain(run.content())  # what could not be read back is refused now
        if resume and (directory / CHECKPOINT).exists():
            run.restore(directory / CHECKPOINT)
        parallel.wait_for_all()  # nobody writes while others read
        run.open(directory)
    parallel.broadcast(model)

    cuda = [p.device for p in model.parameters() if p.is_cuda][:1]
    first = len(run.history) + 1
    per_epoch = len(epoch_steps(first))
    total, done = per_epoch * max(epochs, first - 1), per_epoch * (first - 1)
    with tqdm(total=total, initial=done, unit="step", disable=not (progress and parallel.is_main())) as bar:
        for epoch in range(first, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}")
            with torch.random.fork_rng(devices=cuda):
                torch.manual_seed(_epoch_seed(seed, epoch))
                if reset_projection and isinstance(optimizer, ProjectedSGD):  # as checked above
                    optimizer.reset_projection()
                with mode_of(model, training=True):
                    training_loss = _train_epoch(model, optimizer, data, epoch_steps(epoch), epoch, bar)
                report = evaluate(model, data, "validation")
            if not math.isfinite(report.loss):
                raise NonFiniteLossError(f"validation loss is {report.loss} after epoch {epoch}: {_ADVICE}")
            run.record(epoch, training_loss, report)
            if directory is not None:
                run.save(directory)
            bar.set_postfix({"validation": f"{report.accuracy:.2%}", "best": f"{run.best['accuracy']:.2%}"})
    model.load_state_dict(run.best["model"])
    return run.history


def _train_epoch(
    model: MultimodalModel, optimizer: Optimizer, data: MultimodalData, steps: list[Step], epoch: int, bar: tqdm
) -> dict[str, float]:
    """Take the steps; return the mean loss per sample of each (group of) modalities."""
    losses = []
    for step in steps:
        optimizer.zero_grad(set_to_none=True)  # None, not zero: what this step does not use must not move
        loss = _loss(model, data, step)
        loss.backward()
        parallel.sum_gradients(model.parameters())
        optimizer.step()
        losses.append(loss.detach())
        bar.update()

    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    means = parallel.sum_over_ranks(torch.stack(losses)).tolist()
    for number, (step, loss) in enumerate(zip(steps, means, strict=True), start=1):
        name = "+".join(step.modalities)
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"training loss of {name} is {loss} at epoch {epoch}, step {number} of {len(steps)}: {_ADVICE}"
            )
        sums[name] = sums.get(name, 0.0) + loss * len(step.indices)
        counts[name] = counts.get(name, 0) + len(step.indices)
    return {name: sums[name] / counts[name] for name in sums}


def _loss(model: MultimodalModel, data: MultimodalData, step: Step) -> Tensor:
    """This rank's part of the step's loss; the parts of all ranks add up to the mean over the batch."""
    indices = parallel.share(step.indices)
    if len(indices) == 0:
        # The same parameters need a gradient here as elsewhere; in evaluation mode nothing is recorded.
        with mode_of(model, training=False):
            return 0.0 * model.loss(data, step._replace(indices=step.indices[:1]))
    return model.loss(data, step._replace(indices=indices)) * (len(indices) / len(step.indices))


class _Run:
    """The state of one training run: what a checkpoint holds."""

    def __init__(
        self, model: MultimodalModel, optimizer: Optimizer, scheduler: LRScheduler | None, settings: dict[str, Any]
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.settings = model, optimizer, scheduler, settings
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"accuracy": -1.0, "loss": math.inf}

    def record(self, epoch: int, training_loss: dict[str, float], report: Report) -> None:
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
        if self.scheduler is not None:
            self.scheduler.step()

    def open(self, directory: Path) -> None:
        """Make `directory` agree with the history: a new run removes the old one, a resumed one mends its metrics."""
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
        self._write_metrics(directory)  # after the checkpoint: if killed in between, resuming mends them

    def content(self) -> dict[str, Any]:
        """What the checkpoint holds."""
        return {
            "format": checkpoint.FORMAT,
            "settings": self.settings,
            "epoch": len(self.history),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
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
                raise ValueError(f"resume: expected a run with {name} {value!r}, got {saved!r} in {path}")
        here = self.content()
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
        self.history, self.best = content["history"], content["best"]


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()}


def _check_same(what: str, expected: Any, saved: Any, path: Path) -> None:
    if saved != expected:
        raise ValueError(f"resume: expected a run in which {what} is {expected}, got {saved} in {path}")


def _check_single_samples(model: MultimodalModel, data: MultimodalData, steps: Iterable[Step]) -> None:
    """ValueError if batch normalisation will meet a batch of one sample that it cannot take: it is tried on one."""
    unsure = {
        m
        for m, encoder in model.encoders.items()
        if any(isinstance(part, _BatchNorm) and (part.training or not model.training) for part in encoder.modules())
    }
    if not unsure:
        return
    cuda = [p.device for p in model.parameters() if p.is_cuda][:1]
    for step in steps:
        indices = parallel.share(step.indices)
        for modality in unsure & set(step.modalities):
            having = indices[data.present(modality)[indices]]
            if len(having) != 1:
                continue
            unsure = unsure - {modality}
            encoder = copy.deepcopy(model.encoders[modality])
            with torch.no_grad(), torch.random.fork_rng(devices=cuda), mode_of(encoder, training=True):
                try:
                    encoder(model.inputs(data, modality, having))
                except ValueError as error:
                    raise ValueError(
                        f"batch_size: expected one that leaves no batch with a single sample of modality {modality!r}, "
                        f"whose encoder has batch normalisation: {error}"
                    ) from error


def _settings(model: MultimodalModel, optimizer: Optimizer, data: MultimodalData) -> dict[str, Any]:
    """What a run that is resumed must agree in with its checkpoint, besides the arguments of `fit`."""
    return {
        "model": type(model).__name__,
        "optimizer": type(optimizer).__name__,
        "modalities": list(model.modalities),
        "classes": list(data.classes),
        "samples": {split: len(data.indices(split)) for split in SPLITS},
        "training samples": {m: len(data.indices("train", m)) for m in model.modalities},
        "parameters": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
    }


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed << 32) + epoch
