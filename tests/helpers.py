"""What several test files need: random tensors, a small network and its batches, a training loop, other processes."""

import os
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

from mla_ext import _library

needs_kernels = pytest.mark.skipif(_library.load_error is not None, reason=f"not compiled: {_library.load_error}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def randn(*shape, dtype=torch.float32, device="cpu", seed=0):
    """Drawn in float64, so that every dtype gets the same numbers, rounded."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def network(seed=0, dtype=torch.float32, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, classes)).to(dtype)


def batch(seed, n=4, dtype=torch.float32, device=None, classes=3):
    generator, device = torch.Generator("cpu").manual_seed(seed), device or torch.get_default_device()
    x = torch.randn(n, 5, generator=generator, device="cpu")
    y = torch.randint(classes, (n,), generator=generator, device="cpu")
    return x.to(device, dtype), y.to(device)


def train(model, optimizer, steps, scheduler=None, first=0, forward=None):
    """Steps `first` to `first + steps` on a batch each; `forward` stands in for calling the model."""
    forward, device = model if forward is None else forward, next(model.parameters()).device
    for t in range(first, first + steps):
        x, y = batch(t, device=device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward(x), y).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def tiny_data(path):
    """A learnable `.npz` of two modalities, a vector and an image: 36 samples to train on, 12 and 12 to score."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    np.savez(
        path,
        modalities=np.array(["sound", "sight"]),
        x_sound=(rng.normal(size=(3, 5))[y] + rng.normal(size=(60, 5))).astype(np.float32),
        x_sight=(rng.normal(size=(3, 9, 9))[y] + rng.normal(size=(60, 9, 9))).astype(np.float32),
        y=y,
        classes=np.array(["one", "two", "three"]),
        split=np.repeat([0, 1, 2], [36, 12, 12]).astype(np.int8),
    )
    return path


def run(*command, cwd=None, **environment):
    """Runs a command without what the caller's environment may say about Python, Triton and this package."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MLA_EXT_", "PYTHON", "TRITON_"))}
    return subprocess.run(list(map(str, command)), env=inherited | environment, cwd=cwd, capture_output=True, text=True)
