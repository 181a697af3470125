"""The CUDA kernels of csrc/cuda, in the library `_C_cuda`."""

from __future__ import annotations

import torch

from .. import _library
from .compiled import entropy_fusion, feature_mean, head_step_, rls_update_

__all__ = ["entropy_fusion", "feature_mean", "head_step_", "rls_update_", "unusable"]


def unusable(device: torch.device) -> str | None:
    if _library.cuda_load_error is not None or device.type == "cuda":
        return _library.cuda_load_error
    return "its kernels read GPU memory" if torch.cuda.is_available() else "no CUDA device is available here"
