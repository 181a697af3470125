"""The head step of `mla_ext.reference` on a CPU, written into the given tensors: what runs where no kernels are.

The equations and their names are those of `reference.py`, which says why they are so. Two matrices as large as the
gradient are kept for each weight; beside them nothing larger than a cache is allocated. The numbers of a step
(d, ν, β) are taken on the host, in double precision.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .projection import Projection
from .reference import NU_RATE, RANK_NOISE, Hyperparameters, rank_compress
from .step import HeadStep

__all__ = ["head_step_"]

BLOCK = 2**16  # products at a time, which stay in a cache of the core

_scratch: MutableMapping[Tensor, tuple[Tensor, Tensor]] = WeakIdKeyDictionary()


def head_step_(step: HeadStep) -> None:
    """`reference.head_step`, or `rank_head_step` where P has no base, on CPU tensors with gradients disabled."""
    if step.found_inf is not None and step.found_inf.item() != 0:
        return
    P, hyper, h, C = step.projection, step.hyper, step.feature_mean, len(step.weight)
    X, Z = _matrices(step)
    X[:C] = step.grad
    if step.grad_scale is not None:
        X[:C].div_(step.grad_scale)
    if h is None or hyper.absorb == "before":
        if h is not None:
            X[C] = h
            _absorb(P, h, _product(P, X[C:], Z[C:])[0], hyper)
        _sgd_(step, _product(P, X[:C], Z[:C]))
    else:
        X[C] = h
        _product(P, X, Z)  # G P and k at once
        _sgd_(step, Z[:C])
        _absorb(P, h, Z[C], hyper)
    if P.base is None and int(_count(P)) == len(_rows(P)):
        _compress(P)


def _matrices(step: HeadStep) -> tuple[Tensor, Tensor]:
    """Room for [G; h̄ᵀ] and its product with P: (C + 1, s) each, the same at every step of a weight."""
    P = step.projection
    like = P.base if P.base is not None else _rows(P)
    shape = (len(step.weight) + 1, P.size)
    known = _scratch.get(step.weight)
    if known is None or known[0].shape != shape or known[0].dtype != like.dtype:
        known = _scratch[step.weight] = (like.new_empty(shape), like.new_empty(shape))
    return known


def _product(P: Projection, X: Tensor, out: Tensor) -> Tensor:
    """X P into `out`. A dense P has no deferred rows."""
    if P.base is not None:
        return torch.mm(X, P.base, out=out)
    K = _used(P)
    return torch.addmm(X, X @ K.t(), K, beta=_beta(P).item(), alpha=-1, out=out)


def _absorb(P: Projection, h: Tensor, k: Tensor, hyper: Hyperparameters) -> None:
    """P takes h̄, with k = P h̄ (s,), which this overwrites."""
    alpha, forget, largest = float(hyper.alpha), float(hyper.forget), torch.finfo(k.dtype).max
    if P.nu is not None:
        nu, squares = P.nu.item(), torch.dot(h, h).item()
        nu = squares if nu == 0 else nu + NU_RATE * (squares - nu)
        alpha *= nu
        if abs(alpha) <= largest:
            P.nu.fill_(nu)
    along = torch.dot(h, k).item()
    if P.base is not None:
        d = alpha + along
        if abs(d) <= largest and d != 0:
            _subtract_square_(P.base, k.div_(math.sqrt(abs(d))), math.copysign(1.0, d))
            if forget != 0:
                P.base.mul_(1 - forget).diagonal().add_(forget)
            if hyper.normalize:
                P.base.div_(torch.linalg.matrix_norm(P.base))
        return
    beta, rows, count = _beta(P), _rows(P), _count(P)
    b = beta.item()
    noise = RANK_NOISE * torch.finfo(k.dtype).eps * b * torch.dot(h, h).item()
    d = max(noise, alpha) + max(along, torch.dot(k, k).item() / b if b > 0 else 0.0)
    if not 0 < d <= largest:  # not NaN either
        return
    if along >= noise:
        torch.div(k, math.sqrt(d), out=rows[int(count)])
        count.add_(1)
    if forget != 0:
        beta.fill_((1 - forget) * b + forget)
        _used(P).mul_(math.sqrt(1 - forget))


def _subtract_square_(base: Tensor, u: Tensor, sign: float) -> None:
    """P ← P − sign · u uᵀ, symmetric to the last bit: addr_ fuses product and difference in some columns only."""
    rows = min(len(u), max(1, BLOCK // len(u)))
    products = base.new_empty(rows, len(u))
    for start in range(0, len(u), rows):
        block = base[start : start + rows]
        block.sub_(torch.outer(u[start : start + rows], u, out=products[: len(block)]), alpha=sign)


def _compress(P: Projection) -> None:
    beta, rows = _beta(P), _rows(P)
    keep = len(rows) // 2
    made, K = rank_compress(beta, rows, keep)
    beta.copy_(made)
    rows[:keep] = K
    _count(P).fill_(keep)


def _sgd_(step: HeadStep, g: Tensor) -> None:
    """torch.optim.SGD's step along g (C, s), which this overwrites."""
    hyper, M, W = step.hyper, step.momentum_buffer, step.weight
    momentum, weight_decay = float(hyper.momentum), float(hyper.weight_decay)
    if hyper.maximize:
        g.neg_()
    if weight_decay != 0:
        g.add_(W, alpha=weight_decay)
    if M is not None:
        if step.step.item() == 0:
            M.copy_(g)
        else:
            M.mul_(momentum).add_(g, alpha=1 - float(hyper.dampening))
        g = g.add_(M, alpha=momentum) if hyper.nesterov else M
    W.add_(g, alpha=-float(hyper.lr))
    step.step.add_(1)


# What the rank form has and a dense P may lack.


def _beta(P: Projection) -> Tensor:
    assert P.beta is not None
    return P.beta


def _rows(P: Projection) -> Tensor:
    assert P.rows is not None
    return P.rows


def _count(P: Projection) -> Tensor:
    assert P.count is not None
    return P.count


def _used(P: Projection) -> Tensor:
    return _rows(P)[: int(_count(P))]
