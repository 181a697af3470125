"""Loads the compiled libraries, and remembers why one cannot be used: the PyTorch reference then does the work."""

from __future__ import annotations

import importlib
import json
import platform
import re
import struct
import warnings
from collections.abc import Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # first: the libraries are linked to what this loads

MINIMUM_TORCH = (2, 10)
PACKAGE = Path(__file__).resolve().parent


def check_torch(version: str) -> None:
    """Raises ImportError for a PyTorch older than the stable ABI that the libraries are built for."""
    release = re.match(r"(\d+)\.(\d+)", version)
    if release and tuple(map(int, release.groups())) < MINIMUM_TORCH:
        raise ImportError(
            f"mla_ext needs PyTorch >= 2.10, but {version} is installed; run `pip install --upgrade torch`"
        )


def read_facts() -> dict[str, Any]:
    """What CMakeLists.txt wrote beside the libraries that it built; nothing before a build, or where it is damaged."""
    try:
        written: dict[str, Any] = json.loads((PACKAGE / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return written


def remedy() -> str:
    checkout = PACKAGE.parent
    if (checkout / "CMakeLists.txt").is_file():
        return f"run `pip install -e {checkout}`, or start Python in another folder where mla_ext is installed"
    return "install mla_ext again in this environment, from its source"


def describe(failure: Exception) -> str:
    """Why a library could not be loaded: what it was built for, what is here, and what to do."""

    def environment(python: str, pytorch: str, cuda: str | None, where: str) -> str:
        return f"Python {python}, PyTorch {pytorch}, {f'CUDA {cuda}' if cuda else 'no CUDA'} on {where}"

    built = environment(facts["python"], facts["torch"], " and ".join(facts["cuda"]), facts["platform"])
    where = f"{platform.system()} {platform.machine()}"
    here = environment(platform.python_version(), torch.__version__, torch.version.cuda, where)
    cause = failure.__cause__ or failure  # PyTorch hides what the linker says
    return f"its library was built for {built}, this is {here}, and loading it failed ({cause}); {remedy()}"


def check_whole(library: Path) -> None:
    """Raises OSError for a missing library, or one whose end is missing: loading that would kill the process."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) == 64 and header.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little endian; its last part is a table
        (table,), (entry, entries) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
        if library.stat().st_size < table + entry * entries:
            raise OSError(f"{library} is cut short")


def load() -> tuple[ModuleType | None, str | None]:
    """The module `_C` with the CPU operations, or why it cannot be loaded."""
    if not facts:
        reason = f"{PACKAGE} holds no compiled library with its _build.json; {remedy()}"
    else:
        try:
            check_whole(PACKAGE / f"_C{EXTENSION_SUFFIXES[0]}")
            return importlib.import_module("mla_ext._C"), None
        except (ImportError, OSError) as failure:
            reason = describe(failure)
    warnings.warn(f"mla_ext runs on its slower PyTorch reference: {reason}", RuntimeWarning, stacklevel=2)
    return None, reason


def choose_cuda(versions: Iterable[str], pytorch: str | None) -> str | None:
    """Which of these versions of CUDA is of the same major version as PyTorch's, so that its library can be loaded."""
    major = (pytorch or "").partition(".")[0]
    return next((version for version in versions if version.partition(".")[0] == major), None)


def load_cuda() -> str | None:
    """Loads the CUDA operations; why they cannot be used, where that is so."""
    if load_error is not None:
        return load_error
    if not facts["cuda"]:
        return f"mla_ext was built without CUDA ({facts['cuda_reason']})"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a build without CUDA"
    if cuda is None:
        built, here = " and ".join(facts["cuda"]), f"PyTorch {torch.__version__} for CUDA {torch.version.cuda}"
        return f"mla_ext has CUDA kernels for CUDA {built}, and this is {here}"
    try:
        library = PACKAGE / f"_C_cuda{cuda.partition('.')[0]}.so"
        check_whole(library)
        torch.ops.load_library(library)
        return None
    except OSError as failure:
        reason = describe(failure)
    warnings.warn(f"mla_ext runs without its CUDA kernels: {reason}", RuntimeWarning, stacklevel=2)
    return reason


check_torch(torch.__version__)
facts = read_facts()
module, load_error = load()
cuda = choose_cuda(facts.get("cuda", {}), torch.version.cuda)  # of the library for this PyTorch; None: there is none
cuda_load_error = load_cuda()
