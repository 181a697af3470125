"""What all kernels and their launchers share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["number_or_pointer", "on", "read"]


@triton.jit
def read(value, pointer, dtype: tl.constexpr):
    """A number as a 0-d tensor: from device memory where there is a pointer, else the argument itself."""
    number = tl.full((), value, dtype)
    if pointer is not None:
        number = tl.load(pointer).to(dtype)
    return number


def number_or_pointer(value: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """`value` and `pointer` of `read`. A tensor on `device` is read there; one on the CPU here, where that is free."""
    if not isinstance(value, Tensor):
        return float(value), None
    return (0.0, value) if value.device == device else (value.item(), None)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
