"""The step of the parameters that are not attached: torch.optim.SGD's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .checks import has_momentum

__all__ = ["plain_step"]


def plain_step(
    state: Mapping[Tensor, dict[str, Any]],
    group: dict[str, Any],
    params: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Step `params` of `group`. Only torch's fused kernel reads scale, overflow and (eagerly) lr on the device."""
    fused = group["fused"]
    if found_inf is not None and any(param.grad.is_sparse for param in params):  # which its fused kernel cannot take
        if found_inf.item():
            return
        for param in params if grad_scale is not None else ():
            param.grad = param.grad / grad_scale
        grad_scale = found_inf = None
    elif found_inf is not None or (group["capturable"] and not torch.compiler.is_compiling()):
        fused = True
    if not fused:
        return _sgd(state, group, params, fused, None, None)
    # The fused kernel takes momentum buffers that are all there or all to be made; those it makes even on overflow,
    # and leaves them uninitialised.
    is_new = [state[param].get("momentum_buffer") is None for param in params]
    _sgd(state, group, [p for p, new in zip(params, is_new, strict=True) if not new], True, grad_scale, found_inf)
    if not (has_momentum(group["momentum"]) and any(is_new) and found_inf is not None and found_inf.item()):
        _sgd(state, group, [p for p, new in zip(params, is_new, strict=True) if new], True, grad_scale, found_inf)


def _sgd(
    state: Mapping[Tensor, dict[str, Any]],
    group: dict[str, Any],
    params: list[Tensor],
    fused: bool | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    buffers = [state[param].get("momentum_buffer") for param in params] if has_momentum(group["momentum"]) else []
    sgd(
        params,
        [param.grad for param in params],
        buffers,
        has_sparse_grad=any(param.grad.is_sparse for param in params),
        foreach=None if fused else group["foreach"],
        fused=fused,
        grad_scale=grad_scale,
        found_inf=found_inf,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )
    for param, buffer in zip(params, buffers, strict=False):
        state[param]["momentum_buffer"] = buffer
