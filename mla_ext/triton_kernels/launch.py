"""What all kernels and their launchers share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["numbers_or_pointers", "on", "read"]


@triton.jit
def read(value, pointer, dtype: tl.constexpr):
    """A number as a 0-d tensor: from device memory where there is a pointer, else the argument itself."""
    number = tl.full((), value, dtype)
    if pointer is not None:
        number = tl.load(pointer).to(dtype)
    return number


def numbers_or_pointers(device: torch.device, *values: float | Tensor) -> list[float | Tensor | None]:
    """`value` and `pointer` of `read`, for each. A tensor on `device` is read there, so that nothing here waits for it
    and a captured graph sees it change; one on the CPU is read here, where that is free."""
    pairs: list[float | Tensor | None] = []
    for value in values:
        if not isinstance(value, Tensor):
            pairs += [float(value), None]
        else:
            pairs += [0.0, value] if value.device == device else [value.item(), None]
    return pairs


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
