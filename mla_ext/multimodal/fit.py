"""`fit` trains a model, keeping the epoch that is best on the validation split; `evaluate` scores it on a split."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from ..head_state import get_projection
from ..links import see
from ..projected import ProjectedOptimizer
from . import checkpoint, parallel
from .batches import Loader
from .data import SPLITS, MultimodalData
from .evaluate import Report, check_model_and_data, check_positive, check_workers, device_of, start_scoring
from .failure import explained
from .model import ORDERS, Criterion, MultimodalModel, Step, mode_of
from .precision import Precision, choose_device
from .run import CHECKPOINT, METRICS, Run

__all__ = ["CHECKPOINT", "METRICS", "NonFiniteLossError", "fit"]

EVALUATION_BATCH = 512
_ADVICE = "lower the learning rate, or scale the inputs (MultimodalData.standardized)" + see(
    "troubleshooting#a-loss-that-is-nan-or-infinite"
)


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
    device: str | torch.device | None = None,
    amp: str | None = None,
    workers: int = 0,
    scheduler: LRScheduler | None = None,
    clip_grad_norm: float | None = None,
    loss: Criterion | None = None,
    compile: bool = False,
    reset_projection: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    config: dict[str, Any] | None = None,
    progress: bool = True,
    on_epoch: Callable[[dict[str, Any]], object] | None = None,
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
        device: where to train: "cpu", "cuda", "cuda:1", or "auto", which takes the GPU if there is one that works.
            Model and optimizer are moved there, and stay. None: where the model is.
        amp: mixed precision: "bf16" or "fp16" for the forward pass, the latter with a scaled loss. Weights, projection
            and optimizer state keep their dtype.
        workers: processes that read the data ahead of time; 0 reads in this one. The results are the same bits.
        scheduler: stepped after every epoch.
        clip_grad_norm: the largest norm of all gradients of a step together; larger ones are scaled down to it, before
            the projection.
        loss: (logits (N, C), labels (N,)) -> their mean loss, in place of the cross entropy: for example
            `nn.CrossEntropyLoss(label_smoothing=0.1)`. A model that does not ask for its `criterion` ignores it.
        compile: run the encoders through torch.compile. They stay compiled.
        reset_projection: start every epoch with the projections of the optimizer at the identity.
        out: a directory for the checkpoint `last.pt`, written after every epoch and never left half-written, and
            for `metrics.jsonl`, one record per line. A run that is in it already is removed, unless resumed.
        resume: go on from the checkpoint in `out`, to the same bits as a run that was never interrupted (where the
            device's arithmetic is deterministic); start anew if there is none. The hyperparameters of optimizer and
            scheduler are those of the checkpoint.
        config: plain values that say more about the run, such as how the data was made. They are kept in the checkpoint
            under "settings", and a run that is resumed must agree in them.
        progress: show a progress bar on standard error.
        on_epoch: called after every epoch, when its files are written, with its record.

    Returns the history, one record per epoch: {"epoch", "training_loss": {modality: mean}, "lr": of each parameter
    group, "validation": the report as a dict, "best": whether it was the best so far}.

    Raises ValueError or TypeError for bad arguments and for a checkpoint of another run, before anything is changed;
    NonFiniteLossError at the end of an epoch whose training or validation loss was not finite; RecordingError, which
    names the sample, for one that cannot be read (both are RuntimeErrors); torch.OutOfMemoryError, MemoryError or
    RuntimeError in one line when memory runs out, or a worker or another rank dies. Whatever ends a run, also Ctrl-C,
    the checkpoint of the epoch before is kept.
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
    check_workers(workers)
    if scheduler is not None and (not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau)):
        raise TypeError(f"scheduler: expected an LRScheduler that needs no metric, got {type(scheduler).__name__}")
    if clip_grad_norm is not None and (isinstance(clip_grad_norm, bool) or not isinstance(clip_grad_norm, int | float)):
        raise TypeError(f"clip_grad_norm: expected a number, got {clip_grad_norm!r}")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ValueError(f"clip_grad_norm: expected a number above 0, got {clip_grad_norm!r}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: expected a function of logits and labels, got {type(loss).__name__}")
    if reset_projection and not isinstance(optimizer, ProjectedOptimizer):
        raise TypeError(
            f"reset_projection: expected a ProjectedSGD or ProjectedAdamW as optimizer, got {type(optimizer).__name__}"
        )
    if resume and out is None:
        raise ValueError("resume: expected `out` too, the directory of the run to resume, got None")
    for modality in model.modalities:
        if len(data.indices("train", modality)) == 0:
            raise ValueError(f"data: expected a training sample that has modality {modality!r}, got none")
    if len(data.indices("validation")) == 0:
        raise ValueError("data: expected validation samples, to choose the epoch by, got none")

    device = device_of(model) if device is None else choose_device(device)
    precision = Precision(amp, device)

    settings = _settings(model, optimizer, data)
    settings |= {"batch_size": batch_size, "order": order, "seed": seed, "reset_projection": reset_projection}
    settings |= {"amp": amp, "clip_grad_norm": clip_grad_norm}
    settings |= config or {}
    run = Run(model, optimizer, scheduler, precision.scaler, settings)
    directory = None if out is None else Path(out)

    def epoch_steps(epoch: int) -> list[Step]:
        return model.steps(data, batch_size, order, torch.Generator().manual_seed(epoch_seed(seed, epoch)))

    _check_single_samples(model, data, (step for epoch in range(1, epochs + 1) for step in epoch_steps(epoch)))
    if directory is not None:
        checkpoint.plain(run.content())  # what could not be read back is refused now
        if resume and (directory / CHECKPOINT).exists():
            run.restore(directory / CHECKPOINT)
        parallel.wait_for_all()  # nobody writes while others read
        run.open(directory)
    _move(model, optimizer, device)
    parallel.broadcast(model)
    if compile:
        for encoder in model.encoders.values():
            encoder.compile()

    first = len(run.history) + 1
    per_epoch = len(epoch_steps(first))
    total, done = per_epoch * max(epochs, first - 1), per_epoch * (first - 1)
    with (
        _criterion_of(model, loss),
        Loader(data, device, workers) as loader,
        tqdm(total=total, initial=done, unit="step", disable=not (progress and parallel.is_main())) as bar,
    ):
        training = _Training(model, optimizer, loader, precision, clip_grad_norm)
        for epoch in range(first, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs} on {device}")
            with explained(f"epoch {epoch}"), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(epoch_seed(seed, epoch))
                if reset_projection and isinstance(optimizer, ProjectedOptimizer):  # as checked above
                    optimizer.reset_projection()
                training_loss, report, plasticity = training.epoch(
                    epoch_steps(epoch), epoch, epoch_seed(seed, epoch), bar
                )
            if not math.isfinite(report.loss):
                raise NonFiniteLossError(f"validation loss is {report.loss} after epoch {epoch}: {_ADVICE}")
            run.record(epoch, training_loss, report, plasticity)
            if directory is not None:
                run.save(directory)
            if on_epoch is not None:
                on_epoch(run.history[-1])
            bar.set_postfix(
                {
                    "validation": f"{report.accuracy:.2%}",
                    "best": f"{run.best['accuracy']:.2%}",
                    "waits for data": f"{loader.waiting:.0%}",
                }
            )
    model.load_state_dict(run.best["model"])
    return run.history


@dataclass(frozen=True)
class _Training:
    """What a step needs, whichever it is."""

    model: MultimodalModel
    optimizer: Optimizer
    loader: Loader
    precision: Precision
    clip_grad_norm: float | None

    def epoch(
        self, steps: list[Step], number: int, seed: int, bar: tqdm
    ) -> tuple[dict[str, float], Report, dict[str, float]]:
        """Take the steps and validate: the host waits for the device once, at the end, and reads all numbers at once.

        Returns the mean training loss per sample of each (group of) modalities, the validation report, and what
        `_shares` makes of the projections.
        """
        losses = self.train(steps, seed, bar)
        scoring = start_scoring(self.model, self.loader, "validation", EVALUATION_BATCH, self.precision)
        shares = _shares(self.optimizer)
        numbers = [losses, scoring.numbers, *(share.reshape(1) for _, share in shares)]
        host = torch.cat([part.to(losses.device, torch.float64) for part in numbers]).cpu()

        means, scored, read = host.split([len(losses), len(scoring.numbers), len(shares)])
        plasticity = {"plasticity": 1.0} if isinstance(self.optimizer, ProjectedOptimizer) else {}
        for name in dict.fromkeys(name for name, _ in shares):
            finite = [x for (its, _), x in zip(shares, read.tolist(), strict=True) if its == name and math.isfinite(x)]
            if finite:
                plasticity[name] = sum(finite) / len(finite)
        return _mean_losses(steps, means.tolist(), number), scoring.report(scored), plasticity

    def train(self, steps: list[Step], seed: int, bar: tqdm) -> Tensor:
        """Take the steps; return the mean loss of each, on the device."""
        # A rank without a sample of its own takes one along, so that it computes the same gradients as the others.
        shares = [parallel.share(step.indices) for step in steps]
        ours = [
            step._replace(indices=share if len(share) > 0 else step.indices[:1])
            for step, share in zip(steps, shares, strict=True)
        ]
        losses = []
        with mode_of(self.model, training=True):
            for data, step, mine, share in zip(
                self.loader.read(ours, training=True, seed=seed), steps, ours, shares, strict=True
            ):
                losses.append(self.step(data, mine, len(share) / len(step.indices)))
                bar.update()
        return parallel.sum_over_ranks(torch.stack(losses))

    def step(self, data: MultimodalData, step: Step, weight: float) -> Tensor:
        """One step; returns this rank's part of its loss. The parts of all ranks add up to the mean over the batch."""
        self.optimizer.zero_grad(set_to_none=True)  # None, not zero: what this step does not use must not move
        # In evaluation mode nothing is recorded: what a rank without a sample takes along counts for nothing.
        idle = mode_of(self.model, training=False) if weight == 0 else nullcontext()
        with idle, self.precision.autocast():
            loss = self.model.loss(data, step) * weight
        self.precision.backward(loss)
        parallel.sum_gradients(self.model.parameters())
        self.precision.step(self.optimizer, self.model.parameters(), self.clip_grad_norm)
        return loss.detach()


