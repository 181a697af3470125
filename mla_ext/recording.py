"""The hook of an attached head: it tells the optimizer what the head is fed, and keeps nothing alive."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._library import is_older
from .checks import WEIGHT_DTYPES
from .layers import patch_mean
from .links import see
from .observation import Observation

if TYPE_CHECKING:
    from .projected import ProjectedOptimizer

__all__ = ["Handles", "Link", "Recorder"]


def _exporting_flag() -> bool:
    """For PyTorch before 2.10: before 2.7 it has no is_exporting(), and the compiler of 2.8 takes that for True."""
    return getattr(torch.compiler, "_is_exporting_flag", False)


_is_exporting = _exporting_flag if is_older(torch.__version__, (2, 10)) else torch.compiler.is_exporting
_NO_FEATURES = see("troubleshooting#a-head-without-features")


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
        if _is_exporting():  # the graph is for other programs, without this optimizer
            return
        self.starved = 0
        features: Any = args[0] if args else kwargs.get("input")
        spare, self.spare = self.spare, None  # another thread must not find it
        if spare is not None and isinstance(head, nn.Linear) and not torch.compiler.is_compiling():
            renewed = spare.renewed(features)
            if renewed is not None:
                optimizer._join(self.weight, renewed)
                return
        if not _has_numbers(features, self.weight) or not _fits(head, features, self.weight):
            if not self.has_skipped:
                self.has_skipped = True
                warnings.warn(
                    "the features that an attached head was fed cannot be recorded, so its P does not learn of them: "
                    f"expected {_expected(head, self.weight)} on {self.weight.device}, got a "
                    f"{type(features).__name__}; said once{_NO_FEATURES}",
                    stacklevel=2,
                )
            return
        if features.numel() > 0:
            features = features.detach()
            if type(features) is not Tensor:  # P is a plain tensor, whatever the features
                features = features.as_subclass(Tensor)
            if isinstance(head, nn.Conv2d):
                mean, count = patch_mean(head, features.reshape(-1, *features.shape[-3:]))
                optimizer._record_mean(self.weight, mean, count)
            else:
                optimizer._record(self.weight, features.reshape(-1, features.shape[-1]))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"spare": None}

    def starve(self) -> None:
        """A step with a gradient and no features: said once, at the second in a row, as one alone may be a trial."""
        self.starved += 1
        if self.starved >= 2 and not self.has_starved:
            self.has_starved = True
            warnings.warn(
                "an attached weight has gradients and no features, so its P stays as it is: its head is in evaluation "
                "mode, or the weight is used outside the head that was attached" + _NO_FEATURES,
                stacklevel=6,
            )


def _has_numbers(features: Any, weight: Tensor) -> TypeGuard[Tensor]:
    """Whether there are numbers to take the mean of, beside the weight."""
    if not isinstance(features, Tensor) or features.is_nested or features.layout != torch.strided:
        return False
    if not torch.compiler.is_compiling() and (
        type(features).__torch_dispatch__ is not Tensor.__torch_dispatch__  # no numbers of its own, as a FakeTensor
        or torch._C._functorch.is_functorch_wrapped_tensor(features)  # in vmap, jvp, ...: meaningless after it
    ):
        return False
    return features.device == weight.device and features.dtype in WEIGHT_DTYPES


def _fits(head: nn.Module, features: Tensor, weight: Tensor) -> bool:
    """Whether features are rows (..., s) for a weight (C, s), or images (..., C_in, H, W) for (C, C_in, k, k)."""
    if isinstance(head, nn.Conv2d):
        return features.dim() >= 3 and features.shape[-3] == weight.shape[1]
    return features.dim() > 0 and features.shape[-1] == weight.shape[1]


def _expected(head: nn.Module, weight: Tensor) -> str:
    size = weight.shape[1]
    return f"images of {size} channels" if isinstance(head, nn.Conv2d) else f"rows of {size} numbers"
