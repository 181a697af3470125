"""How weights step, whatever the form of P: torch.optim.SGD with the projected gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import read

__all__ = ["WEIGHT_COLUMNS", "advance", "is_skipped", "read_forget", "read_sgd", "sgd", "step_class"]

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
def read_sgd(
    lr,
    lr_tensor,
    momentum,
    momentum_tensor,
    dampening,
    dampening_tensor,
    weight_decay,
    weight_decay_tensor,
    dtype: tl.constexpr,
):
    """lr, momentum, 1 − dampening and weight_decay."""
    undamped = (1.0 - read(dampening, dampening_tensor, tl.float64)).to(dtype)
    decay = read(weight_decay, weight_decay_tensor, dtype)
    return read(lr, lr_tensor, dtype), read(momentum, momentum_tensor, dtype), undamped, decay


@triton.jit
def read_forget(forget, forget_tensor, dtype: tl.constexpr):
    """1 − ρ and ρ."""
    rho = read(forget, forget_tensor, tl.float64)
    return (1.0 - rho).to(dtype), rho.to(dtype)


@triton.jit
def sgd(
    weight,
    momentum_buffer,
    offsets,
    mask,
    z,
    grad_scale,
    first_step,
    lr,
    momentum,
    undamped,
    weight_decay,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """torch.optim.SGD on the elements at `offsets`, given their projected gradient z."""
    g = z
    if grad_scale is not None:
        g = g / tl.load(grad_scale).to(z.dtype)
    if MAXIMIZE:
        g = -g
    w = tl.load(weight + offsets, mask, other=0.0).to(z.dtype)
    g += weight_decay * w
    if momentum_buffer is not None:
        old = tl.load(momentum_buffer + offsets, mask, other=0.0)
        # The first buffer is the gradient itself; what is in memory then may be anything.
        new = tl.where(first_step, g, momentum * old + undamped * g)
        tl.store(momentum_buffer + offsets, new, mask)
        if NESTEROV:
            g += momentum * new
        else:
            g = new
    tl.store(weight + offsets, w - lr * g, mask)


@triton.jit
def step_class(
    c,
    weight,
    grad,
    momentum_buffer,
    grad_scale,
    projected,
    k,
    s,
    first_step,
    absorbed,
    sign,
    root,
    norm,
    lr,
    momentum,
    undamped,
    weight_decay,
    keep,
    forget,
    CORRECT: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Steps class c with its Z = G P_{t-1}, or, to CORRECT it, with G P_t = ((1−ρ)(Z − sign(d) (G u) uᵀ) + ρG) / ‖P_t‖,
    where P_t has absorbed u = k / root."""
    dtype: tl.constexpr = projected.dtype.element_ty
    start = c.to(tl.int64) * s
    grad_dot_u = tl.full((), 0.0, dtype)
    if CORRECT:
        products = tl.zeros((COLUMNS,), dtype)
        for first in range(0, s, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            u = tl.load(k + columns, columns < s, other=0.0) / root
            products += tl.load(grad + start + columns, columns < s, other=0.0).to(dtype) * u
        grad_dot_u = sign * tl.sum(products)

    for first in range(0, s, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = columns < s
        z = tl.load(projected + start + columns, mask, other=0.0)
        if CORRECT:
            g = tl.load(grad + start + columns, mask, other=0.0).to(dtype)
            u = tl.load(k + columns, mask, other=0.0) / root
            z = tl.where(absorbed, ((z - grad_dot_u * u) * keep + forget * g) / norm, z)
        sgd(
            weight,
            momentum_buffer,
            start + columns,
            mask,
            z,
            grad_scale,
            first_step,
            lr,
            momentum,
            undamped,
            weight_decay,
            NESTEROV,
            MAXIMIZE,
        )
