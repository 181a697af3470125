"""Head steps of the shapes that decide which kernels run: aligned rows, P on chip or not, many classes, K full.

On a GPU with "cuda" and "triton". With MLA_EXT_EMULATED, on the emulated device: its multiprocessors are three, so
smaller shapes take the same paths.
"""

import os

import pytest
import torch
from helpers import randn
from parity import assert_as_accurate
from torch import nn

from mla_ext import ProjectedSGD, backends, ops, reference
from mla_ext.projection import Projection
from mla_ext.reference import Hyperparameters, accumulate_dtype

EMULATED = "MLA_EXT_EMULATED" in os.environ
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["emulated"] if EMULATED else [n for n in ("cuda", "triton") if n in backends.usable(torch.device(DEVICE))]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# (s, C) on an H100, and where the emulated device takes the same way.
SHAPES = {
    "small": ((64, 6), (64, 6)),
    "passes": ((512, 20), (64, 20)),
    "last on chip": ((2668, 6), (96, 6)),
    "first in memory": ((2672, 6), (100, 6)),
    "more classes": ((2816, 20), (108, 20)),
    "product given": ((2048, 101), (60, 40)),
}
OPTIONS = {
    "after": {"momentum": 0.9, "weight_decay": 0.01},
    "before": {"momentum": 0.9, "absorb": "before"},
    "normalize": {"normalize": True, "absorb": "before", "forget": 0.05},
}
RANKS = {
    "aligned": ((4096, 6, 64), (64, 6, 4)),
    "odd": ((1031, 20, 9), (33, 20, 5)),
    "wide": ((512, 101, 8), (40, 35, 4)),
}

pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not EMULATED, reason="needs a CUDA device, or the emulated one"),
    pytest.mark.parametrize("backend", BACKENDS),
]


def mean_of_step(t, s, dtype):
    """Three directions over and over, and a little noise, so that it is clear which ones a compression keeps."""
    shared = 5 * randn(s, dtype=dtype, device=DEVICE, seed=1000 + t % 3)
    return (shared + 0.1 * randn(s, dtype=dtype, device=DEVICE, seed=100 + t)) / s**0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(backend, shape, options, dtype):
    (s, C), hyper = SHAPES[shape][EMULATED], Hyperparameters(lr=0.1, **OPTIONS[options])
    accumulate = accumulate_dtype(dtype)
    weight = randn(C, s, dtype=dtype, device=DEVICE, seed=77)
    buffer = torch.zeros(C, s, dtype=accumulate, device=DEVICE) if hyper.momentum else None
    P, step = torch.eye(s, dtype=accumulate, device=DEVICE), torch.zeros((), device=DEVICE)
    plain, true = (weight, buffer, P), (weight.double(), None if buffer is None else buffer.double(), P.double())
    weight, buffer, P = weight.clone(), None if buffer is None else buffer.clone(), P.clone()
    for t in range(3):
        grad, mean = randn(C, s, dtype=dtype, device=DEVICE, seed=t), mean_of_step(t, s, accumulate)
        count = torch.tensor(float(t), device=DEVICE)
        ops.head_step_(weight, grad, buffer, P, mean, step, hyper, backend=backend)
        plain = reference.head_step(plain[0], grad, *plain[1:], mean, count, hyper)
        true = reference.head_step(true[0], grad.double(), *true[1:], mean.double(), count, hyper)
    for ours, theirs, exact in zip((weight, buffer, P), plain, true, strict=True):
        if ours is not None:
            assert_as_accurate(ours, theirs, exact)
    assert torch.equal(P, P.T) and step == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["after", "before"])
@pytest.mark.parametrize("shape", RANKS)
def test_rank_across_compressions(backend, shape, options, dtype):
    s, C, R = RANKS[shape][EMULATED]
    hyper = Hyperparameters(lr=0.1, forget=0.01, **OPTIONS[options])
    accumulate = accumulate_dtype(dtype)
    weight = randn(C, s, dtype=dtype, device=DEVICE, seed=77)
    buffer = torch.zeros(C, s, dtype=accumulate, device=DEVICE)
    P, step = Projection.identity(s, R, 0, accumulate, torch.device(DEVICE)), torch.zeros((), device=DEVICE)
    nothing = torch.zeros(0, s, dtype=accumulate, device=DEVICE)
    plain = (weight, buffer, P.beta.clone(), nothing)
    true = tuple(part.double() for part in plain)
    weight, buffer = weight.clone(), buffer.clone()
    for t in range(2 * R + 1):
        grad, mean = randn(C, s, dtype=dtype, device=DEVICE, seed=t), mean_of_step(t, s, accumulate)
        count = torch.tensor(float(t), device=DEVICE)
        ops.head_step_(weight, grad, buffer, P, mean, step, hyper, backend=backend)
        plain = reference.rank_head_step(plain[0], grad, *plain[1:], R, mean, count, hyper)
        true = reference.rank_head_step(true[0], grad.double(), *true[1:], R, mean.double(), count, hyper)
    assert P.count == len(true[3])
    matrices = [Projection(None, beta, K, torch.tensor(len(K), device=DEVICE)).dense() for *_, beta, K in (plain, true)]
    ours = (weight, buffer, P.dense())
    for each, theirs, exact in zip(ours, (*plain[:2], matrices[0]), (*true[:2], matrices[1]), strict=True):
        assert_as_accurate(each, theirs, exact, tiny=1e-5)


@pytest.mark.parametrize("rank", [None, 4])
def test_several_heads(backend, rank):
    """Three heads, each with a P of its own, and now and then one of them without a gradient."""
    models = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(64, 6), nn.Linear(33, 2), nn.Linear(64, 3)]).to(DEVICE)
        optimizer = ProjectedSGD(model.parameters(), lr=0.1, momentum=0.9, rank=rank, backend=name)
        for head in model:
            optimizer.attach(head)
        for t in range(9):
            optimizer.zero_grad()
            for i, head in enumerate(model):
                if i != t % 4:
                    x = mean_of_step(t, head.in_features, torch.float32).expand(5, -1)
                    (head(x) * (1 + torch.arange(head.out_features, device=DEVICE))).sum().backward()
            optimizer.step()
        models.append((model, [optimizer.projection(head.weight) for head in model]))
    (ours, own), (theirs, other) = models
    for a, b in zip([*ours.parameters(), *own], [*theirs.parameters(), *other], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
