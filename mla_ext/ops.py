"""The operations of the method as functions: arguments checked once, then handed to a backend.

Shapes: N samples, s features, C classes, M modalities. `backend` is "auto" (the compiled kernels for the tensor's
device where they can run, else the next best) or a name from `build_info()["backends"]`; one that cannot run raises
RuntimeError. Wrong types raise TypeError, wrong shapes, devices and values ValueError, before anything is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .pending import Pending
from .reference import Hyperparameters

__all__ = ["Hyperparameters", "entropy_fusion", "feature_mean", "head_step_", "rls_update_"]


@torch.no_grad()
def feature_mean(features: Tensor, backend: str = "auto") -> Tensor:
    """h̄, the mean of features (N, s) over the batch (eq. 4): (s,) in float32, float64 for float64."""
    checks.check_tensor("features", features, ("N", "s"))
    checks.check_nonempty("features", features)
    return backends.choose(backend, features.device).feature_mean(features.contiguous())


@torch.no_grad()
def rls_update_(
    projection: Tensor,
    feature_mean: Tensor,
    alpha: float | Tensor = 0.1,
    forget: float | Tensor = 0.0,
    normalize: bool = False,
    backend: str = "auto",
) -> None:
    """Absorb feature_mean h̄ (s,) into projection P (s, s), in place: `reference.rls_update` (eq. 4-5)."""
    checks.check_rls_update(projection, feature_mean)
    checks.check_hyperparameters(Hyperparameters(alpha=alpha, forget=forget, normalize=normalize))
    chosen = backends.choose(backend, projection.device)
    P = projection.contiguous()
    chosen.rls_update_(P, feature_mean.contiguous(), alpha, forget, normalize)
    _write_back((projection, P))


@torch.no_grad()
def head_step_(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    projection: Tensor,
    feature_mean: Tensor | None,
    step: Tensor,
    hyper: Hyperparameters,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of the shared head, in place on weight, momentum_buffer, projection and step: `reference.head_step`.

    weight, grad (C, s); momentum_buffer (C, s) float32 (float64 for float64) or None without momentum; projection
    (s, s) and feature_mean (s,) or None in that dtype too; step 0-d float32, 0 before momentum_buffer's first update.
    grad_scale: one float32 that divides grad; found_inf: one float32, and unless it is 0 nothing changes.
    """
    checks.check_hyperparameters(hyper)
    checks.check_head_step(weight, grad, momentum_buffer, projection, feature_mean, step, hyper)
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if value is not None:
            checks.check_tensor(name, value, (), (torch.float32,), weight.device)
    run_head_step_(weight, grad, momentum_buffer, projection, feature_mean, step, hyper, grad_scale, found_inf, backend)


def run_head_step_(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    projection: Tensor,
    feature_mean: Tensor | None,
    step: Tensor,
    hyper: Hyperparameters,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str,
    pending: Pending | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> None:
    """`head_step_` on arguments that are already checked, with gradients disabled.

    For the backend "cpu" alone: `pending` lets the update of P wait, and belongs to this projection; `factors` are
    features (N, s) and output_grad (N, C) with grad = output_gradᵀ features, which give G P by a smaller product.
    """
    chosen = backends.choose(backend, weight.device)
    W, P = weight.contiguous(), projection.contiguous()
    M = None if momentum_buffer is None else momentum_buffer.contiguous()
    h = None if feature_mean is None else feature_mean.contiguous()
    extras = {} if pending is None and factors is None else {"pending": pending, "factors": factors}
    chosen.head_step_(W, grad.contiguous(), M, P, h, step, hyper, grad_scale, found_inf, **extras)
    _write_back((weight, W), (projection, P), (momentum_buffer, M))


@torch.no_grad()
def entropy_fusion(logits: Tensor, present: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Fuse logits (M, N, C) sample by sample, each modality weighted by its certainty (eq. 7-9).

    present: bool (M, N), False where sample n lacks modality m; None when all are there. Returns the fused logits
    (N, C) in the dtype of logits and the weights λ (M, N) in float32 (float64 for float64), which sum to 1 over the
    present modalities. A sample without any modality gets zeros. A test-time operation: no gradient flows through it.
    """
    checks.check_tensor("logits", logits, ("M", "N", "C"))
    M, N, C = logits.shape
    if M == 0 or C == 0:
        raise ValueError(f"logits: expected at least one modality and one class, got {checks.describe(logits)}")
    if present is not None:
        checks.check_tensor("present", present, (M, N), (torch.bool,), logits.device)
        present = present.contiguous()
    return backends.choose(backend, logits.device).entropy_fusion(logits.contiguous(), present)


def _write_back(*pairs: tuple[Tensor | None, Tensor | None]) -> None:
    """Non-contiguous tensors were updated in a contiguous copy."""
    for original, used in pairs:
        if original is not used:
            original.copy_(used)
