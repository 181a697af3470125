"""The rule every backend is held to: no more than twice the error of plain PyTorch in the same precision."""

import torch
from torch import Tensor

from mla_ext import reference
from mla_ext.reference import accumulate_dtype

RANK_OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.8, "nesterov": True, "maximize": True},
    "before": {"absorb": "before", "momentum": 0.9},
    "forget": {"forget": 0.05},
    "before_forget": {"forget": 0.05, "absorb": "before"},
    "update": {"project": "update", "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
}


def error(actual: Tensor, truth: Tensor) -> float:
    return (actual.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def assert_as_accurate(actual: Tensor, plain: Tensor, truth: Tensor, tiny: float = 1e-6) -> None:
    """`truth` is the reference in float64, `plain` the reference in the precision of `actual`.

    `tiny` is relative to the largest entry of truth; in float64, where plain is the truth itself, it is all there is.
    """
    assert actual.shape == truth.shape and actual.dtype == plain.dtype and actual.isfinite().all()
    scale = max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
    tiny = tiny if actual.element_size() < 8 else 1e-12
    assert error(actual, truth) <= 2 * error(plain, truth) + tiny * scale


class PlainRank:
    """A new head in the rank form, stepped by the reference in any precision.

    `head` has weight, momentum_buffer, hyper and capacity: the number of rows at which P is compressed.
    """

    def __init__(self, head, dtype):
        accumulate, s = accumulate_dtype(dtype), head.weight.shape[1]
        self.weight, self.hyper, self.capacity = head.weight.to(dtype, copy=True), head.hyper, head.capacity
        self.momentum_buffer = None if head.momentum_buffer is None else head.momentum_buffer.to(accumulate, copy=True)
        self.beta, self.rows = self.weight.new_ones((), dtype=accumulate), self.weight.new_zeros(0, s, dtype=accumulate)
        self.step = torch.zeros((), device=self.weight.device)

    def step_(self, grad, mean):
        self.weight, self.momentum_buffer, self.beta, self.rows = reference.rank_head_step(
            self.weight,
            grad.to(self.weight.dtype),
            self.momentum_buffer,
            self.beta,
            self.rows,
            self.capacity,
            None if mean is None else mean.to(self.rows.dtype),
            self.step,
            self.hyper,
        )
        self.step += 1
