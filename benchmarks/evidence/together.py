"""Runs of one method on one data set, trained side by side: their weights are stacked, and a step is one `vmap`.

A small model leaves a CPU waiting for Python. The numbers are those of `fit` up to rounding. This is for methods whose
step is a loss followed by plain SGD, with or without MLA's projection of the head, on complete data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim import Optimizer

from mla_ext import MultimodalData, ProjectedSGD, entropy_fusion, reference
from mla_ext.multimodal.fit import epoch_seed
from mla_ext.multimodal.model import Logits, MultimodalModel, Step

from .methods import BATCH_SIZE

State = dict[str, Tensor]
KEYS = ("lr", "momentum", "weight_decay")


class Batch:
    """What a model reads of data, for samples that lack nothing. Inputs and labels may be those of many runs."""

    def __init__(self, inputs: dict[str, Tensor], labels: Tensor, classes: tuple[str, ...]) -> None:
        self.features, self.labels, self.classes = inputs, labels, classes

    def present(self, modality: str) -> Tensor:
        return torch.ones(self.labels.shape[-1], dtype=torch.bool)

    def inputs(self, modality: str, indices: Tensor) -> Tensor:
        return self.features[modality]


class Stacked(nn.Module):
    """One model that stands for all runs; what it computes is mapped over their weights."""

    def __init__(self, models: Sequence[MultimodalModel]) -> None:
        super().__init__()
        self.parameters_of, self.buffers_of = stack_module_state(models)
        self.model = copy.deepcopy(models[0])
        self.means: list[Tensor] = []

    def watch(self, head: nn.Module) -> None:
        """Keep the mean of what this part of the model is given."""
        head.register_forward_pre_hook(lambda _, inputs: self.means.append(inputs[0].detach().mean(dim=0)))

    def forward(self, ask: str, batch: Batch, modalities: tuple[str, ...]) -> Any:
        step = Step(modalities, torch.arange(batch.labels.shape[-1]))
        return self.model.loss(batch, step) if ask == "loss" else self.model.logits(batch, step.indices)

    def losses(self, batch: Batch, modalities: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
        """The loss of each run (R,), and what is watched, (R, s) each. Inputs and labels: (R, N, ...)."""

        def loss(state: State, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, list[Tensor]]:
            self.means = []
            value = self._ask(state, "loss", Batch(inputs, labels, batch.classes), modalities)
            return value, self.means

        found: tuple[Tensor, list[Tensor]] = vmap(loss)(
            self.parameters_of | self.buffers_of, batch.features, batch.labels
        )
        return found

    @torch.no_grad()
    def logits(self, batch: Batch) -> list[Logits]:
        """The predictions of each run for the same samples: inputs (N, ...)."""

        def logits(state: State) -> list[Tensor]:
            found = self._ask(state, "logits", batch, self.model.modalities)
            return [found.unimodal] if found.joint is None else [found.unimodal, found.joint]

        found = vmap(logits)(self.parameters_of | self.buffers_of)
        present = torch.stack([batch.present(m) for m in self.model.modalities])
        return [Logits(unimodal, present, *joint) for unimodal, *joint in zip(*found, strict=True)]

    def _ask(self, state: State, *question: object) -> Any:
        return functional_call(self, {f"model.{name}": value for name, value in state.items()}, question)

    def weights_of(self, run: int) -> State:
        stacked = self.parameters_of | self.buffers_of
        return {name: value[run].detach().clone() for name, value in stacked.items()}


class StackedSGD:
    """The step of `torch.optim.SGD`, or of a ProjectedSGD that is attached to `model.head`, for each run."""

    def __init__(self, stacked: Stacked, models: Sequence[MultimodalModel], optimizers: Sequence[Optimizer]) -> None:
        self.weights = stacked.parameters_of
        self.buffers: State = {}
        self.groups = [groups(*pair) for pair in zip(models, optimizers, strict=True)]
        self.settings = {name: {key: self.setting(name, key) for key in KEYS} for name in self.weights}
        self.projected = "head.weight" if isinstance(optimizers[0], ProjectedSGD) else None
        if self.projected is not None:
            head = self.weights[self.projected]
            dtype = reference.accumulate_dtype(head.dtype)
            self.P = torch.eye(head.shape[-1], dtype=dtype).repeat(len(models), 1, 1)
            self.nu = torch.zeros(len(models), dtype=dtype)

    def setting(self, name: str, key: str) -> Tensor:
        """A setting of each run, (R, 1, ...) with as many dimensions as its weight."""
        weight = self.weights[name]
        values = torch.tensor([run[name][key] for run in self.groups], dtype=weight.dtype)
        return values.view(-1, *[1] * (weight.dim() - 1))

    @torch.no_grad()
    def step(self, losses: Tensor, means: Sequence[Tensor]) -> None:
        grads = torch.autograd.grad(losses, list(self.weights.values()), torch.ones_like(losses), allow_unused=True)
        for (name, weight), grad in zip(self.weights.items(), grads, strict=True):
            if grad is None:
                continue
            if name == self.projected:
                grad = self.project(name, grad, *means)
            of = self.settings[name]
            grad = torch.addcmul(grad, of["weight_decay"], weight)
            if name in self.buffers:
                grad = self.buffers[name].mul_(of["momentum"]).add_(grad)
            self.buffers[name] = grad
            weight.addcmul_(of["lr"], grad, value=-1)

    def project(self, name: str, grad: Tensor, mean: Tensor) -> Tensor:
        """G P with P of before the update, or of after it where `absorb` is "before"."""
        alpha, forget = (self.setting(name, key).flatten() for key in ("alpha", "forget"))
        if self.groups[0][name]["alpha_scale"] == "features":
            self.nu = vmap(reference.next_nu)(self.nu, mean)
            alpha = alpha * self.nu
        before = self.P
        self.P = vmap(reference.rls_update)(before, mean, alpha, forget)
        return grad @ (self.P if self.groups[0][name]["absorb"] == "before" else before)


def groups(model: MultimodalModel, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """{parameter's name: the group it is in}."""
    found = {p: group for group in optimizer.param_groups for p in group["params"]}
    return {name: found[p] for name, p in model.named_parameters()}


@dataclass
class Ends:
    """Of one run: the validation accuracy after each epoch, and the weights of the best and of the last."""

    validation: list[float]
    best: int
    weights: State
    last: State


def train(
    built: Sequence[tuple[MultimodalModel, Optimizer]], data: MultimodalData, seeds: Sequence[int], epochs: int
) -> list[Ends | str]:
    """As `fit` trains each of them with its seed, in the order that is given.

    A string says why a run's loss did not stay finite.
    """
    models, optimizers = zip(*built, strict=True)
    stacked = Stacked(models)
    sgd = StackedSGD(stacked, models, optimizers)
    if sgd.projected is not None:
        stacked.watch(stacked.model.head)
    everything = data.indices("validation")
    inputs = {m: data.inputs(m, everything) for m in models[0].modalities}
    validation = Batch(inputs, data.labels[everything], data.classes)
    accuracies: list[list[float]] = [[] for _ in models]
    best: list[tuple[float, float, int, State]] = [(-1.0, 0.0, 0, {})] * len(models)
    reasons: dict[int, str] = {}
    for epoch in range(1, epochs + 1):
        generators = [torch.Generator().manual_seed(epoch_seed(seed, epoch)) for seed in seeds]
        turns = [m.steps(data, BATCH_SIZE, "given", g) for m, g in zip(models, generators, strict=True)]
        worst = torch.zeros(len(models))
        for steps in zip(*turns, strict=True):
            indices = torch.stack([step.indices for step in steps])
            modalities = steps[0].modalities
            inputs = {m: data.inputs(m, indices.flatten()).unflatten(0, indices.shape) for m in modalities}
            batch = Batch(inputs, data.labels[indices], data.classes)
            losses, means = stacked.losses(batch, modalities)
            sgd.step(losses, means)
            worst += losses.detach()  # not finite where one of them is not
        for run, logits in enumerate(stacked.logits(validation)):
            joint = entropy_fusion(logits.unimodal, logits.present)[0] if logits.joint is None else logits.joint
            loss = F.cross_entropy(joint, validation.labels).item()
            if not math.isfinite(loss + worst[run].item()):
                reasons.setdefault(run, f"loss is {loss + worst[run].item()} in epoch {epoch}")
                continue
            accuracy = (joint.argmax(dim=-1) == validation.labels).double().mean().item()
            accuracies[run].append(accuracy)
            if (accuracy, -loss) > best[run][:2]:
                best[run] = (accuracy, -loss, epoch - 1, stacked.weights_of(run))
    return [
        reasons[run] if run in reasons else Ends(accuracies[run], *best[run][2:], stacked.weights_of(run))
        for run in range(len(models))
    ]
