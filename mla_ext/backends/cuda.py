"""The CUDA kernels of csrc/cuda, in the library `_C_cuda12` or `_C_cuda13`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from ..projection import Projection
from ..step import HeadStep
from .base import Backend
from .compiled import Compiled

__all__ = ["Cuda"]

PRODUCT_FROM = 32  # classes; an estimate, not measured


class Cuda(Compiled):
    name = "cuda"
    preference = 30
    dense_up_to = 2048  # as benchmarks/speed/time_model.py predicts; not measured

    def unusable(self, device: torch.device) -> str | None:
        if _library.cuda_load_error is not None or device.type == "cuda":
            return _library.cuda_load_error
        return "its kernels read GPU memory" if torch.cuda.is_available() else "no CUDA device is available here"

    def product(self, step: HeadStep) -> Tensor | None:
        return step.projection.product(step.grad) if len(step.grad) >= PRODUCT_FROM else None

    def settle_(self, projection: Projection) -> None:
        Backend.settle_(self, projection)  # only a P that was on a CPU before has rows: torch folds them, once
