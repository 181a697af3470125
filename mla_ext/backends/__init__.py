"""The backends, one file each, found by being there; `choose` picks one for a device.

Another package adds one by an entry point of the group "mla_ext.backends" that names its `Backend` class.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from importlib.metadata import entry_points

import torch

from .. import _library
from .base import Backend

__all__ = ["BACKENDS", "Backend", "choose", "usable"]


def _found() -> Iterator[type[Backend]]:
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f".{file.name}", __name__)
        for cls in vars(module).values():
            is_backend = inspect.isclass(cls) and issubclass(cls, Backend) and not inspect.isabstract(cls)
            if is_backend and cls.__module__ == module.__name__:
                yield cls
    for entry in entry_points(group="mla_ext.backends"):
        yield entry.load()


# In the order "auto" prefers them.
BACKENDS: dict[str, Backend] = {
    cls.name: cls() for cls in sorted(_found(), key=lambda cls: cls.preference, reverse=True)
}


def check_name(name: str) -> None:
    """Raises ValueError for a name that no backend has."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def choose(name: str, device: torch.device) -> Backend:
    """The backend of that name, or with "auto" the first usable one.

    Raises ValueError for an unknown name, RuntimeError with the reason for one that cannot run on `device`.
    """
    if name == "auto":
        chosen = next(backend for backend in BACKENDS.values() if backend.unusable(device) is None)
        if chosen.name == "reference" and not torch.compiler.is_compiling():
            _library.say_once(device.type)
        return chosen
    check_name(name)
    reason = BACKENDS[name].unusable(device)
    if reason is not None:
        raise RuntimeError(f"backend: {name!r} cannot run for a tensor on {device}: {reason}")
    return BACKENDS[name]


def usable(device: torch.device) -> list[str]:
    """Names of the backends that run on `device`, best first."""
    return [name for name, backend in BACKENDS.items() if backend.unusable(device) is None]
