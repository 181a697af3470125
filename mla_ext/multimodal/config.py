"""Configuration files: the options of `mla-ext train` in TOML, read and written."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__

__all__ = ["CONFIG", "read", "text"]

CONFIG = "config.toml"


def read(path: Path, known: Collection[str]) -> list[str]:
    """The options of a file as arguments of the command line, which checks their values.

    A key is the name of an option, such as batch_size; tables only group them. true and false turn a switch on and
    off; an option that may be repeated takes a list. ValueError, with the file, for what is no TOML or no option in
    `known`; ImportError, before Python 3.11, without tomli.
    """
    with path.open("rb") as file:
        try:
            content = _loads(file.read().decode())
        except ValueError as error:  # of TOML, and of UTF-8
            raise ValueError(f"--config: {path}: expected TOML: {error}") from error
    values: dict[str, Any] = {}
    for key, value in content.items():
        values |= value if isinstance(value, dict) else {key: value}
    arguments = []
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"--config: {path}: expected options of `mla-ext train`, got {key!r}")
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    return arguments


def text(tables: Mapping[str, Mapping[str, Any]], notes: Mapping[str, Any]) -> str:
    """The options of a run as a file for `read`, and in comments what else made its results. None is left out."""
    facts = {"mla_ext": __version__, "torch": torch.__version__, "python": platform.python_version(), **notes}
    lines = [f"# mla-ext train --config {CONFIG}", *(f"# {name}: {value}" for name, value in facts.items())]
    for table, values in tables.items():
        lines += ["", f"[{table}]"]
        # What these values are in JSON they are in TOML.
        lines += [f"{key} = {json.dumps(v, ensure_ascii=False)}" for key, v in values.items() if v is not None]
    return "\n".join(lines) + "\n"


def _loads(content: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise ImportError("--config needs Python 3.11 or newer, or tomli: pip install tomli") from error
    loaded: dict[str, Any] = tomllib.loads(content)
    return loaded
