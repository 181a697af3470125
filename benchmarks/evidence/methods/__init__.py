"""The methods that are compared: what each one's head is and what its steps minimise. A file for each idea.

Definitions follow the papers, and the methods' own code for what a paper leaves open, as far as they go for any number
of modalities; where they do not, the docstring says what was made of them. All of them get the same encoders, one per
modality, of `width` features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mla_ext import MultimodalData, calibrate
from mla_ext.multimodal.late import LateFusionModel
from mla_ext.multimodal.model import MultimodalModel

from .alternation import (
    MeanFused,
    build_adamw,
    build_alternating,
    build_mla,
    build_mla_adamw,
    build_mla_before,
    build_mla_fixed,
    build_mla_forget,
    build_mla_rank,
    build_mla_update,
    build_released,
    build_slow_head,
)
from .amst import build_amst
from .cggm import build_cggm
from .common import ALPHA, BATCH_SIZE, Build, Setting
from .dgl import build_dgl
from .fusion import BiGated, FiLM, Sum, build_concat, build_heads, build_probed
from .igm import build_igm
from .mmin import build_mmin
from .mmpareto import build_mmpareto
from .ogm_ge import build_ogm_ge
from .qmf import build_qmf
from .reconboost import build_reconboost

__all__ = ["ALPHA", "BATCH_SIZE", "METHODS", "MeanFused", "Method", "Setting", "build_mla"]


@dataclass(frozen=True)
class Method:
    """A row of the tables."""

    title: str
    build: Build
    unimodal: str  # where its per-modality accuracies come from
    own: str | None = None  # the hyperparameter that it has beside those of SGD
    candidates: tuple[float, ...] = ()
    default: float | None = None  # what `own` is where nobody chooses it: its authors' value, if they have one
    together: bool = False  # whether runs can be trained side by side, see `together`
    finish: Callable[[MultimodalModel, MultimodalData], object] | None = None  # after the training, on validation data


HEAD, COLUMNS = "the modality's head", "the modality's columns of the head, plus b/M"
PROBE, SHARED = "a linear probe of its features", "the shared head"
ALPHAS = ("alpha", (0.001, 0.01, 0.1, 10.0), ALPHA)
FIXED_ALPHAS = ("alpha", (0.01, 1.0, 100.0, 10000.0), ALPHA)

METHODS = {
    "sum": Method("Sum", build_heads(Sum), HEAD, together=True),
    "concat": Method("Concat", build_concat, COLUMNS, together=True),
    "late": Method("Late fusion", build_heads(LateFusionModel), HEAD, together=True),
    "film": Method("FiLM", build_probed(FiLM), PROBE, together=True),
    "bigated": Method("BiGated", build_probed(BiGated), PROBE, together=True),
    "ogm-ge": Method("OGM-GE", build_ogm_ge, COLUMNS, "alpha", (0.1, 0.3, 0.5, 0.8), 0.3),
    "qmf": Method("QMF", build_qmf, HEAD, "rank weight", (0.1, 0.3, 1.0, 3.0), 0.1),
    "mmin": Method("MMIN", build_mmin, "the model, all others missing", "imagination weight", (1, 4, 16, 64), 4),
    "mmpareto": Method("MMPareto", build_mmpareto, HEAD, "gamma", (1.0, 1.5, 2.0, 3.0), 1.5),
    "cggm": Method("CGGM", build_cggm, PROBE, "lambda", (0.1, 0.2, 0.5, 1.0), 0.2),
    "dgl": Method("DGL", build_dgl, COLUMNS, "alpha", (1.0, 2.0, 4.0, 8.0), 4.0),
    "alternating": Method("Alternation alone", build_alternating, SHARED, together=True),
    "alternating-calibrated": Method(
        "Alternation, calibrated fusion", build_alternating, SHARED, together=True, finish=calibrate
    ),
    "adamw": Method("Alternation, AdamW, lr/10", build_adamw, SHARED),
    "slow-head": Method(
        "Alternation, slower head", build_slow_head, SHARED, "head's lr", (0.3, 0.1, 0.03, 0.01), 0.1, together=True
    ),
    "amst": Method("AMST", build_amst, SHARED, "skip factor", (2, 4, 6, 10), 4),
    "reconboost": Method("ReconBoost", build_reconboost, SHARED, "lambda", (0.1, 0.2, 0.5, 1.0), 0.2),
    "igm": Method("IGM", build_igm, SHARED, "tau", (0.1, 0.4, 1.6, 6.4), 0.4),
    "released": Method("Released code, projection on", build_released, SHARED),
    "mla": Method("MLA", build_mla, SHARED, *ALPHAS, together=True),
    "mla-calibrated": Method("MLA, calibrated fusion", build_mla, SHARED, *ALPHAS, together=True, finish=calibrate),
    "mla-fixed": Method("MLA, fixed alpha", build_mla_fixed, SHARED, *FIXED_ALPHAS, together=True),
    "mla-rank": Method("MLA, rank form", build_mla_rank, SHARED, *ALPHAS),
    "mla-before": Method("MLA, absorb before", build_mla_before, SHARED, *ALPHAS, together=True),
    "mla-update": Method("MLA, update projected", build_mla_update, SHARED, *ALPHAS),
    "mla-adamw": Method("MLA, AdamW, lr/10", build_mla_adamw, SHARED, *ALPHAS),
    "mla-forget": Method(
        "MLA, forget", build_mla_forget, SHARED, "forget", (1e-3, 1e-2, 1e-1, 3e-1), 1e-2, together=True
    ),
    "sum-shared": Method("Sum, one shared head", build_heads(Sum, shared=True), SHARED, together=True),
    "late-shared": Method(
        "Late fusion, one shared head", build_heads(LateFusionModel, shared=True), SHARED, together=True
    ),
}
