"""Argument checks of the ops and the optimizer: a message names the argument, what was expected and what it was."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .links import see
from .projection import Projection
from .reference import Hyperparameters, accumulate_dtype
from .step import HeadStep

__all__ = [
    "WEIGHT_DTYPES",
    "check_adamw",
    "check_alpha_scale",
    "check_head_step",
    "check_hyperparameters",
    "check_nonempty",
    "check_number",
    "check_options",
    "check_projection",
    "check_rank",
    "check_rls_update",
    "check_scaling",
    "check_tensor",
    "check_weight",
    "check_writable",
    "describe",
    "fits",
    "has_momentum",
    "several",
]

WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WHICH_ALPHA = see("troubleshooting#which-alpha")
_WHICH_RANK = see("rank#what-it-gives-and-takes")


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r}"
    layout = "" if value.layout == torch.strided else f" {_name(value.layout)}"
    return f"a {tuple(value.shape)}{layout} {_name(value.dtype)} tensor on {value.device}"


def _name(of_torch: torch.dtype | torch.layout) -> str:
    return str(of_torch).removeprefix("torch.")


def fits(shape: torch.Size, wanted: tuple[int | str, ...]) -> bool:
    return shape == wanted or (
        len(shape) == len(wanted)
        and all(isinstance(size, str) or size == have for size, have in zip(wanted, shape, strict=True))
    )


def check_tensor(
    name: str,
    value: Any,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...] = WEIGHT_DTYPES,
    device: torch.device | None = None,
) -> None:
    """A strided tensor of this shape (a string names a free size), one of these dtypes, on this device.

    Raises TypeError for what is no strided tensor of such a dtype, ValueError for the wrong shape or device.
    """
    if (
        isinstance(value, Tensor)
        and fits(value.shape, shape)
        and value.dtype in dtypes
        and value.layout == torch.strided
        and (device is None or value.device == device)
    ):
        return  # the quick way for what is called every step
    wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in dtypes:
        kinds = " or ".join(map(_name, dtypes))
        raise TypeError(f"{name}: expected a dense {wanted} tensor of {kinds}, got {describe(value)}")
    if not fits(value.shape, shape):
        raise ValueError(f"{name}: expected shape {wanted}, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {describe(value)}")


def check_temperatures(value: Any, modalities: int, device: torch.device) -> None:
    """(M,), on the CPU or on `device`. On a GPU its values are not looked at: the host would have to wait for them."""
    on_cpu = isinstance(value, Tensor) and value.device.type == "cpu"
    check_tensor("temperatures", value, (modalities,), device=None if on_cpu else device)
    if not on_cpu or torch.compiler.is_compiling():
        return
    if not ((value > 0) & value.isfinite()).all():
        raise ValueError(f"temperatures: expected finite numbers > 0, got {value.tolist()}")


def check_nonempty(name: str, value: Tensor) -> None:
    if value.numel() == 0:
        raise ValueError(f"{name}: expected at least one element in every dimension, got {describe(value)}")


def check_number(name: str, value: Any, condition: str, holds: Any, more: str = "") -> None:
    """A finite number for which `holds(value)`; a tensor must be 0-d floating, and its value is not read (no sync).

    `more` ends the message.
    """
    if type(value) is float and math.isfinite(value) and holds(value):
        return  # the quick way for what is called every step
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise TypeError(f"{name}: expected a number or a one-element floating tensor, got {describe(value)}{more}")
        return
    condition = f" {condition}" if condition else ""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number{condition}, got {describe(value)}{more}")
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        is_finite = False
    if not (is_finite and holds(value)):
        raise ValueError(f"{name}: expected a finite number{condition}, got {value!r}{more}")


def check_hyperparameters(hyper: Hyperparameters) -> None:
    check_number("lr", hyper.lr, "", lambda v: True)  # schedulers that end at 0 may miss it by a rounding
    check_number("momentum", hyper.momentum, ">= 0", lambda v: v >= 0)
    check_number("dampening", hyper.dampening, "", lambda v: True)
    check_number("weight_decay", hyper.weight_decay, ">= 0", lambda v: v >= 0)
    check_number("alpha", hyper.alpha, "> 0", lambda v: v > 0, _WHICH_ALPHA)
    check_number("forget", hyper.forget, "in [0, 1]", lambda v: 0 <= v <= 1)
    if hyper.absorb not in ("after", "before"):
        raise ValueError(f"absorb: expected 'after' or 'before', got {hyper.absorb!r}")
    if hyper.project not in ("gradient", "update"):
        raise ValueError(f"project: expected 'gradient' or 'update', got {hyper.project!r}")
    for name in ("nesterov", "maximize", "normalize"):
        if not isinstance(getattr(hyper, name), bool):
            raise TypeError(f"{name}: expected True or False, got {describe(getattr(hyper, name))}")
    if hyper.nesterov and not isinstance(hyper.momentum, Tensor) and (hyper.momentum == 0 or hyper.dampening != 0):
        raise ValueError(
            f"nesterov: expected a momentum > 0 and dampening 0 with it, got momentum {hyper.momentum} "
            f"and dampening {hyper.dampening}"
        )


def check_adamw(betas: Any, eps: Any, amsgrad: Any) -> None:
    """The hyperparameters that ProjectedAdamW has and ProjectedSGD lacks."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas: expected two numbers, got {betas!r}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise TypeError(f"betas: expected two numbers or two tensors, got {betas!r}")
    for beta in betas:
        check_number("betas", beta, "in [0, 1)", lambda v: 0 <= v < 1)
    check_number("eps", eps, ">= 0", lambda v: v >= 0)
    if not isinstance(amsgrad, bool):
        raise TypeError(f"amsgrad: expected True or False, got {describe(amsgrad)}")


