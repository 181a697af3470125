"""MMIN: the features of what is missing are imagined."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_ext import ConcatModel, MultimodalData, fit
from mla_ext.multimodal.model import JointModel, Step

from .common import BATCH_SIZE, Built, Setting, head_of


class ResidualAutoencoder(nn.Module):
    """A cascade of autoencoders, each fed what the one before it was fed plus its output: x ← x + out."""

    def __init__(self, size: int, blocks: int = 5) -> None:
        super().__init__()
        half, self.bottleneck = size // 2, size // 4
        self.down = nn.ModuleList(
            nn.Sequential(nn.Linear(size, half), nn.LeakyReLU(), nn.Linear(half, self.bottleneck))
            for _ in range(blocks)
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.Linear(self.bottleneck, half), nn.ReLU(), nn.Linear(half, size)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, size) -> what it imagines (N, size), and the concatenated bottlenecks."""
        bottlenecks = []
        for down, up in zip(self.down, self.up, strict=True):
            bottlenecks.append(down(x))
            x = x + up(bottlenecks[-1])
        return x, torch.cat(bottlenecks, dim=1)


class MMIN(JointModel):
    """Missing modality imagination (Zhao et al. 2021): imagine the features of what is missing, classify from that.

    Each training step hides a random part of what a sample has. Loss: CE + weight · MSE(imagined, full) + 2 · MSE of
    the cycle back to what was seen. The full features are those of concatenation, trained first and then frozen; they
    are known only of what the sample has, so in incomplete training data the MSE is over that. A modality alone is
    the model with all others missing.
    """

    def __init__(self, full: ConcatModel, encoders: dict[str, nn.Module], width: int, weight: float) -> None:
        super().__init__(encoders)
        self.full, self.weight = full.requires_grad_(False), weight
        self.encoders.load_state_dict(full.encoders.state_dict())
        self.imagine = ResidualAutoencoder(width * len(encoders))
        self.cycle = ResidualAutoencoder(width * len(encoders))
        bottlenecks = len(self.imagine.down) * self.imagine.bottleneck
        self.out = nn.Linear(bottlenecks, full.head.out_features)

    def joint(self, parts: list[Tensor], present: Tensor) -> Tensor:
        return self.out(self.imagine(torch.cat(parts, dim=1))[1])

    def unimodal(self, parts: list[Tensor], present: Tensor) -> Tensor:
        alone = [[p if p is part else torch.zeros_like(p) for p in parts] for part in parts]
        return torch.stack([self.joint(inputs, present) for inputs in alone])

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        parts, present = self.features(data, step.indices)
        draws = torch.rand(present.shape).masked_fill(~present, -1.0)
        seen = present & ((draws > 0.5) | (draws == draws.amax(dim=0)))
        x = torch.cat([part * s.unsqueeze(1) for part, s in zip(parts, seen, strict=True)], dim=1)
        with torch.no_grad():
            full = torch.cat(self.full.features(data, step.indices)[0], dim=1)
        known = torch.cat([p.unsqueeze(1).expand_as(part) for part, p in zip(parts, present, strict=True)], dim=1)

        imagined, bottlenecks = self.imagine(x)
        back, _ = self.cycle(imagined)
        mse = ((imagined - full).square() * known).sum() / known.sum()
        loss = F.cross_entropy(self.out(bottlenecks), self.labels(data, step.indices))
        return loss + self.weight * mse + 2 * F.mse_loss(back, x.detach())


def build_mmin(data: MultimodalData, s: Setting) -> Built:
    full = ConcatModel(s.encoders(data), head_of(data, s.width * len(data.modalities)))
    fit(full, s.sgd(full), data, epochs=s.epochs, batch_size=BATCH_SIZE, seed=s.seed, progress=False)
    model = MMIN(full, s.encoders(data), s.width, weight=s.own)
    return model, s.sgd(model)
