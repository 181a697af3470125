"""The device that trains, and mixed precision: autocast, and a loss that is scaled where float16 would underflow."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..links import see

__all__ = ["AMP", "Precision", "choose_device"]

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NO_GPU = see("troubleshooting#a-gpu-that-does-not-work")


class Precision:
    """`amp` None, "bf16" or "fp16" on a device. Weights, P and the optimizer's state keep their dtype."""

    def __init__(self, amp: str | None, device: torch.device) -> None:
        if amp is not None and amp not in AMP:
            raise ValueError(f"amp: expected None, 'bf16' or 'fp16', got {amp!r}")
        self.amp, self.device = amp, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self) -> torch.autocast:
        """In which the model's forward pass and its loss are computed."""
        dtype = None if self.amp is None else AMP[self.amp]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter], clip_grad_norm: float | None) -> None:
        """Clip the gradients, if asked, and step; not where they overflowed in float16."""
        if clip_grad_norm is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
        self.scaler.step(optimizer)
        self.scaler.update()


def choose_device(name: str | torch.device) -> torch.device:
    """The device of that name. "auto" is the GPU of this process if there is one that works, else the CPU.

    "cuda" without a number is the GPU of this process: the one numbered LOCAL_RANK, which torchrun sets, or the first.
    ValueError for a device that cannot be used; where "auto" meets one it warns and takes the CPU.
    """
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        device = torch.device("cuda" if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only CPUs and CUDA GPUs are tried")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.ones(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        if name != "auto":
            raise ValueError(f"device: expected one that works here, got {str(name)!r}: {reason}{_NO_GPU}") from error
        warnings.warn(f"the GPU does not work, training on the CPU: {reason}{_NO_GPU}", stacklevel=2)
        return torch.device("cpu")
    return device
