"""The CPU kernels of csrc/cpu, in the library `_C`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .. import _library
from ..reference import Hyperparameters
from ..step import HeadStep, PlainStep
from .compiled import Compiled

__all__ = ["Cpu"]

# A deferred row costs each step as much as a row of P does; writing P, once for all rows, costs about 2 s rows. With 8,
# 16, 32 and 64 rows, 16 and 32 do best from s = 256 to 4096 (benchmarks/NOTES.md).
DEFERRED = 16

_step_ = getattr(_library.module, "step", None)
_feature_mean_ = getattr(_library.module, "feature_mean", None)


class Cpu(Compiled):
    name = "cpu"
    preference = 40
    dense_up_to = 256

    def unusable(self, device: torch.device) -> str | None:
        return "its kernels read CPU memory" if device.type != "cpu" else _library.load_error

    def deferral(self, C: int, s: int, hyper: Hyperparameters) -> int:
        """With more classes than features the correction of G P costs more than the write of P."""
        updates_only = not hyper.normalize and not isinstance(hyper.forget, Tensor) and hyper.forget == 0
        return DEFERRED if s >= C and updates_only else 0

    def step_(self, plain: list[PlainStep], heads: list[HeadStep]) -> bool:
        if (
            _step_ is None or torch._C._len_torch_dispatch_stack() > 0
        ):  # whoever has a mode wants to see every operation
            return False
        fma = add_is_fma()
        return fma is not None and _step_(plain, heads, fma)

    def feature_mean_(self, features: Tensor, mean: Tensor) -> int:
        return 0 if _feature_mean_ is None else _feature_mean_(features, mean)


@cache
def add_is_fma() -> bool | None:
    """Whether torch.add(c, a, alpha=b) rounds a·b + c once on this CPU; None if it differs from element to element."""
    found = set()
    for dtype, h in ((torch.float32, 2.0**-13), (torch.float64, 2.0**-27)):
        a = torch.full((67,), 1 + h, dtype=dtype, device="cpu")
        square = torch.full_like(a, 1 + 2 * h)  # (1 + h)², rounded
        found |= {rest == h * h for rest in torch.add(-square, a, alpha=1 + h).tolist()}
    return found.pop() if len(found) == 1 else None