def _shares(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """How much lets through what: 1 all, 0 nothing; 0-d, for each projection, under the name of what is shared.

    "plasticity": the mean of P's eigenvalues, trace(P) / s. "gradient_passed": of the last gradient, ‖G P‖ / ‖G‖; not
    there where the weight has no gradient, NaN where that is 0.
    """
    found = []
    if isinstance(optimizer, ProjectedOptimizer):
        for weight, state in optimizer.state.items():
            P = get_projection(state)
            if P is not None:
                found.append(("plasticity", P.trace() / P.size))
                if weight.grad is not None:
                    found.append(("gradient_passed", optimizer.plasticity(weight)))
    return found


def _mean_losses(steps: list[Step], means: list[float], epoch: int) -> dict[str, float]:
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for number, (step, loss) in enumerate(zip(steps, means, strict=True), start=1):
        name = "+".join(step.modalities)
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"training loss of {name} is {loss} at epoch {epoch}, step {number} of {len(steps)}: {_ADVICE}"
            )
        sums[name] = sums.get(name, 0.0) + loss * len(step.indices)
        counts[name] = counts.get(name, 0) + len(step.indices)
    return {name: sums[name] / counts[name] for name in sums}


def _move(model: MultimodalModel, optimizer: Optimizer, device: torch.device) -> None:
    """To the device, the optimizer's state too."""
    if device_of(model) != device:
        model.to(device)
        if optimizer.state:
            optimizer.load_state_dict(optimizer.state_dict())  # which puts state where its parameter is


@contextmanager
def _criterion_of(model: MultimodalModel, loss: Criterion | None) -> Iterator[None]:
    """The model's criterion is `loss`, if there is one; afterwards it is its own again."""
    own = model.criterion
    if loss is not None:
        model.criterion = loss.to(device_of(model)) if isinstance(loss, nn.Module) else loss
    try:
        yield
    finally:
        model.criterion = own


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


def epoch_seed(seed: int, epoch: int) -> int:
    return (seed << 32) + epoch
