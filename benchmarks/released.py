"""The projection of the authors' released code, switched on: what it would do if its head's name matched."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def released_update(P: Tensor, feature_mean: Tensor, alpha: float) -> Tensor:
    """The update of P (s, s) in the authors' released code, were it reached: its denominator is an s×s matrix."""
    r = feature_mean.unsqueeze(0)
    k = P @ r.t()
    P = P - (k @ k.t()) / (alpha + k @ r)
    return P / torch.linalg.matrix_norm(P)


def project_as_released(optimizer: Optimizer, head: nn.Linear, steps_per_epoch: int) -> None:
    """Make `optimizer` step `head` along G Pᵀ, with P updated from each batch's features just before.

    α falls from 0.1 to 0.01 within each epoch. P is in no state_dict, as in the released code.
    """
    P = torch.eye(head.in_features)
    mean = torch.zeros(head.in_features)
    steps = 0

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            mean.copy_(inputs[0].detach().mean(dim=0))

    @torch.no_grad()
    def project(*_: object) -> None:
        nonlocal P, steps
        P = released_update(P, mean, alpha=0.1 ** (1 + (steps % steps_per_epoch) / steps_per_epoch))
        head.weight.grad.copy_(head.weight.grad @ P.T)
        steps += 1

    head.register_forward_pre_hook(record)
    optimizer.register_step_pre_hook(project)
