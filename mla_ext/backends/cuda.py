"""The CUDA kernels of csrc/cuda, in the library `_C_cuda`."""

from __future__ import annotations

import torch

from .. import _library
from ..projection import Projection
from .base import Backend
from .compiled import Compiled

__all__ = ["Cuda"]

# A prediction from bytes and launches, not measured: a dense P this large is one launch of a few microseconds on chip,
# and the four launches of the rank form take as long at any s.
DENSE_UP_TO = 1024
RANK = 64


class Cuda(Compiled):
    name = "cuda"
    preference = 30

    def unusable(self, device: torch.device) -> str | None:
        if _library.cuda_load_error is not None or device.type == "cuda":
            return _library.cuda_load_error
        return "its kernels read GPU memory" if torch.cuda.is_available() else "no CUDA device is available here"

    def rank(self, s: int) -> int | None:
        return RANK if s > DENSE_UP_TO else None

    def settle_(self, projection: Projection) -> None:
        Backend.settle_(self, projection)  # only a P that was on a CPU before has rows: torch folds them, once
