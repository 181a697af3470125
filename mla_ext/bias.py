"""A bias that rides with its weight: [W | b] (C, s + 1) acts on features with one more, which is always 1.

P is (s + 1, s + 1) then, and protects W h̄ + b. Each step joins copies of the two, and writes them back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .checks import describe
from .head_state import MOMENTS, get_projection
from .layers import row_size

__all__ = ["check_bias", "join", "join_grads", "join_moments", "write_back"]


def join(weight: Tensor, bias: Tensor) -> Tensor:
    """[W | b]: (C, s + 1) of a weight (C, s) or (C, C_in, k, k) and a bias (C,)."""
    return torch.cat([weight.flatten(1), bias.unsqueeze(1)], dim=1)


def join_grads(weight: Tensor, bias: Tensor) -> Tensor:
    assert weight.grad is not None
    return join(weight.grad, weight.new_zeros(len(bias)) if bias.grad is None else bias.grad)


def join_moments(weight_state: dict[str, Any], bias_state: dict[str, Any], weight: Tensor) -> None:
    """What the optimizer knew of the two as parameters of their own becomes one state, that of the weight."""
    for name in MOMENTS:
        moment = weight_state.get(name)
        if isinstance(moment, Tensor) and moment.shape == weight.shape:
            own = bias_state.get(name)
            weight_state[name] = join(moment, moment.new_zeros(len(weight)) if own is None else own.to(moment))
    bias_state.clear()


def write_back(joined: Tensor, weight: Tensor, bias: Tensor) -> None:
    """A bias without a gradient stays, as any parameter does."""
    weight.copy_(joined[:, :-1].view_as(weight))
    if bias.grad is not None:
        bias.copy_(joined[:, -1])


def check_bias(layer: nn.Linear | nn.Conv2d, state: dict[str, Any], known: Tensor | None, params: list[Tensor]) -> None:
    """Raises ValueError for a layer whose bias cannot ride with its weight, whose state is `state`."""
    weight, bias = layer.weight, layer.bias
    if not isinstance(bias, Tensor):
        raise ValueError(f"bias: expected a head with a bias, got a {type(layer).__name__} without one")
    if type(weight) is not nn.Parameter or type(bias) is not nn.Parameter or not any(bias is p for p in params):
        raise ValueError(
            f"bias: expected a parameter of this optimizer, in one piece as its weight, got {describe(bias)}"
        )
    P = get_projection(state)
    if (known is not None and known is not bias) or (P is not None and P.size != row_size(weight) + 1):
        raise ValueError("bias: expected a weight that was not attached without this bias before, got one that was")
