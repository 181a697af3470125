"""One head step in plain PyTorch, as the baselines of the speed tables: SGD with momentum, absorb after.

`state` holds weight, grad, momentum_buffer (C, s), projection (s, s) and feature_mean (s,), all on one device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LR, MOMENTUM, ALPHA = 1e-3, 0.9, 0.1


@dataclass
class State:
    weight: Tensor
    grad: Tensor
    momentum_buffer: Tensor
    projection: Tensor
    feature_mean: Tensor
    step: Tensor

    def clone(self) -> State:
        return State(**{name: value.clone() for name, value in vars(self).items()})


def make_state(C: int, s: int, device: str, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    buffer = torch.zeros(C, s, dtype=dtype, device=device)
    P = torch.eye(s, dtype=dtype, device=device)
    return State(rand(C, s), rand(C, s) - 0.5, buffer, P, rand(s), torch.zeros((), device=device))


def released_update(P: Tensor, feature_mean: Tensor, alpha: float) -> Tensor:
    """The update of P (s, s) in the authors' released code, were it reached: its denominator is an s×s matrix."""
    r = feature_mean.unsqueeze(0)
    k = P @ r.t()
    P = P - (k @ k.t()) / (alpha + k @ r)
    return P / torch.linalg.matrix_norm(P)


def released(state: State) -> None:
    """The operations of the released code one by one. Its numbers are its own: see `released_update`."""
    state.projection = released_update(state.projection, state.feature_mean, ALPHA)
    grad = state.grad @ state.projection.t()
    state.momentum_buffer.mul_(MOMENTUM).add_(grad)
    state.weight.add_(state.momentum_buffer, alpha=-LR)


def best(state: State) -> None:
    """The best plain PyTorch for the same mathematics as ours: one product for G P and k, one rank-1 update."""
    Z = torch.cat([state.grad, state.feature_mean.unsqueeze(0)]) @ state.projection
    k = Z[-1]
    d = ALPHA + torch.dot(state.feature_mean, k)
    state.projection.addr_(k / d, k, alpha=-1)
    state.momentum_buffer.mul_(MOMENTUM).add_(Z[:-1])
    state.weight.add_(state.momentum_buffer, alpha=-LR)
