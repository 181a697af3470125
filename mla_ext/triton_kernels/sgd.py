"""How weights step, whatever the form of P: torch.optim.SGD with the projected gradient."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import read

__all__ = ["NO_HEAD", "WEIGHT_COLUMNS", "Head", "advance", "is_skipped", "read_forget", "read_sgd", "sgd", "step_class"]


class Head(NamedTuple):
    """Of a `HeadStep`, what steps the weights. A launch that does not step them gets `NO_HEAD`."""

    weight: Tensor | None
    grad: Tensor | None
    momentum_buffer: Tensor | None
    grad_scale: Tensor | None


NO_HEAD = Head(None, None, None, None)

# Columns of a class that `step_class` works on at a time.
WEIGHT_COLUMNS = 1024


@triton.jit
def is_skipped(found_inf):
    skipped = False
    if found_inf is not None:
        skipped = tl.load(found_inf) != 0
    return skipped


@triton.jit
def advance(step, is_chosen):
    if is_chosen:  # one program of the launch
        tl.store(step, tl.load(step) + 1)


@triton.jit
def read_sgd(lr, momentum, dampening, weight_decay, tensors, dtype: tl.constexpr):
    """The `rates` of `sgd`: lr, momentum, 1 − dampening and weight_decay."""
    undamped = (1.0 - read(dampening, tensors.dampening, tl.float64)).to(dtype)
    decay = read(weight_decay, tensors.weight_decay, dtype)
    return read(lr, tensors.lr, dtype), read(momentum, tensors.momentum, dtype), undamped, decay


@triton.jit
def read_forget(forget, forget_tensor, dtype: tl.constexpr):
    """1 − ρ and ρ."""
    rho = read(forget, forget_tensor, tl.float64)
    return (1.0 - rho).to(dtype), rho.to(dtype)


@triton.jit
def sgd(head, offsets, mask, z, first_step, rates, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr):
    """torch.optim.SGD on the elements of a `Head` at `offsets`, given their projected gradient z."""
    lr, momentum, undamped, weight_decay = rates
    g = z
    if head.grad_scale is not None:
        g = g / tl.load(head.grad_scale).to(z.dtype)
    if MAXIMIZE:
        g = -g
    w = tl.load(head.weight + offsets, mask, other=0.0).to(z.dtype)
    g += weight_decay * w
    if head.momentum_buffer is not None:
        old = tl.load(head.momentum_buffer + offsets, mask, other=0.0)
        # The first buffer is the gradient itself; what is in memory then may be anything.
        new = tl.where(first_step, g, momentum * old + undamped * g)
        tl.store(head.momentum_buffer + offsets, new, mask)
        if NESTEROV:
            g += momentum * new
        else:
            g = new
    tl.store(head.weight + offsets, w - lr * g, mask)


@triton.jit
def step_class(
    c,
    head,
    projected,
    k,
    s,
    first_step,
    update,
    rates,
    CORRECT: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Steps class c with its Z = G P_{t-1}, or, to CORRECT it, with G P_t = ((1−ρ)(Z − sign(d) (G u) uᵀ) + ρG) / ‖P_t‖,
    where P_t has absorbed u = k / root. `update`: whether it has absorbed, sign(d), root, ‖P_t‖, 1−ρ and ρ."""
    absorbed, sign, root, norm, keep, forget = update
    dtype: tl.constexpr = projected.dtype.element_ty
    start = c.to(tl.int64) * s
    grad_dot_u = tl.full((), 0.0, dtype)
    if CORRECT:
        products = tl.zeros((COLUMNS,), dtype)
        for first in range(0, s, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            u = tl.load(k + columns, columns < s, other=0.0) / root
            products += tl.load(head.grad + start + columns, columns < s, other=0.0).to(dtype) * u
        grad_dot_u = sign * tl.sum(products)

    for first in range(0, s, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = columns < s
        z = tl.load(projected + start + columns, mask, other=0.0)
        if CORRECT:
            g = tl.load(head.grad + start + columns, mask, other=0.0).to(dtype)
            u = tl.load(k + columns, mask, other=0.0) / root
            z = tl.where(absorbed, ((z - grad_dot_u * u) * keep + forget * g) / norm, z)
        sgd(head, start + columns, mask, z, first_step, rates, NESTEROV, MAXIMIZE)
