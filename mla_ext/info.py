"""What this installation was built with and can use."""

from __future__ import annotations

from typing import Any

import torch

from . import __version__, _library, backends

__all__ = ["build_info"]


def build_info() -> dict[str, Any]:
    """What mla_ext was built with, and what runs here.

    version: of mla_ext. torch, compiler: versions it was built with (None when nothing was compiled). cuda: the version
    of CUDA of the library for this PyTorch (None without one). archs: the GPU architectures in it. cpu_isa: the
    instruction set that the CPU kernels use on this machine. backends: names that the `backend` arguments take here,
    best first.
    """
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    return {
        "version": __version__,
        "torch": _library.facts.get("torch"),
        "cuda": _library.cuda,
        "archs": _library.facts["cuda"][_library.cuda] if _library.cuda else [],
        "cpu_isa": _library.module and _library.module.cpu_isa(),
        "compiler": _library.facts.get("compiler"),
        "backends": list(dict.fromkeys(name for device in reversed(devices) for name in backends.usable(device))),
    }
