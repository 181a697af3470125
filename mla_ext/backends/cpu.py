"""The CPU kernels of csrc/cpu, in the library `_C`."""

from __future__ import annotations

import torch

from .. import _library
from .compiled import entropy_fusion, feature_mean, fold_, head_step_, rls_update_

__all__ = ["entropy_fusion", "feature_mean", "fold_", "head_step_", "rls_update_", "unusable"]


def unusable(device: torch.device) -> str | None:
    return "its kernels read CPU memory" if device.type != "cpu" else _library.load_error
