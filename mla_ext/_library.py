"""Loads the compiled libraries, and remembers why one cannot be used: the PyTorch reference then does the work."""

from __future__ import annotations

import importlib
import json
import platform
import re
import warnings
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
    """What CMakeLists.txt wrote beside the libraries that it built; nothing before a build."""
    try:
        return json.loads((PACKAGE / "_build.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def remedy() -> str:
    checkout = PACKAGE.parent
    if (checkout / "CMakeLists.txt").is_file():
        return f"run `pip install -e {checkout}`"
    return "install mla_ext again in this environment, from its source"


def describe(failure: Exception) -> str:
    """Why a library could not be loaded: what it was built for, what is here, and what to do."""
    built = f"Python {facts['python']}, PyTorch {facts['torch']} on {facts['platform']}"
    here = (
        f"Python {platform.python_version()}, PyTorch {torch.__version__} on {platform.system()} {platform.machine()}"
    )
    return f"its library was built for {built}, this is {here}, and loading it failed ({failure}); {remedy()}"


def load() -> tuple[ModuleType | None, str | None]:
    """The module `_C` with the CPU operations, or why it cannot be loaded."""
    if not facts:
        reason = f"{PACKAGE} holds no compiled library; {remedy()}"
    else:
        try:
            return importlib.import_module("mla_ext._C"), None
        except ImportError as failure:
            reason = describe(failure)
    warnings.warn(f"mla_ext runs on its slower PyTorch reference: {reason}", RuntimeWarning, stacklevel=2)
    return None, reason


def load_cuda() -> str | None:
    """Loads the CUDA operations; why they cannot be used, where that is so."""
    if load_error is not None:
        return load_error
    if facts.get("cuda") is None:
        return f"mla_ext was built without CUDA ({facts.get('cuda_reason')})"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a build without CUDA"
    try:
        torch.ops.load_library(PACKAGE / "_C_cuda.so")
        return None
    except OSError as failure:
        reason = describe(failure)
    warnings.warn(f"mla_ext runs without its CUDA kernels: {reason}", RuntimeWarning, stacklevel=2)
    return reason


check_torch(torch.__version__)
facts = read_facts()
module, load_error = load()
cuda_load_error = load_cuda()