def check_writable(name: str, value: Tensor) -> None:
    """A tensor whose elements lie apart in memory, so that it can be updated in place."""
    if not value.is_contiguous() and any(n > 1 and s == 0 for n, s in zip(value.shape, value.stride(), strict=True)):
        raise ValueError(f"{name}: expected a tensor of its own elements, got {describe(value)} that is expanded")


def check_rls_update(projection: Tensor, feature_mean: Tensor) -> None:
    check_tensor("projection", projection, ("s", "s"), (torch.float32, torch.float64))
    check_nonempty("projection", projection)
    s = projection.shape[0]
    if projection.shape[1] != s:
        raise ValueError(f"projection: expected a square matrix (s, s), got {describe(projection)}")
    check_writable("projection", projection)
    check_tensor("feature_mean", feature_mean, (s,), (projection.dtype,), projection.device)


def check_projection(projection: Projection, s: int, dtype: torch.dtype, device: torch.device) -> None:
    P = projection
    if (P.base is None) == (P.beta is None):
        raise ValueError("projection: expected either a base (s, s) or a beta, got both or neither")
    if P.base is not None:
        check_tensor("projection", P.base, (s, s), (dtype,), device)
        check_writable("projection", P.base)
    if P.beta is not None:
        check_tensor("beta", P.beta, (), (dtype,), device)
    if P.nu is not None:
        check_tensor("nu", P.nu, (), (dtype,), device)
    if P.rows is not None:
        check_tensor("rows", P.rows, ("R", s), (dtype,), device)
        check_nonempty("rows", P.rows)
        check_writable("rows", P.rows)
        check_tensor("count", P.count, (), (torch.int64,), device)
    elif P.beta is not None:
        raise ValueError("rows: expected a tensor (R, s) beside beta, got None")


def check_weight(name: str, weight: Tensor) -> None:
    """The weight (C, s) of a linear layer, or (C, C_in, k, k) of a convolution."""
    is_convolution = isinstance(weight, Tensor) and weight.dim() == 4
    check_tensor(name, weight, ("C", "C_in", "k", "k'") if is_convolution else ("C", "s"))


