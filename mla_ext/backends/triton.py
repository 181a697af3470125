"""The Triton kernels (`mla_ext.triton_kernels`): any device that Triton compiles for, no compiler needed at install.

Triton is imported by the first call, not with mla_ext. Eager calls go straight to its launcher.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from .. import _library
from ..step import HeadStep
from .base import Backend

__all__ = ["Triton"]

MINIMUM = (3, 6)  # the oldest that the tests have run with


class Triton(Backend):
    name = "triton"
    preference = 20
    dense_up_to = 2048  # as benchmarks/speed/time_model.py predicts; not measured

    def unusable(self, device: torch.device) -> str | None:
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
            return "Triton compiles for GPUs; for tests its interpreter, TRITON_INTERPRET=1, takes CPU tensors too"
        return _unusable(device.type)

    def feature_mean(self, features: Tensor) -> Tensor:
        from .. import triton_kernels

        return triton_kernels.feature_mean(features)

    def rls_update_(
        self, projection: Tensor, feature_mean: Tensor, alpha: float | Tensor, forget: float | Tensor, normalize: bool
    ) -> None:
        from .. import triton_kernels

        triton_kernels.rls_update_(projection, feature_mean, alpha, forget, normalize)

    def head_step_(self, step: HeadStep) -> None:
        from .. import triton_kernels

        P = step.projection
        if P.base is None:
            return triton_kernels.rank_step_(step)
        self.settle_(P)  # rows may wait for it from another backend
        triton_kernels.head_step_(
            step.weight,
            step.grad,
            step.momentum_buffer,
            P.base,
            step.feature_mean,
            step.step,
            step.hyper,
            step.grad_scale,
            step.found_inf,
            P.nu,
        )

    def entropy_fusion(
        self, logits: Tensor, present: Tensor | None, temperatures: Tensor | None, equal: bool
    ) -> tuple[Tensor, Tensor]:
        from .. import triton_kernels

        return triton_kernels.entropy_fusion(logits, present, temperatures, equal)


@functools.cache
def _unusable(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install triton`"
    try:
        import triton

        if _library.is_older(triton.__version__, MINIMUM):
            return f"Triton >= 3.6 is needed, as PyTorch 2.10 has it, and {triton.__version__} is installed"
        if device_type == "cpu":
            return None
        target = triton.runtime.driver.active.get_active_torch_device().type
    except (ImportError, RuntimeError) as failure:  # a broken installation, or no driver
        return f"Triton cannot be used here ({failure})"
    return None if device_type == target else f"Triton compiles for {target} tensors here"
