"""A small network with an attached head, and training steps on batches that a seed decides."""

import torch
from torch import Tensor, nn

from mla_ext import ProjectedSGD


def network(classes: int = 3, features: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    plain = {"device": "cpu", "dtype": torch.float32}  # whatever the defaults are
    return nn.Sequential(nn.Linear(5, features, **plain), nn.ReLU(), nn.Linear(features, classes, **plain))


def attached(classes: int = 3, features: int = 8, **options) -> tuple[nn.Sequential, ProjectedSGD]:
    model = network(classes, features)
    optimizer = ProjectedSGD(model.parameters(), **({"lr": 0.02} | options))
    optimizer.attach(model[2])
    return model, optimizer


def backward(model: nn.Module, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(4, 5, generator=generator, device="cpu", dtype=torch.float32).to(device, dtype)
    model(x).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    weight = next(model.parameters())
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, seed, weight.device.type, weight.dtype)
        optimizer.step()


def bits(model: nn.Sequential, optimizer: ProjectedSGD) -> list[Tensor]:
    """Copies of the parameters and of P."""
    return [p.detach().clone() for p in model.parameters()] + [optimizer.projection(model[2].weight)]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), (a, b)
