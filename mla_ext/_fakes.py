"""What the compiled ops return, by shape and dtype alone: torch.compile and torch.export trace with these."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import accumulate_dtype


def register() -> None:
    """Once the library with the ops is loaded."""
    torch.library.register_fake("mla_ext::feature_mean", _feature_mean)
    torch.library.register_fake("mla_ext::rls_update_", _in_place)
    torch.library.register_fake("mla_ext::head_step_", _in_place)
    torch.library.register_fake("mla_ext::settle_", _in_place)
    torch.library.register_fake("mla_ext::entropy_fusion", _entropy_fusion)


def _in_place(*args: object, **kwargs: object) -> None:
    return None


def _feature_mean(features: Tensor) -> Tensor:
    return features.new_empty(features.shape[1], dtype=accumulate_dtype(features.dtype))


def _entropy_fusion(
    logits: Tensor, present: Tensor | None, temperatures: Tensor | None = None, equal: bool = False
) -> tuple[Tensor, Tensor]:
    M, N, C = logits.shape
    return logits.new_empty(N, C), logits.new_empty(M, N, dtype=accumulate_dtype(logits.dtype))
