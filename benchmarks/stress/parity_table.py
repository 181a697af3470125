"""Writes docs/dev/parity.md: every backend's error over that of plain PyTorch in the same dtype.

`make parity`
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from parity import error

from mla_ext import backends, ops, reference
from mla_ext.projection import Projection
from mla_ext.reference import Hyperparameters, accumulate_dtype

from ..machine import machine

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dev" / "parity.md"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STEPS, SEEDS = 5, 3
RANK, RANK_STEPS = 8, 14  # with two compressions
N, S, C, M = 64, 65, 6, 3  # samples, features, classes, modalities
HYPER = {
    "head_step": Hyperparameters(lr=0.1, momentum=0.9, weight_decay=0.01),
    "head_step, absorb before": Hyperparameters(lr=0.1, momentum=0.9, absorb="before", forget=0.05),
    "head_step, normalize": Hyperparameters(lr=0.1, momentum=0.9, normalize=True),
}


RANK_HYPER = {name: hyper for name, hyper in HYPER.items() if not hyper.normalize}


def randn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def feature_mean(backend: str | None, dtype: torch.dtype, working: torch.dtype, seed: int) -> list[torch.Tensor]:
    features = (randn(N, S, seed=seed, dtype=dtype) + 3).to(working)
    return [ops.feature_mean(features, backend=backend) if backend else reference.feature_mean(features)]


def rls_update(backend: str | None, dtype: torch.dtype, working: torch.dtype, seed: int) -> list[torch.Tensor]:
    P = torch.eye(S, dtype=accumulate_dtype(working))
    for t in range(STEPS):
        h = randn(S, seed=100 * seed + t, dtype=accumulate_dtype(dtype)).relu().to(P.dtype)
        if backend:
            ops.rls_update_(P, h, backend=backend)
        else:
            P = reference.rls_update(P, h)
    return [P]


def head_step(
    hyper: Hyperparameters, backend: str | None, dtype: torch.dtype, working: torch.dtype, seed: int
) -> list[torch.Tensor]:
    like = {"dtype": accumulate_dtype(working)}
    W, P, step = randn(C, S, seed=seed, dtype=dtype).to(working), torch.eye(S, **like), torch.zeros(())
    buffer = torch.zeros(C, S, **like)
    for t in range(STEPS):
        G = randn(C, S, seed=200 * seed + t, dtype=dtype).to(working)
        h = randn(S, seed=100 * seed + t, dtype=accumulate_dtype(dtype)).relu().to(P.dtype)
        if backend:
            ops.head_step_(W, G, buffer, P, h, step, hyper, backend=backend)
        else:
            W, buffer, P = reference.head_step(W, G, buffer, P, h, step, hyper)
            step += 1
    return [W, buffer, P]


def rank_step(
    hyper: Hyperparameters, backend: str | None, dtype: torch.dtype, working: torch.dtype, seed: int
) -> list[torch.Tensor]:
    like = {"dtype": accumulate_dtype(working)}
    W, step = randn(C, S, seed=seed, dtype=dtype).to(working), torch.zeros(())
    buffer, P = torch.zeros(C, S, **like), Projection.identity(S, RANK, 0, like["dtype"], W.device)
    beta, K = torch.ones((), **like), torch.zeros(0, S, **like)
    for t in range(RANK_STEPS):
        G = randn(C, S, seed=200 * seed + t, dtype=dtype).to(working)
        h = randn(S, seed=100 * seed + t, dtype=accumulate_dtype(dtype)).relu().to(like["dtype"])
        if backend:
            ops.head_step_(W, G, buffer, P, h, step, hyper, backend=backend)
        else:
            W, buffer, beta, K = reference.rank_head_step(W, G, buffer, beta, K, RANK, h, step, hyper)
            step += 1
    return [W, buffer, P.dense() if backend else beta * torch.eye(S, **like) - K.t() @ K]


def entropy_fusion(backend: str | None, dtype: torch.dtype, working: torch.dtype, seed: int) -> list[torch.Tensor]:
    logits = (5 * randn(M, N, C, seed=seed, dtype=torch.float64)).to(dtype).to(working)
    present = randn(M, N, seed=seed + 1, dtype=torch.float64) > -0.5
    return list(
        ops.entropy_fusion(logits, present, backend=backend) if backend else reference.entropy_fusion(logits, present)
    )


OPERATIONS = {
    "feature_mean": (feature_mean, DTYPES),
    "rls_update": (rls_update, (torch.float32, torch.float64)),
    **{name: (lambda *arguments, hyper=hyper: head_step(hyper, *arguments), DTYPES) for name, hyper in HYPER.items()},
    **{
        f"{name}, rank {RANK}": (lambda *arguments, hyper=hyper: rank_step(hyper, *arguments), DTYPES)
        for name, hyper in RANK_HYPER.items()
    },
    "entropy_fusion": (entropy_fusion, DTYPES),
}


def measure(operation, dtype: torch.dtype, backend: str) -> str:
    """The largest ratio over the results of an operation, of errors that are the largest over the seeds."""
    ours, plain, scale = [], [], []
    for seed in range(SEEDS):
        truths = operation(None, dtype, torch.float64, seed)
        ours.append([error(a, b) for a, b in zip(operation(backend, dtype, dtype, seed), truths, strict=True)])
        plain.append([error(a, b) for a, b in zip(operation(None, dtype, dtype, seed), truths, strict=True)])
        scale.append([truth.abs().max().item() for truth in truths])
    worst = [[max(column) for column in zip(*rows, strict=True)] for rows in (ours, plain, scale)]
    if dtype == torch.float64:  # where plain PyTorch is the truth itself
        return f"{max(a / c for a, _, c in zip(*worst, strict=True)):.0e}"
    ratios = [a / b if b else float("inf") for a, b, _ in zip(*worst, strict=True) if a or b]
    return f"{max(ratios):.2f}" if ratios else "exact"


def table(names: list[str]) -> list[str]:
    lines = ["| operation | dtype | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for operation, (function, dtypes) in OPERATIONS.items():
        for dtype in dtypes:
            cells = [measure(function, dtype, name) for name in names]
            lines.append(f"| {operation} | {str(dtype).removeprefix('torch.')} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    names = backends.usable(torch.device("cpu"))
    if "triton" in names:
        import triton_interpreter

        triton_interpreter.install()
        warnings.simplefilter("ignore")  # NumPy's, on values that a kernel masks out
    page = f"""# Accuracy of the backends

Error of each backend ÷ error of plain PyTorch (`mla_ext/reference.py`) in the same dtype. Both errors are the largest
absolute differences to the reference in float64, over all results of an operation (W, momentum buffer and P of a head
step) and {SEEDS} seeds; 1.00 is as accurate as PyTorch, and the tests allow 2 plus {1e-6:.0e} of the largest entry.
In float64 PyTorch is the truth itself, and the table gives the error relative to the largest entry instead.

N = {N} samples, s = {S} features, C = {C} classes, M = {M} modalities; {STEPS} updates or steps in a row,
{RANK_STEPS} of the rank form, with two compressions.
The column of the reference differs from 1 where that backend works in place, in another order of operations.
Triton's column comes from its interpreter on CPU tensors, which computes with NumPy: it shows the algorithm, not the
arithmetic of a GPU (NumPy adds up the rows of a feature mean one after the other, a GPU in a tree). No GPU is behind
this table; on one, `tests/test_ops.py` holds every backend to the bound.

{machine("cpu")}. Written by `make parity`.

""" + "\n".join(table(names))
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(page + "\n", encoding="utf-8")
    os.replace(temporary, PAGE)


if __name__ == "__main__":
    main()
