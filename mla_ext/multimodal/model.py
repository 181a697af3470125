"""Models: encoders that share one head (MLA), the joint baseline, and the protocol `fit` and `evaluate` speak.

A model says what one epoch of training consists of (`steps`), what a step minimises (`loss`) and what it predicts
(`logits`). `fit` and `evaluate` know nothing else, so a method of one's own needs these three methods only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import MultimodalData

__all__ = [
    "FUSIONS",
    "ORDERS",
    "ConcatModel",
    "Criterion",
    "JointModel",
    "Logits",
    "MultimodalModel",
    "SharedHeadModel",
    "Step",
    "full_precision",
    "mode_of",
    "scatter_rows",
    "shuffled_batches",
]

FUSIONS = ("mean", "entropy", "calibrated")  # of the logits of a SharedHeadModel
ORDERS = ("given", "reversed", "random")


Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Step(NamedTuple):
    """One training step: the modalities it uses and the samples of its batch, int64 (N,)."""

    modalities: tuple[str, ...]
    indices: Tensor


class Logits(NamedTuple):
    """What a model predicts for N samples with M modalities and C classes."""

    unimodal: Tensor  # (M, N, C), zero where the sample lacks the modality
    present: Tensor  # bool (M, N)
    joint: Tensor | None = None  # (N, C): the prediction of a model that has one of its own, rather than fusing


class MultimodalModel(nn.Module, ABC):
    """What `fit` and `evaluate` need. Subclasses define `steps`, `loss` and `logits`.

    Args: encoders, one per modality, in order: a batch of inputs -> features (N, s).

    Attributes: criterion, (logits (N, C), labels (N,)) -> their mean loss, a scalar. Cross entropy, or what `fit` is
    given as `loss`.
    """

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not isinstance(encoders, Mapping) or not all(isinstance(e, nn.Module) for e in encoders.values()):
            raise TypeError(f"encoders: expected a mapping of modality names to nn.Modules, got {encoders!r}")
        if not encoders:
            raise ValueError("encoders: expected at least one modality, got none")
        try:
            self.encoders = nn.ModuleDict(encoders)
        except (KeyError, TypeError) as error:  # a name with a dot, or that of a method of nn.ModuleDict
            raise ValueError(f"encoders: expected keys that can name modules, got {list(encoders)}: {error}") from error
        self.modalities = tuple(encoders)
        self.criterion: Criterion = F.cross_entropy

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "criterion":  # a module too is a plain attribute, and no part of the model's state
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def check(self, data: MultimodalData) -> None:
        """Raise ValueError unless the model can be trained and evaluated on `data`."""
        if not set(self.modalities) <= set(data.modalities):
            raise ValueError(f"data: expected the model's modalities {self.modalities}, got {data.modalities}")
        head = getattr(self, "head", None)
        if isinstance(head, nn.Linear) and head.out_features != len(data.classes):
            raise ValueError(f"data: expected the head's {head.out_features} classes, got {len(data.classes)}")

    def inputs(self, data: MultimodalData, modality: str, indices: Tensor) -> Tensor:
        """The modality's inputs, on the device and in the dtype of the model."""
        return data.inputs(modality, indices).to(next(self.parameters()))

    def labels(self, data: MultimodalData, indices: Tensor) -> Tensor:
        return data.labels[indices].to(next(self.parameters()).device, non_blocking=True)

    @abstractmethod
    def steps(self, data: MultimodalData, batch_size: int, order: str, generator: torch.Generator) -> list[Step]:
        """The steps of one epoch; all its randomness comes from `generator`."""

    @abstractmethod
    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        """What the step minimises: a scalar, the mean over its samples."""

    @abstractmethod
    def logits(self, data: MultimodalData, indices: Tensor) -> Logits:
        """Predictions for any samples, complete or not."""


