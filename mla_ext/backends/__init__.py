"""The backends, one module each with the same functions; `choose` picks one for a device.

A backend module has `unusable(device) -> str | None` (why it cannot run there) and the in-place functions
`feature_mean`, `rls_update_`, `head_step_` and `entropy_fusion`, called with checked, contiguous arguments.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import cpu, cuda, reference, triton

# In the order "auto" prefers them.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}


def choose(name: str, device: torch.device) -> ModuleType:
    """The backend of that name, or with "auto" the first usable one.

    Raises ValueError for an unknown name, RuntimeError with the reason for one that cannot run on `device`.
    """
    if name == "auto":
        return next(backend for backend in BACKENDS.values() if backend.unusable(device) is None)
    if name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    reason = BACKENDS[name].unusable(device)
    if reason is not None:
        raise RuntimeError(f"backend: {name!r} cannot run for a tensor on {device}: {reason}")
    return BACKENDS[name]


def usable(device: torch.device) -> list[str]:
    """Names of the backends that run on `device`, best first."""
    return [name for name, backend in BACKENDS.items() if backend.unusable(device) is None]
