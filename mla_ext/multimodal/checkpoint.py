"""Files that are whole or absent: written to a temporary name, flushed to the disk and moved into place."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

_KEYS = {"settings", "epoch", "model", "optimizer", "scheduler", "history", "best"}  # of a checkpoint


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
    write_atomic(path, lambda file: torch.save(content, file))


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    OSError if the file cannot be opened, ValueError if it is not a whole checkpoint of a run.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:  # torch.load reads past damaged bytes: it ignores the checksums
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} in it is damaged")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in any way
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{path}: expected a checkpoint of a training run, got a file that is none: {reason}"
            ) from error
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise ValueError(f"{path}: expected a checkpoint of a training run, got another file of torch.save")
    return content