class SharedHeadModel(MultimodalModel):
    """One encoder per modality and one head g shared by all: f_m = g∘h_m, trained by alternating steps.

    Args: encoders, {modality: module}, features (N, s); head, the shared module (N, s) -> (N, C), an nn.Linear
    where a ProjectedSGD is to protect it.

    temperatures (M,) and the fusion that stands for the model are buffers: ones and "entropy" until `mla_ext.calibrate`
    sets them, and where a state_dict lacks them.
    """

    temperatures: Tensor
    fusion_index: Tensor  # int64, 0-d: a place in FUSIONS

    def __init__(self, encoders: Mapping[str, nn.Module], head: nn.Module) -> None:
        super().__init__(encoders)
        if not isinstance(head, nn.Module):
            raise TypeError(f"head: expected an nn.Module, got {type(head).__name__}")
        self.head = head
        self.register_buffer("temperatures", torch.ones(len(self.modalities)))
        self.register_buffer("fusion_index", torch.tensor(FUSIONS.index("entropy")))

    @property
    def fusion(self) -> str:
        """The fusion that stands for the model."""
        return FUSIONS[int(self.fusion_index)]

    def complete(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        """Give a state_dict of before `calibrate` existed what it lacks."""
        state_dict.setdefault(f"{prefix}temperatures", torch.ones_like(self.temperatures))
        entropy = torch.full_like(self.fusion_index, FUSIONS.index("entropy"))
        state_dict.setdefault(f"{prefix}fusion_index", entropy)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.complete(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, modality: str, x: Tensor) -> Tensor:
        """The modality's logits f_m(x): (N, ...) -> (N, C)."""
        if modality not in self.modalities:
            raise ValueError(f"modality: expected one of {self.modalities}, got {modality!r}")
        logits: Tensor = self.head(self.encoders[modality](x))
        return logits

    def steps(self, data: MultimodalData, batch_size: int, order: str, generator: torch.Generator) -> list[Step]:
        """Step t works on modality t mod M; where one runs out of batches the others go on (eq. 2).

        A sample that lacks a modality is not part of that modality's batches.
        """
        batches = {m: shuffled_batches(data.indices("train", m), batch_size, generator) for m in self.modalities}
        turns = list(self.modalities)
        if order == "reversed":
            turns.reverse()
        elif order == "random":
            drawn = torch.randperm(len(turns), generator=generator, device=generator.device)
            turns = [turns[i] for i in drawn.tolist()]
        rounds = max(len(b) for b in batches.values())
        return [Step((m,), batches[m][i]) for i in range(rounds) for m in turns if i < len(batches[m])]

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        """The criterion of the step's modality alone."""
        (modality,) = step.modalities
        logits = full_precision(self(modality, self.inputs(data, modality, step.indices)))
        return self.criterion(logits, self.labels(data, step.indices))

    def logits(self, data: MultimodalData, indices: Tensor) -> Logits:
        present = torch.stack([data.present(m)[indices] for m in self.modalities])
        none = next(self.parameters()).new_zeros(0, len(data.classes))  # an encoder may refuse an empty batch
        rows = [
            full_precision(self(m, self.inputs(data, m, indices[p]))) if p.any() else none
            for m, p in zip(self.modalities, present, strict=True)
        ]
        unimodal = torch.stack([scatter_rows(r, p) for r, p in zip(rows, present, strict=True)])
        return Logits(unimodal, present.to(unimodal.device))


class JointModel(MultimodalModel):
    """Trained on all modalities at once. Subclasses define `joint` and `unimodal`.

    Both take each modality's features [(N, s_m)], zero where a sample lacks the modality, and present, bool (M, N).
    """

    @abstractmethod
    def joint(self, parts: list[Tensor], present: Tensor) -> Tensor:
        """The model's prediction (N, C)."""

    @abstractmethod
    def unimodal(self, parts: list[Tensor], present: Tensor) -> Tensor:
        """What each modality predicts alone (M, N, C); of a sample that lacks it, anything."""

    def features(self, data: MultimodalData, indices: Tensor) -> tuple[list[Tensor], Tensor]:
        """parts and present of these samples, on the device of the model."""
        present = torch.stack([data.present(m)[indices] for m in self.modalities])
        rows = [self._encoded(data, m, indices[p]) for m, p in zip(self.modalities, present, strict=True)]
        parts = [scatter_rows(r, p) for r, p in zip(rows, present, strict=True)]
        return parts, present.to(parts[0].device)

    def _encoded(self, data: MultimodalData, modality: str, indices: Tensor) -> Tensor:
        """The encoder's features (n, s). Of no samples, n = 0, it sees one recording instead, as it may refuse none."""
        encoder = self.encoders[modality]
        if len(indices) > 0:
            features: Tensor = encoder(self.inputs(data, modality, indices))
            return features
        with mode_of(encoder, training=False):  # neither draws random numbers nor moves a running mean
            features = encoder(data.example(modality).to(next(self.parameters())))
        return features[:0]

    def steps(self, data: MultimodalData, batch_size: int, order: str, generator: torch.Generator) -> list[Step]:
        """Every step uses all modalities; `order` says nothing here."""
        batches = shuffled_batches(data.indices("train"), batch_size, generator)
        return [Step(self.modalities, batch) for batch in batches]

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        """The criterion of the joint prediction."""
        joint = full_precision(self.joint(*self.features(data, step.indices)))
        return self.criterion(joint, self.labels(data, step.indices))

    def logits(self, data: MultimodalData, indices: Tensor) -> Logits:
        parts, present = self.features(data, indices)
        unimodal = self.unimodal(parts, present).masked_fill(~present.unsqueeze(-1), 0.0)
        return Logits(full_precision(unimodal), present, full_precision(self.joint(parts, present)))


class ConcatModel(JointModel):
    """The joint baseline: one linear layer over the concatenated features, trained on all modalities at once.

    The features of a missing modality are zero. Unimodal logits are the modality's columns of W times its
    features, plus b / M, so that they sum to the joint prediction.

    Args: encoders, {modality: module}; head, nn.Linear(sum of the encoders' widths, C).
    """

    def __init__(self, encoders: Mapping[str, nn.Module], head: nn.Linear) -> None:
        super().__init__(encoders)
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head: expected an nn.Linear, got {type(head).__name__}")
        self.head = head

    def joint(self, parts: list[Tensor], present: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat(parts, dim=1))
        return logits

    def unimodal(self, parts: list[Tensor], present: Tensor) -> Tensor:
        weights = self.head.weight.split([part.shape[1] for part in parts], dim=1)
        bias = None if self.head.bias is None else self.head.bias / len(parts)
        return torch.stack([F.linear(x, w, bias) for x, w in zip(parts, weights, strict=True)])


@contextmanager
def mode_of(module: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode; afterwards every submodule is in its own mode again.

    Submodules that are in evaluation mode while the whole trains, such as a frozen encoder, stay in it.
    """
    modes = {part: part.training for part in module.modules()}
    if not (training and module.training):
        module.train(training)
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def shuffled_batches(indices: Tensor, batch_size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """The indices in random order, in batches; the last may be smaller."""
    shuffled = indices[torch.randperm(len(indices), generator=generator, device=generator.device)]
    batches: Sequence[Tensor] = shuffled.split(batch_size)
    return batches


def scatter_rows(rows: Tensor, present: Tensor) -> Tensor:
    """Put rows (n, s) where `present`, bool (N,), is true; zeros elsewhere: (N, s). Differentiable.

    With `present` on the CPU the host does not wait for the device of `rows`.
    """
    out = rows.new_zeros(len(present), *rows.shape[1:])
    places = present.nonzero().flatten().to(rows.device, non_blocking=True)
    return out.index_copy(0, places, rows)


def full_precision(logits: Tensor) -> Tensor:
    """Autocast's half precision as float32, in which losses and fusions are computed; other dtypes as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
