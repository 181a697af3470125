"""MLA for PyTorch: gradient-projected optimisation of a shared head, and entropy fusion of its modalities.

Multimodal Representation Learning by Alternating Unimodal Adaptation (CVPR 2024, arXiv 2311.10707).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

from . import _library  # noqa: F401  # first: it says what is wrong with PyTorch
from .adamw import ProjectedAdamW
from .info import build_info
from .layers import find_heads
from .ops import calibrated_fusion, entropy_fusion
from .optimizer import ProjectedSGD

if TYPE_CHECKING:
    from .multimodal.calibration import calibrate
    from .multimodal.data import MultimodalData, digits
    from .multimodal.evaluate import evaluate, predict
    from .multimodal.files import load_folder, load_npz
    from .multimodal.fit import fit
    from .multimodal.model import ConcatModel, MultimodalModel, SharedHeadModel

# Loaded when first used: who wants the optimizer does not wait for data and training.
_HOME = {
    "ConcatModel": "multimodal.model",
    "MultimodalData": "multimodal.data",
    "MultimodalModel": "multimodal.model",
    "SharedHeadModel": "multimodal.model",
    "calibrate": "multimodal.calibration",
    "digits": "multimodal.data",
    "evaluate": "multimodal.evaluate",
    "fit": "multimodal.fit",
    "load_folder": "multimodal.files",
    "load_npz": "multimodal.files",
    "predict": "multimodal.evaluate",
}

__all__ = [
    "ConcatModel",
    "MultimodalData",
    "MultimodalModel",
    "ProjectedAdamW",
    "ProjectedSGD",
    "SharedHeadModel",
    "__version__",
    "build_info",
    "calibrate",
    "calibrated_fusion",
    "digits",
    "entropy_fusion",
    "evaluate",
    "find_heads",
    "fit",
    "load_folder",
    "load_npz",
    "predict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOME.keys())
