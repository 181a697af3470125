"""What all kernels and their launchers share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Hyperparameters

__all__ = ["Tensors", "next_nu", "numbers_and_tensors", "on", "read"]


@triton.jit
def read(value, pointer, dtype: tl.constexpr):
    """A number as a 0-d tensor: from device memory where there is a pointer, else the argument itself."""
    number = tl.full((), value, dtype)
    if pointer is not None:
        number = tl.load(pointer).to(dtype)
    return number


@triton.jit
def next_nu(nu, squares, RATE: tl.constexpr):
    """`reference.next_nu`, given the ν so far and |h̄|²."""
    return tl.where(nu == 0, squares, nu + RATE * (squares - nu)).to(squares.dtype)


class Tensors(NamedTuple):
    """The hyperparameters that kernels read from device memory; None: its number is an argument of its own. (A number
    in a tuple would be a float32 to Triton.)"""

    lr: Tensor | None
    momentum: Tensor | None
    dampening: Tensor | None
    weight_decay: Tensor | None
    alpha: Tensor | None
    forget: Tensor | None


def numbers_and_tensors(hyper: Hyperparameters, device: torch.device) -> tuple[list[float], Tensors]:
    """`value` and `pointer` of `read`, in the order of `Tensors`. A tensor on `device` is read there, so that nothing
    here waits for it and a captured graph sees it change; one on the CPU is read here, where that is free."""
    values = [getattr(hyper, name) for name in Tensors._fields]
    tensors = Tensors(*(v if isinstance(v, Tensor) and v.device == device else None for v in values))
    return [float(v) if t is None else 0.0 for v, t in zip(values, tensors, strict=True)], tensors


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
