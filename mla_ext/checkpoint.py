"""Files that are whole or absent: written to a temporary name, flushed to the disk and moved into place."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Create or replace `path` by what `write(file)` writes; if it fails, the old file stays as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def save(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, lambda file: torch.save(content, file))


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. ValueError if the file is not a whole checkpoint of a run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from error
    if not isinstance(content, dict) or not {"settings", "best"} <= content.keys():
        raise ValueError(f"{path}: not a checkpoint of a training run")
    return content
