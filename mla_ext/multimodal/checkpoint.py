"""Files that are whole or absent: written to a temporary name, flushed to the disk and moved into place."""

from __future__ import annotations

import copy
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..head_state import DOES_NOT_FIT

__all__ = ["FORMAT", "load", "plain", "save", "write_atomic", "write_text"]

FORMAT = 2  # of what `fit` writes, its "format"; files without a number are format 1

_KEYS = {"settings", "epoch", "model", "optimizer", "scheduler", "history", "best"}  # of a checkpoint
_FOLDER = 0x10  # the bit in a zip entry's attributes; torch.load leaves the memory of a tensor with it uninitialised
_READABLE = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Create or replace `path` by what `write(file)` writes; if it fails, the old file stays as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:  # as of a full disk
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def save(path: Path, content: dict[str, Any]) -> None:
    """TypeError, before anything is written, for what `load` could not read back."""
    readable = plain(content)
    write_atomic(path, lambda file: torch.save(readable, file))


def plain(value: Any, name: str = "checkpoint") -> Any:
    """The value as `load` can read it: NumPy's numbers and arrays become Python's numbers and tensors.

    TypeError, by name, for an object that torch.load would not read with weights_only.
    """
    if isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor) or value is None or type(value) in _READABLE:
        return value
    if isinstance(value, dict):
        result = copy.copy(value) if type(value) in (dict, OrderedDict) else dict(value)  # with what torch notes on it
        result.clear()
        result.update({plain(key, f"a key of {name}"): plain(item, f"{name}[{key!r}]") for key, item in value.items()})
        return result
    if isinstance(value, list | tuple):
        items = [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if type(value) is set:
        return {plain(item, f"an item of {name}") for item in value}
    raise TypeError(
        f"{name}: expected numbers, strings, tensors, and lists and dicts of them, as only those can be read back "
        f"from a checkpoint, got {type(value).__name__} {value!r}"
    )


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    OSError if the file cannot be opened, ValueError if it is not a whole checkpoint of a run or its format is newer.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:  # torch.load reads past damaged bytes: it ignores the checksums
                damaged = archive.testzip()
                folders = [entry.filename for entry in archive.infolist() if entry.external_attr & _FOLDER]
            if damaged is not None or folders:
                raise ValueError(f"{damaged or folders[0]} in it is damaged")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in any way
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{path}: expected a checkpoint of a training run, got a file that is none: {reason}{DOES_NOT_FIT}"
            ) from error
    number = content.get("format", 1) if isinstance(content, dict) else 1
    if number not in range(1, FORMAT + 1):
        raise ValueError(f"{path}: expected a checkpoint of format 1 to {FORMAT}, got format {number!r}{DOES_NOT_FIT}")
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise ValueError(
            f"{path}: expected a checkpoint of a training run, got another file of torch.save{DOES_NOT_FIT}"
        )
    return content
