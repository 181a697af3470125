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

from .links import see

MINIMUM_TORCH = (2, 4)
KERNELS_TORCH = (2, 10)  # the first whose stable ABI has all that the libraries use
PACKAGE = Path(__file__).resolve().parent
_MORE = see("install#when-something-is-missing")


def is_older(version: str, minimum: tuple[int, int]) -> bool:
    """Whether a version of PyTorch, as in torch.__version__, is below major.minor; False for one that has neither."""
    release = re.match(r"(\d+)\.(\d+)", version)
    return release is not None and tuple(map(int, release.groups())) < minimum


def check_torch(version: str) -> None:
    """Raises ImportError for a PyTorch that lacks what the Python part uses."""
    if is_older(version, MINIMUM_TORCH):
        raise ImportError(
            f"mla_ext needs PyTorch >= 2.4, but {version} is installed; run `pip install --upgrade torch`" + _MORE
        )


def read_facts() -> dict[str, Any]:
    """What the build noted beside the libraries; nothing before a build, or where it is damaged or older."""
    try:
        written: Any = json.loads((PACKAGE / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) and isinstance(written.get("cuda", {}), dict) else {}


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


def nothing_to_load(facts: dict[str, Any], version: str) -> str | None:
    """Why no library is even tried in this version of PyTorch; None where one should be there."""
    if is_older(version, KERNELS_TORCH):
        upgrade = "run `pip install --upgrade torch`"
        if "torch" not in facts:
            upgrade += f", then {remedy()}"
        return f"the compiled kernels need PyTorch >= 2.10, and {version} is installed; {upgrade}"
    if "missing" in facts:  # setup.py's note
        return f"it was installed without its compiled kernels: {facts['missing'].rstrip('.')}, then {remedy()}"
    if not facts:
        return f"{PACKAGE} holds no compiled library with its _build.json; {remedy()}"
    return None


def load() -> tuple[ModuleType | None, str | None]:
    """The module `_C` with the CPU operations, or why it cannot be loaded."""
    reason = nothing_to_load(facts, torch.__version__)
    if reason is None:
        try:
            check_whole(PACKAGE / f"_C{EXTENSION_SUFFIXES[0]}")
            return importlib.import_module("mla_ext._C"), None
        except (ImportError, OSError) as failure:
            reason = describe(failure)
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
    warnings.warn(f"mla_ext runs without its CUDA kernels: {reason}{_MORE}", RuntimeWarning, stacklevel=2)
    return reason


check_torch(torch.__version__)
facts = read_facts()
module, load_error = load()
cuda = choose_cuda(facts.get("cuda", {}), torch.version.cuda)  # of the library for this PyTorch; None: there is none
cuda_load_error = load_cuda()
_said: set[str] = set()


def say_once(device_type: str) -> None:
    """Warns that the reference does the work of the kernels for such a device: when it first does, not at import."""
    reason = {"cpu": load_error, "cuda": cuda_load_error}.get(device_type)
    if reason is not None and device_type not in _said:
        _said.add(device_type)
        warnings.warn(f"mla_ext runs on its slower PyTorch reference: {reason}{_MORE}", RuntimeWarning, stacklevel=3)