def several(heads: Any) -> list[Any]:
    if heads is None:
        return []
    if isinstance(heads, torch.nn.Module) or not hasattr(heads, "__iter__"):
        raise TypeError(f"heads: expected several modules, as in a list, got {describe(heads)}")
    return list(heads)


def check_head_step(step: HeadStep) -> None:
    """The tensors of a step; `check_hyperparameters` is for step.hyper itself."""
    weight = step.weight
    check_tensor("weight", weight, ("C", "s"))
    check_nonempty("weight", weight)
    shape, device, dtype = weight.shape, weight.device, accumulate_dtype(weight.dtype)
    check_tensor("grad", step.grad, shape, (weight.dtype,), device)
    check_projection(step.projection, shape[1], dtype, device)
    check_tensor("step", step.step, (), (torch.float32,), device)
    check_writable("weight", weight)
    if step.feature_mean is not None:
        check_tensor("feature_mean", step.feature_mean, shape[1:], (dtype,), device)
    if step.momentum_buffer is not None:
        check_tensor("momentum_buffer", step.momentum_buffer, shape, (dtype,), device)
        check_writable("momentum_buffer", step.momentum_buffer)
    elif has_momentum(step.hyper.momentum):
        wanted = f"a {tuple(shape)} {_name(dtype)} tensor with momentum {step.hyper.momentum}"
        raise ValueError(f"momentum_buffer: expected {wanted}, got None")
    if step.projection.beta is not None and step.hyper.normalize:
        raise ValueError("normalize: expected False in the rank form, whose norm is not at hand; use rank=None")
    check_scaling(step.grad_scale, step.found_inf, device)


def check_scaling(grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device) -> None:
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if value is not None:
            is_vector = isinstance(value, Tensor) and value.shape == (1,)  # torch's fused kernels take both
            check_tensor(name, value, (1,) if is_vector else (), (torch.float32,), device)


def has_momentum(momentum: float | Tensor) -> bool:
    return isinstance(momentum, Tensor) or momentum != 0


def check_options(options: dict[str, Any], differentiable: bool, process_group: Any) -> None:
    """The keywords of ProjectedSGD that are no hyperparameters of the step."""
    for name, choices in (
        ("capturable", (True, False)),
        ("foreach", (True, False, None)),
        ("fused", (True, False, None)),
    ):
        if not any(options[name] is choice for choice in choices):
            raise TypeError(f"{name}: expected one of {choices}, got {describe(options[name])}")
    if options["foreach"] and options["fused"]:
        raise ValueError("fused: expected False or None with foreach=True, got True")
    if differentiable:
        raise ValueError("differentiable: expected False, as the step updates weights in place; got True")
    is_group = dist.is_available() and isinstance(process_group, dist.ProcessGroup)
    if not (process_group is None or process_group == "local" or is_group):
        raise ValueError(f"process_group: expected a process group, None or 'local', got {process_group!r}")


def check_alpha_scale(alpha_scale: Any) -> None:
    if alpha_scale is not None and alpha_scale != "features":
        raise ValueError(f"alpha_scale: expected 'features' or None, got {alpha_scale!r}{_WHICH_ALPHA}")


def check_rank(rank: Any, normalize: bool) -> None:
    is_number = isinstance(rank, int) and not isinstance(rank, bool)
    if not (rank is None or rank == "auto" or is_number):
        raise TypeError(f"rank: expected 'auto', None or a number of rows, got {describe(rank)}{_WHICH_RANK}")
    if is_number and rank < 2:
        raise ValueError(f"rank: expected at least 2 rows, got {rank}{_WHICH_RANK}")
    if is_number and normalize:
        raise ValueError(
            f"normalize: expected False with rank={rank}, whose norm is not at hand; use rank=None"
            + see("rank#what-it-cannot-do")
        )
