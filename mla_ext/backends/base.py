"""What a backend is. A file beside this one that defines a complete `Backend` adds one; nothing else is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..projection import Projection
from ..reference import Hyperparameters
from ..step import HeadStep, PlainStep

__all__ = ["Backend"]

RANK = 64  # fewer rows lose accuracy (docs/rank.md)


class Backend(ABC):
    """The operations of `mla_ext.reference`, in place. Arguments are checked and contiguous when they get here.

    name: what users write as `backend=`. preference: "auto" takes the usable backend that has the highest. dense_up_to:
    the number of features above which the rank form costs less than a dense P; None: never.
    """

    name: ClassVar[str]
    preference: ClassVar[int] = 0
    dense_up_to: ClassVar[int | None] = None

    @abstractmethod
    def unusable(self, device: torch.device) -> str | None:
        """Why it cannot run for tensors on `device`; None where it can."""

    def deferral(self, C: int, s: int, hyper: Hyperparameters) -> int:
        """How many updates of a dense P are best kept as rows before they are folded into it; 0: none."""
        return 0

    def rank(self, s: int) -> int | None:
        """The rows of the rank form that `rank="auto"` takes for s features; None: a dense P is cheaper."""
        return RANK if self.dense_up_to is not None and s > self.dense_up_to else None

    @abstractmethod
    def feature_mean(self, features: Tensor) -> Tensor:
        """h̄ (s,) of features (N, s)."""

    @abstractmethod
    def rls_update_(
        self, projection: Tensor, feature_mean: Tensor, alpha: float | Tensor, forget: float | Tensor, normalize: bool
    ) -> None:
        """A dense P (s, s) absorbs h̄ (s,)."""

    @abstractmethod
    def head_step_(self, step: HeadStep) -> None:
        """One step of a head."""

    def step_(self, plain: list[PlainStep], heads: list[HeadStep]) -> bool:
        """All steps of an optimizer at once, unchecked. False, and nothing has changed, if this backend cannot."""
        return False

    def feature_mean_(self, features: Tensor, mean: Tensor) -> int:
        """Write h̄ of features (..., s), unchecked, into mean (s,). Returns N, or 0 and does nothing if it cannot."""
        return 0

    def settle_(self, projection: Projection) -> None:
        """Fold the rows of a dense P into its matrix. P stays the same."""
        if projection.base is not None and projection.count is not None:
            projection.base.copy_(projection.dense())
            projection.count.zero_()

    @abstractmethod
    def entropy_fusion(
        self, logits: Tensor, present: Tensor | None, temperatures: Tensor | None, equal: bool
    ) -> tuple[Tensor, Tensor]:
        """Fused logits (N, C) and weights (M, N) of logits (M, N, C), which are divided by temperatures (M,) first.

        temperatures: in the accumulate dtype, on the device of logits. equal: present modalities weigh the same.
        """
