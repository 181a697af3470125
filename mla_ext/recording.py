"""The hook of an attached head: it tells the optimizer what the head is fed, and keeps nothing alive."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .optimizer import ProjectedSGD

__all__ = ["Link", "Recorder"]


class Link:
    """Where the hooks of an optimizer's heads find it.

    A copy of a head alone leads nowhere. A copy of head and optimizer together leads to the copied optimizer, which
    binds the link that it was copied with.
    """

    def __init__(self) -> None:
        self.optimizer: weakref.ref[ProjectedSGD] | None = None

    def bind(self, optimizer: ProjectedSGD) -> None:
        self.optimizer = weakref.ref(optimizer)

    def __reduce__(self) -> tuple[type[Link], tuple[()]]:
        return Link, ()


class Recorder:
    """The forward hook of a head whose weight is `weight`."""

    def __init__(self, link: Link, weight: Tensor) -> None:
        self.link, self.weight = link, weight

    def __call__(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        optimizer = None if self.link.optimizer is None else self.link.optimizer()
        if optimizer is None or not (head.training and torch.is_grad_enabled() and self.weight.requires_grad):
            return
        features = args[0] if args else kwargs["input"]
        if features.numel() > 0:
            optimizer.observe(self.weight, features.detach().reshape(-1, features.shape[-1]))
