"""`mla-ext doctor`: what is installed, which backend works for which device and why, and whether each is right."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from . import backends, ops, reference
from .info import build_info
from .projection import Projection
from .reference import Hyperparameters

__all__ = ["diagnose"]

PACKAGES = ("triton", "numpy")
TOLERANCE = 1e-4  # of float32 against the reference in float64, relative to the largest number
HYPER = Hyperparameters(lr=0.1, momentum=0.9, weight_decay=0.01)


def diagnose() -> tuple[str, bool]:
    """A report to read or to paste into an issue, and whether every backend that runs here is right."""
    lines = [f"Python {platform.python_version()}, {platform.platform()}, {torch.get_num_threads()} threads"]
    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    lines.append(", ".join([f"torch {torch.__version__}", *versions]))  # with its CUDA, which pip does not tell
    lines.append("mla_ext.build_info(), where torch is what the kernels were built with:")
    lines += [f"{name}: {_text(value)}" for name, value in build_info().items()]
    healthy = True
    for device in _devices():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        lines += ["", f"{device} ({name}): backend='auto' takes {backends.usable(device)[0]}"]
        for backend in backends.BACKENDS.values():
            reason = backend.unusable(device)
            if reason is None:
                right, reason = _test(backend.name, device)
                healthy = healthy and right
            lines.append(f"  {backend.name}: {reason}")
    lines += ["", "All that runs here is right." if healthy else "Something that runs here is wrong: please report it."]
    return "\n".join(lines), healthy


def _devices() -> Iterator[torch.device]:
    yield torch.device("cpu")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        yield torch.device("cuda", index)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"


def _text(value: object) -> object:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return "none" if value in (None, "") else value


def _test(backend: str, device: torch.device) -> tuple[bool, str]:
    """Whether a backend is right on a device, and what to say of it."""
    start, worst = time.perf_counter(), 0.0
    try:
        for found, true in _results(backend, device):
            error = (found.cpu().double() - true).abs().max() / true.abs().max()
            worst = max(worst, error.item() if error.isfinite() else float("inf"))
    except Exception as error:  # whatever a driver or a compiler says belongs in the report
        return False, f"FAILED, {type(error).__name__}: {error}"
    right = worst <= TOLERANCE
    return right, f"{'right' if right else 'WRONG'}, error {worst:.1e}, {time.perf_counter() - start:.1f} s"


def _results(backend: str, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """What a backend makes in float32, and what is true: a mean, steps of both forms of P, and a fusion."""
    C, s, R = 6, 40, 8
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)

    features = randn(32, s)
    yield ops.feature_mean(features.float().to(device), backend=backend), reference.feature_mean(features)
    start, grads, means = randn(C, s), [randn(C, s) for _ in range(10)], [randn(s) for _ in range(10)]
    for rank in (None, R):
        weight = start.float().to(device)
        momentum, step = torch.zeros_like(weight), torch.zeros((), dtype=torch.float32, device=device)
        P = Projection.identity(s, rank, 0, torch.float32, device)
        true_weight, true_momentum = start, torch.zeros_like(start)
        base, beta, rows = torch.eye(s, dtype=torch.float64, device="cpu"), start.new_ones(()), start.new_zeros(0, s)
        for t, (grad, mean) in enumerate(zip(grads, means, strict=True)):
            given = (grad.float().to(device), momentum, P, mean.float().to(device), step, HYPER)
            ops.head_step_(weight, *given, backend=backend)
            before, after = (
                (true_weight, grad, true_momentum),
                (mean, torch.tensor(t, dtype=torch.float32, device="cpu"), HYPER),
            )
            if rank is None:
                true_weight, made, base = reference.head_step(*before, base, *after)
            else:
                true_weight, made, beta, rows = reference.rank_head_step(*before, beta, rows, rank, *after)
            assert made is not None
            true_momentum = made
        yield weight, true_weight
        yield momentum, true_momentum
    logits = randn(3, 32, C)
    fused, weights = ops.entropy_fusion(logits.float().to(device), backend=backend)
    yield from zip((fused, weights), reference.entropy_fusion(logits), strict=True)
