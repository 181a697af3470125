"""The state of a projected weight. All of it lies in optimizer.state[weight], so that every copy of that is whole.

"base", "beta", "rows", "count", "nu": the parts of its `Projection`. "momentum_buffer": (C, s). All in float32,
float64 for float64 weights. "step": the updates that the momentum buffer has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .backends import Backend
from .checks import describe, fits, has_momentum
from .layers import row_size
from .links import see
from .projection import Projection
from .reference import Hyperparameters, accumulate_dtype

__all__ = [
    "DOES_NOT_FIT",
    "MOMENTS",
    "check",
    "dtypes_of",
    "form_of",
    "get_projection",
    "has_projection",
    "is_scaled_by",
    "prepare",
    "set_projection",
]

PARTS = ("base", "beta", "rows", "count", "nu")
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # as torch names SGD's and AdamW's
BEFORE_0_2 = "projection"  # what "base" was called, when it was the whole of P
DOES_NOT_FIT = see("troubleshooting#a-checkpoint-that-does-not-fit")


def has_projection(state: Mapping[str, Any]) -> bool:
    return "base" in state or "beta" in state or BEFORE_0_2 in state


def get_projection(state: dict[str, Any]) -> Projection | None:
    """The projection in a state, or None where there is none."""
    if not has_projection(state):
        return None
    return Projection(state.get("base", state.get(BEFORE_0_2)), *(state.get(name) for name in PARTS[1:]))


def set_projection(state: dict[str, Any], projection: Projection) -> None:
    state.pop(BEFORE_0_2, None)
    for name in PARTS:
        part = getattr(projection, name)
        if part is None:
            state.pop(name, None)
        else:
            state[name] = part


def check(state: dict[str, Any], weight: Tensor, with_bias: bool = False) -> None:
    """Raises ValueError for the saved state of a projected weight that does not fit `weight`, joined with a bias."""
    if not has_projection(state):
        return
    s = row_size(weight) + with_bias
    shapes: dict[str, tuple[int | str, ...]] = {
        "base": (s, s),
        BEFORE_0_2: (s, s),
        "rows": ("R", s),
        **dict.fromkeys(MOMENTS, (len(weight), s) if with_bias else weight.shape),
    }
    for name in dtypes_of(weight):
        value = state.get(name)
        if name in shapes:
            is_fine = value is None or (isinstance(value, Tensor) and fits(value.shape, shapes[name]))
        else:  # numbers, as some programs save them
            is_fine = value is None or isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        if not is_fine:
            what = "a momentum buffer" if name in MOMENTS else "a projection"
            raise ValueError(
                f"state_dict: expected {what} for {describe(weight)}, got {describe(value)} as {name}{DOES_NOT_FIT}"
            )


def form_of(group: dict[str, Any], s: int, backend: Backend) -> int | None:
    """The rows R of the rank form that a new P (s, s) gets; None: dense, which is the smaller one with R >= s."""
    rank = group["rank"]
    if rank == "auto":
        rank = None if group["normalize"] else backend.rank(s)
    return None if rank is None or rank >= s else rank


def is_scaled_by(projection: Projection, group: dict[str, Any]) -> bool:
    """Whether P has a ν exactly where the group's alpha_scale asks for one."""
    return (projection.nu is None) == (group["alpha_scale"] is None)


def dtypes_of(weight: Tensor) -> dict[str, torch.dtype]:
    """The dtype of each entry, whatever that of the weight."""
    dtype = accumulate_dtype(weight.dtype)
    floats = dict.fromkeys(("base", BEFORE_0_2, "beta", "rows", "nu", *MOMENTS), dtype)
    return {**floats, "count": torch.int64, "step": torch.float32}


def prepare(
    state: dict[str, Any], weight: Tensor, group: dict[str, Any], hyper: Hyperparameters, backend: Backend
) -> Projection:
    """Make what a step of `weight` needs and `state` lacks, and bring all to the weight's device. P keeps its value."""
    dtype, device, C, s = accumulate_dtype(weight.dtype), weight.device, len(weight), row_size(weight)
    for name, wanted in dtypes_of(weight).items():
        tensor = state.get(name)
        if tensor is not None and (tensor.dtype != wanted or tensor.device != device):  # the model was converted
            state[name] = tensor.to(device, wanted)
    momentum_buffer = state.get("momentum_buffer")
    if "step" not in state:  # with a momentum buffer it has stepped as a plain parameter before
        state["step"] = torch.full((), float(momentum_buffer is not None), dtype=torch.float32, device=device)
    if has_momentum(hyper.momentum) and momentum_buffer is None:
        state["momentum_buffer"] = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        state["step"].zero_()

    P = get_projection(state)
    deferred = backend.deferral(C, s, hyper)
    if P is None:
        P = Projection.identity(s, form_of(group, s, backend), deferred, dtype, device)
    elif P.base is not None and (P.rows is None) != (deferred == 0):
        if P.rows is not None:
            backend.settle_(P)
            P.rows = P.count = None
        else:
            P.rows = torch.zeros(deferred, s, dtype=dtype, device=device)
            P.count = torch.zeros((), dtype=torch.int64, device=device)
    if not is_scaled_by(P, group):
        P.nu = None if group["alpha_scale"] is None else torch.zeros((), dtype=dtype, device=device)
    set_projection(state, P)
    return P
