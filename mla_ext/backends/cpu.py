"""The CPU kernels of csrc/cpu, in the library `_C`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from ..reference import Hyperparameters
from .compiled import Compiled

__all__ = ["Cpu"]

# A deferred row costs each step as much as a row of P does; writing P, once for all rows, costs about 2 s rows. With 8,
# 16, 32 and 64 rows, 16 and 32 do best from s = 256 to 4096 (benchmarks/NOTES.md).
DEFERRED = 16
# The rank form costs less than a dense P from about here on (docs/rank.md).
DENSE_UP_TO = 256
RANK = 64


class Cpu(Compiled):
    name = "cpu"
    preference = 40

    def unusable(self, device: torch.device) -> str | None:
        return "its kernels read CPU memory" if device.type != "cpu" else _library.load_error

    def deferral(self, C: int, s: int, hyper: Hyperparameters) -> int:
        """With more classes than features the correction of G P costs more than the write of P."""
        updates_only = not hyper.normalize and not isinstance(hyper.forget, Tensor) and hyper.forget == 0
        return DEFERRED if s >= C and updates_only else 0

    def rank(self, s: int) -> int | None:
        return RANK if s > DENSE_UP_TO else None
