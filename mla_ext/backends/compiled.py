"""The compiled ops, of whichever device: what the backends "cpu" and "cuda" share."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _fakes, _library
from ..pending import Pending
from ..reference import Hyperparameters

if _library.load_error is None:
    _fakes.register()
    # The overloads themselves: finding them by the arguments takes half of a call's time.
    _feature_mean = torch.ops.mla_ext.feature_mean.default
    _rls_update_ = torch.ops.mla_ext.rls_update_.default
    _head_step_ = torch.ops.mla_ext.head_step_.default
    _fold_ = torch.ops.mla_ext.fold_.default
    _entropy_fusion = torch.ops.mla_ext.entropy_fusion.default


def feature_mean(features: Tensor) -> Tensor:
    return _feature_mean(features)


def rls_update_(projection: Tensor, feature_mean: Tensor, alpha: float, forget: float, normalize: bool) -> None:
    _rls_update_(projection, feature_mean, float(alpha), float(forget), normalize)


def head_step_(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    projection: Tensor,
    feature_mean: Tensor | None,
    step: Tensor,
    hyper: Hyperparameters,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    pending: Pending | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Only the CPU kernels take `pending` and `factors`, features (N, s) and output_grad (N, C) of grad."""
    lr, lr_tensor = _number_or_tensor(hyper.lr, weight.device)
    alpha, alpha_tensor = _number_or_tensor(hyper.alpha, weight.device)
    _head_step_(
        weight,
        grad,
        momentum_buffer,
        projection,
        feature_mean,
        step,
        lr,
        float(hyper.momentum),
        float(hyper.dampening),
        float(hyper.weight_decay),
        hyper.nesterov,
        hyper.maximize,
        alpha,
        hyper.absorb == "before",
        hyper.normalize,
        float(hyper.forget),
        grad_scale,
        found_inf,
        lr_tensor,
        alpha_tensor,
        *((None, None) if pending is None else (pending.rows, pending.count)),
        *((None, None) if factors is None else factors),
    )


def fold_(projection: Tensor, pending: Pending) -> None:
    _fold_(projection, pending.rows, pending.count)


def entropy_fusion(logits: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    return _entropy_fusion(logits, present)


def _number_or_tensor(value: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """A tensor on a GPU or in a graph is left to the kernel: nobody waits for it, or compiles its value in."""
    if isinstance(value, Tensor) and (value.device.type != "cpu" or torch.compiler.is_compiling()):
        return 0.0, value.to(device, torch.float32).reshape(())
    return float(value), None
