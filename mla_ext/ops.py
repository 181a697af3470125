"""The operations of the method as functions: arguments checked once, then handed to a backend.

Shapes: N samples, s features, C classes, M modalities. `backend` is "auto" (the compiled kernels for the tensor's
device where they can run, else the next best) or a name from `build_info()["backends"]`; one that cannot run raises
RuntimeError. Wrong types raise TypeError, wrong shapes, devices and values ValueError, before anything is changed.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import backends, checks, rules
from .backends import Backend
from .projection import Projection
from .reference import Hyperparameters, accumulate_dtype
from .step import HeadStep

__all__ = [
    "HeadStep",
    "Hyperparameters",
    "Projection",
    "calibrated_fusion",
    "entropy_fusion",
    "feature_mean",
    "head_step_",
    "rls_update_",
]


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
    projection: Tensor | Projection,
    feature_mean: Tensor | None,
    step: Tensor,
    hyper: Hyperparameters,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of the shared head, in place on weight, momentum_buffer, projection and step: `reference.head_step`.

    weight, grad (C, s); momentum_buffer (C, s) float32 (float64 for float64) or None without momentum; projection
    P (s, s), or a `Projection`, and feature_mean (s,) or None in that dtype too; step 0-d float32, 0 before
    momentum_buffer's first update. grad_scale: one float32 that divides grad; found_inf: one float32, and unless it is
    0 nothing changes.
    """
    P = projection if isinstance(projection, Projection) else Projection(base=projection)
    head_step = HeadStep(weight, grad, momentum_buffer, P, feature_mean, step, hyper, grad_scale, found_inf)
    checks.check_hyperparameters(hyper)
    checks.check_head_step(head_step)
    run_head_step_(head_step, backends.choose(backend, weight.device))


def run_head_step_(step: HeadStep, backend: Backend) -> None:
    """`head_step_` on arguments that are already checked, with gradients disabled."""
    operand = rules.operand_step(step)
    _run_contiguous(operand, backend)
    _write_back((step.weight, operand.weight))


def as_matrices(step: HeadStep) -> HeadStep:
    """The step with weight, grad and momentum_buffer as (C, s), as kernels take those of a convolution."""
    if step.weight.dim() == 2:
        return step
    weight, grad, momentum_buffer = (
        None if t is None else t.flatten(1) for t in (step.weight, step.grad, step.momentum_buffer)
    )
    assert weight is not None and grad is not None
    return dataclasses.replace(step, weight=weight, grad=grad, momentum_buffer=momentum_buffer)


def _run_contiguous(step: HeadStep, backend: Backend) -> None:
    P = step.projection
    written = (step.weight, step.momentum_buffer, P.base, P.rows)
    read = (step.grad, step.feature_mean)
    if all(tensor is None or tensor.is_contiguous() for tensor in (*written, *read)):
        return backend.head_step_(as_matrices(step))
    weight, momentum_buffer, base, rows, grad, feature_mean = (
        None if tensor is None else tensor.contiguous() for tensor in (*written, *read)
    )
    assert weight is not None and grad is not None
    used = Projection(base, P.beta, rows, P.count, P.nu)
    contiguous = dataclasses.replace(
        step, weight=weight, grad=grad, momentum_buffer=momentum_buffer, projection=used, feature_mean=feature_mean
    )
    backend.head_step_(as_matrices(contiguous))
    _write_back(*zip(written, (weight, momentum_buffer, base, rows), strict=True))


def entropy_fusion(
    logits: Tensor, present: Tensor | None = None, backend: str = "auto", temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fuse logits (M, N, C) sample by sample, each modality weighted by its certainty (eq. 7-9).

    present: bool (M, N), False where sample n lacks modality m; None when all are there. temperatures: (M,), finite
    and positive, on the CPU or the device of logits; modality m's logits are divided by T_m first. Their values are
    checked if they are on the CPU. Returns the fused logits (N, C) in the dtype of logits and the weights λ (M, N) in
    float32 (float64 for float64), which sum to 1 over the present modalities. A sample without any modality gets
    zeros. A test-time operation: no gradient flows through it.
    """
    return _fusion(logits, present, backend, temperatures, equal=False)


def calibrated_fusion(
    logits: Tensor, present: Tensor | None = None, backend: str = "auto", temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mean of logits_m / T_m over the modalities that are present: `entropy_fusion` with equal weights λ.

    Arguments, results and errors are as of `entropy_fusion`; `mla_ext.calibrate` finds temperatures.
    """
    return _fusion(logits, present, backend, temperatures, equal=True)


@torch.no_grad()
def _fusion(
    logits: Tensor, present: Tensor | None, backend: str, temperatures: Tensor | None, equal: bool
) -> tuple[Tensor, Tensor]:
    checks.check_tensor("logits", logits, ("M", "N", "C"))
    M, N, C = logits.shape
    if M == 0 or C == 0:
        raise ValueError(f"logits: expected at least one modality and one class, got {checks.describe(logits)}")
    if present is not None:
        checks.check_tensor("present", present, (M, N), (torch.bool,), logits.device)
        present = present.contiguous()
    if temperatures is not None:
        checks.check_temperatures(temperatures, M, logits.device)
        temperatures = temperatures.to(logits.device, accumulate_dtype(logits.dtype)).contiguous()
    return backends.choose(backend, logits.device).entropy_fusion(logits.contiguous(), present, temperatures, equal)


def _write_back(*pairs: tuple[Tensor | None, Tensor | None]) -> None:
    """Non-contiguous tensors were updated in a contiguous copy."""
    for original, used in pairs:
        if original is not None and used is not None and original is not used:
            original.copy_(used)
