"""The CUDA kernels of csrc/cuda, in the library `_C_cuda`."""

from __future__ import annotations

import torch

from .. import _library
from ..step import HeadStep
from .compiled import Compiled
from .reference import Reference

__all__ = ["Cuda"]


class Cuda(Compiled):
    name = "cuda"
    preference = 30

    def unusable(self, device: torch.device) -> str | None:
        if _library.cuda_load_error is not None or device.type == "cuda":
            return _library.cuda_load_error
        return "its kernels read GPU memory" if torch.cuda.is_available() else "no CUDA device is available here"

    def head_step_(self, step: HeadStep) -> None:
        if step.projection.base is None:  # the rank form, which the kernels cannot do yet
            return Reference().head_step_(step)
        super().head_step_(step)
