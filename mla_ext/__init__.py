"""MLA for PyTorch: gradient-projected optimisation of a shared head, and entropy fusion of its modalities.

Multimodal Representation Learning by Alternating Unimodal Adaptation (CVPR 2024, arXiv 2311.10707).
"""

__version__ = "0.1.0"

from ._info import build_info
from .data import MultimodalData, digits, load_npz
from .model import ConcatModel, MultimodalModel, SharedHeadModel
from .ops import entropy_fusion
from .optimizer import ProjectedSGD
from .training import evaluate, fit, predict

__all__ = [
    "ConcatModel",
    "MultimodalData",
    "MultimodalModel",
    "ProjectedSGD",
    "SharedHeadModel",
    "__version__",
    "build_info",
    "digits",
    "entropy_fusion",
    "evaluate",
    "fit",
    "load_npz",
    "predict",
]
