"""The hook of an attached head: it tells the optimizer what the head is fed, and keeps nothing alive."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .checks import WEIGHT_DTYPES
from .observation import Observation

if TYPE_CHECKING:
    from .projected import ProjectedOptimizer

__all__ = ["Handles", "Link", "Recorder"]


class Handles:
    """The handles of several heads as one: remove() ends all their recordings."""

    def __init__(self, handles: Sequence[RemovableHandle | Handles]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Link:
    """Where the hooks of an optimizer's heads find it.

    A copy of a head alone leads nowhere. A copy of head and optimizer together leads to the copied optimizer, which
    binds the link that it was copied with.
    """

    def __init__(self) -> None:
        self.optimizer: weakref.ref[ProjectedOptimizer] | None = None

    def bind(self, optimizer: ProjectedOptimizer) -> None:
        self.optimizer = weakref.ref(optimizer)

    def __reduce__(self) -> tuple[type[Link], tuple[()]]:
        return Link, ()


class Recorder:
    """The forward hook of a head whose weight is `weight`. It never makes a forward fail that works without it.

    `spare` is an observation that a step is done with: its memory takes the next one. `starved` counts the steps in a
    row, each with a gradient, before which this head was fed nothing.
    """

    def __init__(self, link: Link, weight: Tensor) -> None:
        self.link, self.weight = link, weight
        self.spare: Observation | None = None
        self.starved, self.has_skipped, self.has_starved = 0, False, False

    def __call__(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        optimizer = None if self.link.optimizer is None else self.link.optimizer()
        if optimizer is None or not (head.training and torch.is_grad_enabled() and self.weight.requires_grad):
            return
        if torch.compiler.is_exporting():  # the graph is for other programs, without this optimizer
            return
        self.starved = 0
        features: Any = args[0] if args else kwargs.get("input")
        spare, self.spare = self.spare, None  # another thread must not find it
        if spare is not None and not torch.compiler.is_compiling():
            renewed = spare.renewed(features)
            if renewed is not None:
                optimizer._join(self.weight, renewed)
                return
        if not _has_rows(features, self.weight):
            if not self.has_skipped:
                self.has_skipped = True
                warnings.warn(
                    "the features that an attached head was fed cannot be recorded, so its P does not learn of them: "
                    f"expected rows of {self.weight.shape[1]} numbers on {self.weight.device}, got a "
                    f"{type(features).__name__}; said once",
                    stacklevel=2,
                )
            return
        if features.numel() > 0:
            features = features.detach().reshape(-1, features.shape[-1])
            if type(features) is not Tensor:  # P is a plain tensor, whatever the features
                features = features.as_subclass(Tensor)
            optimizer._record(self.weight, features)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"spare": None}

    def starve(self) -> None:
        """A step with a gradient and no features: said once, at the second in a row, as one alone may be a trial."""
        self.starved += 1
        if self.starved >= 2 and not self.has_starved:
            self.has_starved = True
            warnings.warn(
                "an attached weight has gradients and no features, so its P stays as it is: its head is in evaluation "
                "mode, or the weight is used outside the head that was attached",
                stacklevel=6,
            )


def _has_rows(features: Any, weight: Tensor) -> TypeGuard[Tensor]:
    """Whether features (..., s) hold numbers to take the mean of, for a weight (C, s)."""
    if not isinstance(features, Tensor) or features.is_nested or features.layout != torch.strided:
        return False
    if not torch.compiler.is_compiling() and (
        type(features).__torch_dispatch__ is not Tensor.__torch_dispatch__  # no numbers of its own, as a FakeTensor
        or torch._C._functorch.is_functorch_wrapped_tensor(features)  # in vmap, jvp, ...: meaningless after it
    ):
        return False
    fits = features.dim() > 0 and features.shape[-1] == weight.shape[1]
    return fits and features.device == weight.device and features.dtype in WEIGHT_DTYPES
