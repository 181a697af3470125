"""The step of the parameters without a projection: torch.optim.SGD's, on CPUs in one pass with the same bits."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.sgd import sgd

from . import backends
from .checks import describe, has_momentum
from .reference import Hyperparameters
from .step import PlainStep

__all__ = ["check_plain_step", "plain_step"]

OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


def plain_step(
    state: MutableMapping[Tensor, dict[str, Any]],
    group: dict[str, Any],
    params: list[Tensor],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Steps `params`, which all have a gradient, exactly as torch.optim.SGD does with the options of `group`.

    d ← g + λw, b ← μb + (1−τ)d (at first b ← d), w ← w − ηb; with Nesterov's momentum w ← w − η(d + μb).

    Dense tensors of float32 and float64 in CPU memory take one pass of a compiled kernel, unless the group asks for
    `foreach` or `fused`. All others take PyTorch's own code; on GPUs its fused kernel, unless the group asks otherwise.

    Args:
        state: the optimizer's state. "momentum_buffer" is kept as torch.optim.SGD keeps it.
        group: the parameter group, with the hyperparameters.
        grad_scale, found_inf: of torch.amp.GradScaler, with one element each. Gradients are divided by the scale, as
            GradScaler leaves them; where `found_inf` is not 0 nothing changes.
    """
    if not params:
        return
    buffers = (
        [state.get(param, {}).get("momentum_buffer") for param in params] if has_momentum(group["momentum"]) else []
    )
    grads: list[Any] = [param.grad for param in params]
    fused = _takes_fused(group, params, grads, found_inf is not None)
    is_new = [buffer is None for buffer in buffers]
    first_step = any(is_new)
    if first_step and not all(is_new) and (fused or not group["foreach"]):  # foreach has a way of its own for a mixture
        for new in (False, True):
            some = [param for param, its in zip(params, is_new, strict=True) if its is new]
            plain_step(state, group, some, grad_scale, found_inf)
        return

    # Nobody waits for a GPU, except where the fused kernel would leave new buffers uninitialised.
    if found_inf is not None and (first_step or not fused) and found_inf.item():
        return
    if fused:
        _step_by_torch(group, params, grads, buffers, True, grad_scale, found_inf)
    else:
        scale = 1.0 if grad_scale is None else grad_scale.item()
        if not _step_in_kernel(group, params, grads, buffers, first_step, scale):
            if scale != 1:
                grads = [grad / scale for grad in grads]
            _step_by_torch(group, params, grads, buffers, False, None, None)
            if scale != 1:
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
    if first_step:
        for param, buffer in zip(params, buffers, strict=True):
            state[param]["momentum_buffer"] = buffer


def check_plain_step(state: Mapping[Tensor, dict[str, Any]], group: dict[str, Any], params: list[Tensor]) -> None:
    """Raises what would make a step of `params` fail halfway: TypeError for a gradient, ValueError for a buffer."""
    for param in params if group["fused"] or group["weight_decay"] != 0 else ():
        if param.grad is not None and param.grad.is_sparse:
            what = describe(param.grad)
            raise TypeError(f"grad: expected a dense tensor with weight_decay or fused=True, got {what}")
    for param in params if has_momentum(group["momentum"]) else ():
        buffer = state.get(param, {}).get("momentum_buffer")
        if buffer is not None and (buffer.shape != param.shape or buffer.device != param.device):
            raise ValueError(f"momentum_buffer: expected one for {describe(param)}, got {describe(buffer)}")


def _takes_fused(group: dict[str, Any], params: list[Tensor], grads: list[Tensor], scaled: bool) -> bool:
    """Whether PyTorch's fused kernel makes the step. Only that one reads scale, overflow and lr where they are."""
    if group["fused"]:
        return True
    if torch.compiler.is_compiling():
        return scaled and not any(grad.is_sparse for grad in grads)
    if not params[0].is_cuda:
        return False
    takes = all(p.is_cuda and p.is_floating_point() and not g.is_sparse for p, g in zip(params, grads, strict=True))
    return takes and (scaled or group["capturable"] or (group["foreach"] is None and group["fused"] is None))


def _step_in_kernel(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    first_step: bool,
    scale: float,
) -> bool:
    """Makes the step in the compiled kernel. False, and nothing has changed, where that cannot.

    Fills `buffers` in the first step.
    """
    if group["foreach"] or torch.compiler.is_compiling():
        return False
    new_buffers: list[Tensor | None] = [*map(torch.empty_like, params)] if first_step else buffers
    hyper = Hyperparameters(*(group[name] for name in OPTIONS))
    step = PlainStep(params, grads, new_buffers, first_step, hyper, scale)
    done = backends.choose("auto", params[0].device).step_([step], [])
    if done:
        increment_version(params)  # as any in-place op does; what autograd saved is then known to be stale
        buffers[:] = new_buffers
    return done


def _step_by_torch(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    fused: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    sgd(
        params,
        grads,
        buffers,
        has_sparse_grad=any(grad.is_sparse for grad in grads),
        foreach=None if fused else group["foreach"],
        fused=True if fused else group["fused"],
        grad_scale=grad_scale,
        found_inf=found_inf,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )
