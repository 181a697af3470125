"""The Triton kernels (`mla_ext.triton_kernels`): any device that Triton compiles for, no compiler needed at install.

Triton is imported by the first call, not with mla_ext. Eager calls go straight to its launcher.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from ..reference import Hyperparameters


def unusable(device: torch.device) -> str | None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return "Triton compiles for GPUs; for tests its interpreter, TRITON_INTERPRET=1, takes CPU tensors too"
    return _unusable(device.type)


@functools.cache
def _unusable(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install triton`"
    try:
        import triton

        if device_type == "cpu":
            return None
        target = triton.runtime.driver.active.get_active_torch_device().type
    except (ImportError, RuntimeError) as failure:  # a broken installation, or no driver
        return f"Triton cannot be used here ({failure})"
    return None if device_type == target else f"Triton compiles for {target} tensors here"


def feature_mean(features: Tensor) -> Tensor:
    from .. import triton_kernels

    return triton_kernels.feature_mean(features)


def rls_update_(
    projection: Tensor, feature_mean: Tensor, alpha: float | Tensor, forget: float | Tensor, normalize: bool
) -> None:
    from .. import triton_kernels

    triton_kernels.rls_update_(projection, feature_mean, alpha, forget, normalize)


def head_step_(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    projection: Tensor,
    feature_mean: Tensor | None,
    step: Tensor,
    hyper: Hyperparameters,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    from .. import triton_kernels

    triton_kernels.head_step_(
        weight, grad, momentum_buffer, projection, feature_mean, step, hyper, grad_scale, found_inf
    )


def entropy_fusion(logits: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    from .. import triton_kernels

    return triton_kernels.entropy_fusion(logits, present)
