"""MMPareto: an encoder steps in a direction that neither the joint nor its own loss objects to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_ext import ConcatModel, MultimodalData
from mla_ext.multimodal.model import Step

from .common import Built, Setting, head_of, heads_of


class MMPareto(ConcatModel):
    """Pareto integration of the joint and the unimodal loss (Wei and Hu, ICML 2024), on concatenation.

    Loss: CE(z) + Σ_m CE(z_m), z_m of a head of its own. An encoder has two gradients, g of the joint loss and g_m of
    its own. Its step follows `common_direction`, as long as g + g_m would be, times γ. The heads have plain gradients.

    The authors' code makes up the length tensor by tensor; here it is that of the whole encoder, of which the paper
    speaks. γ is 1.5 in their code.
    """

    def __init__(self, encoders: dict[str, nn.Module], head: nn.Linear, heads: list[nn.Linear], gamma: float) -> None:
        super().__init__(encoders, head)
        self.heads, self.gamma = nn.ModuleList(heads), gamma
        self.directions: list[Tensor] = []

    def unimodal(self, parts: list[Tensor], present: Tensor) -> Tensor:
        return torch.stack([head(part) for head, part in zip(self.heads, parts, strict=True)])

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        parts, present = self.features(data, step.indices)
        labels = self.labels(data, step.indices)
        joint = F.cross_entropy(self.joint(parts, present), labels)
        alone = [  # the mean over the samples that have the modality; 0, with a gradient of 0, where none has it
            F.cross_entropy(z[has], labels[has], reduction="sum") / has.sum().clamp(min=1)
            for z, has in zip(self.unimodal(parts, present), present, strict=True)
        ]
        self.directions = []
        for encoder, own in zip(self.encoders.values(), alone, strict=True):
            g, g_m = gradient(joint, encoder), gradient(own, encoder)
            direction = common_direction(g, g_m)
            length = (g + g_m).norm() / direction.norm().clamp(min=1e-12)
            self.directions.append(self.gamma * length * direction)
        return joint + sum(alone)

    @torch.no_grad()
    def redirect(self, *_: object) -> None:
        """A hook that runs before the optimizer's step."""
        for encoder, direction in zip(self.encoders.values(), self.directions, strict=True):
            parameters = list(encoder.parameters())
            for parameter, part in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
                parameter.grad.copy_(part.view_as(parameter))


def gradient(loss: Tensor, module: nn.Module) -> Tensor:
    """Of all parameters of the module, flat."""
    grads = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    return torch.cat([grad.flatten() for grad in grads])


def common_direction(a: Tensor, b: Tensor) -> Tensor:
    """(a + b) / 2 where a·b ≥ 0; else the shortest vector between a and b, whose product with both is not negative."""
    if a @ b >= 0:
        return (a + b) / 2
    share = ((b @ (b - a)) / (b - a).square().sum()).clamp(0, 1)
    return share * a + (1 - share) * b


def build_mmpareto(data: MultimodalData, s: Setting) -> Built:
    head = head_of(data, s.width * len(data.modalities))
    model = MMPareto(s.encoders(data), head, heads_of(data, s.width), gamma=s.own)
    optimizer = s.sgd(model)
    optimizer.register_step_pre_hook(model.redirect)
    return model, optimizer
