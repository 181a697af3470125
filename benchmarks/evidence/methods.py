"""The methods that are compared, side by side: what each one's head is and what its steps minimise.

Definitions follow the methods' own code, as far as they go for any number of modalities; where they do not, the
docstring says what was made of them. All of them get the same encoders, one per modality, of `width` features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mla_ext import ConcatModel, MultimodalData, ProjectedSGD, SharedHeadModel, fit
from mla_ext.multimodal.encoders import build_encoder
from mla_ext.multimodal.late import LateFusionModel, per_modality_loss
from mla_ext.multimodal.model import JointModel, Logits, MultimodalModel, Step

from ..released import project_as_released

MOMENTUM = 0.9
ALPHA = 0.1  # of the rows that do not choose it
BATCH_SIZE = 64


@dataclass(frozen=True)
class Setting:
    """What one training run is told. `own` is the value of the method's own hyperparameter, if it has one."""

    lr: float
    weight_decay: float
    own: float | None
    seed: int
    epochs: int
    width: int

    def encoders(self, data: MultimodalData) -> dict[str, nn.Module]:
        return {m: build_encoder("small", data.features[m].shape[1:], self.width) for m in data.modalities}

    def sgd(self, model: nn.Module) -> SGD:
        return SGD(model.parameters(), lr=self.lr, momentum=MOMENTUM, weight_decay=self.weight_decay)


# ---- Joint training --------------------------------------------------------------------------------------------------


class Sum(LateFusionModel):
    """z = Σ_m (W_m h_m + b_m), over the modalities that a sample has."""

    def joint(self, parts: list[Tensor], present: Tensor) -> Tensor:
        return self.summed(parts, present)

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        return JointModel.loss(self, data, step)


class ProbedModel(JointModel):
    """Where no part of the head belongs to one modality: a linear probe on each encoder's features says what it knows.

    The probes learn beside the model, on features that are detached: nothing else feels them.
    """

    def __init__(self, encoders: dict[str, nn.Module], width: int, classes: int) -> None:
        super().__init__(encoders)
        self.out = nn.Linear(width, classes)
        self.probes = nn.ModuleList(nn.Linear(width, classes) for _ in encoders)

    def unimodal(self, parts: list[Tensor], present: Tensor) -> Tensor:
        return torch.stack([probe(part.detach()) for probe, part in zip(self.probes, parts, strict=True)])

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        parts, present = self.features(data, step.indices)
        labels = self.labels(data, step.indices)
        probes = per_modality_loss(self.unimodal(parts, present), present, labels)
        return F.cross_entropy(self.joint(parts, present), labels) + probes


class FiLM(ProbedModel):
    """z = W_o(γ(a) ⊙ v + β(a)) + b, with a the first modality and v the last; further ones modulate v in turn."""

    def __init__(self, encoders: dict[str, nn.Module], width: int, classes: int) -> None:
        super().__init__(encoders, width, classes)
        self.films = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(len(encoders) - 1))

    def joint(self, parts: list[Tensor], present: Tensor) -> Tensor:
        modulated = parts[-1]
        for film, part in zip(self.films, parts[:-1], strict=True):
            gamma, beta = film(part).chunk(2, dim=1)
            modulated = gamma * modulated + beta
        return self.out(modulated)


class BiGated(ProbedModel):
    """z = W_o(σ(W_x a) ⊙ W_y v) + b, with v the last modality; of more than two, every other one is a gate."""

    def __init__(self, encoders: dict[str, nn.Module], width: int, classes: int) -> None:
        super().__init__(encoders, width, classes)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in encoders)

    def joint(self, parts: list[Tensor], present: Tensor) -> Tensor:
        *gates, gated = (layer(part) for layer, part in zip(self.layers, parts, strict=True))
        for gate in gates:
            gated = gate.sigmoid() * gated
        return self.out(gated)


class OGMGE(ConcatModel):
    """On-the-fly gradient modulation with generalisation enhancement (Peng et al. 2022), on concatenation.

    s_u = mean_i softmax(z_u)_i[y_i] over the samples that have u; ρ_u = s_u / Σ of the others'; k_u = 1 − tanh(α ρ_u)
    if ρ_u > 1, else 1. Before the step every encoder's gradient becomes k_u g + N(0, (std(g) + 1e-8)²).
    """

    def __init__(self, encoders: dict[str, nn.Module], head: nn.Linear, alpha: float) -> None:
        super().__init__(encoders, head)
        self.alpha = alpha
        self.coefficients: list[Tensor] = []

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        parts, present = self.features(data, step.indices)
        labels = self.labels(data, step.indices)
        with torch.no_grad():
            right = self.unimodal(parts, present).softmax(dim=-1)[:, torch.arange(len(labels)), labels]
            scores = (right * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
            ratios = scores / (scores.sum() - scores).clamp(min=1e-8)
            self.coefficients = list(torch.where(ratios > 1, 1 - torch.tanh(self.alpha * ratios), 1.0))
        return F.cross_entropy(self.joint(parts, present), labels)

    @torch.no_grad()
    def modulate(self, *_: object) -> None:
        """A hook that runs before the optimizer's step."""
        for encoder, k in zip(self.encoders.values(), self.coefficients, strict=True):
            for parameter in encoder.parameters():
                grad = parameter.grad
                grad.copy_(k * grad + torch.randn_like(grad) * (grad.std(correction=0) + 1e-8))


class QMF(Sum):
    """Quality-aware fusion (Zhang et al. 2023): z = Σ_m c_m z_m with c_m = logsumexp(z_m) / 10.

    Loss: CE(z) + Σ_m CE(z_m) + λ Σ_m rank(c_m). The rank term compares each sample with the next of the batch: the
    one whose cross entropy, summed over training and scaled to [0, 1], is lower should be the more confident.
    """

    def __init__(self, encoders: dict[str, nn.Module], heads: list[nn.Linear], weight: float, samples: int) -> None:
        super().__init__(encoders, heads)
        self.weight = weight
        self.register_buffer("history", torch.zeros(len(encoders), samples))

    def joint(self, parts: list[Tensor], present: Tensor) -> Tensor:
        z = self.unimodal(parts, present).masked_fill(~present.unsqueeze(-1), 0.0)
        return (confidence(z).unsqueeze(-1) * z).sum(dim=0)

    def loss(self, data: MultimodalData, step: Step) -> Tensor:
        parts, present = self.features(data, step.indices)
        labels = self.labels(data, step.indices)
        z = self.unimodal(parts, present)
        loss = F.cross_entropy(self.joint(parts, present), labels) + per_modality_loss(z, present, labels)
        for z_m, has, history in zip(z, present, self.history, strict=True):
            indices = step.indices[has]
            if len(indices) > 1:
                history[indices] += F.cross_entropy(z_m[has].detach(), labels[has], reduction="none")
                loss = loss + self.weight * rank_loss(confidence(z_m[has]), history[indices], history)
        return loss


def confidence(z: Tensor) -> Tensor:
    return z.logsumexp(dim=-1) / 10


def rank_loss(c: Tensor, losses: Tensor, history: Tensor) -> Tensor:
    """A margin ranking of confidences c (N,) between neighbours, by their running cross entropies `losses` (N,)."""
    losses = (losses - history.min()) / (history.max() - history.min()).clamp(min=1e-12)
    difference = losses - losses.roll(-1)
    return F.margin_ranking_loss(c, c.roll(-1) + difference, -difference.sign())


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


# ---- Alternation -----------------------------------------------------------------------------------------------------


class MeanFused(SharedHeadModel):
    """Alternation whose prediction is the plain mean of the logits, also where the epoch is chosen."""

    def logits(self, data: MultimodalData, indices: Tensor) -> Logits:
        logits = super().logits(data, indices)
        return logits._replace(joint=logits.unimodal.sum(dim=0) / logits.present.sum(dim=0).unsqueeze(-1))


# ---- Building them ---------------------------------------------------------------------------------------------------

Built = tuple[MultimodalModel, Optimizer]
Build = Callable[[MultimodalData, Setting], Built]


def head_of(data: MultimodalData, width: int) -> nn.Linear:
    return nn.Linear(width, len(data.classes))


def heads_of(data: MultimodalData, width: int, shared: bool = False) -> list[nn.Linear]:
    if shared:
        return [head_of(data, width)] * len(data.modalities)
    return [head_of(data, width) for _ in data.modalities]


def build_concat(data: MultimodalData, s: Setting) -> Built:
    model = ConcatModel(s.encoders(data), head_of(data, s.width * len(data.modalities)))
    return model, s.sgd(model)


def build_heads(kind: type[LateFusionModel], shared: bool = False) -> Build:
    """A head for each modality, or one for all."""

    def build(data: MultimodalData, s: Setting) -> Built:
        model = kind(s.encoders(data), heads_of(data, s.width, shared))
        return model, s.sgd(model)

    return build


def build_probed(kind: type[FiLM | BiGated]) -> Build:
    def build(data: MultimodalData, s: Setting) -> Built:
        model = kind(s.encoders(data), s.width, len(data.classes))
        return model, s.sgd(model)

    return build


def build_ogm_ge(data: MultimodalData, s: Setting) -> Built:
    model = OGMGE(s.encoders(data), head_of(data, s.width * len(data.modalities)), alpha=s.own)
    optimizer = s.sgd(model)
    optimizer.register_step_pre_hook(model.modulate)
    return model, optimizer


def build_qmf(data: MultimodalData, s: Setting) -> Built:
    model = QMF(s.encoders(data), heads_of(data, s.width), weight=s.own, samples=len(data))
    return model, s.sgd(model)


def build_mmin(data: MultimodalData, s: Setting) -> Built:
    full = ConcatModel(s.encoders(data), head_of(data, s.width * len(data.modalities)))
    fit(full, s.sgd(full), data, epochs=s.epochs, batch_size=BATCH_SIZE, seed=s.seed, progress=False)
    model = MMIN(full, s.encoders(data), s.width, weight=s.own)
    return model, s.sgd(model)


def build_alternating(data: MultimodalData, s: Setting) -> Built:
    model = SharedHeadModel(s.encoders(data), head_of(data, s.width))
    return model, s.sgd(model)


def build_mla(data: MultimodalData, s: Setting, head_decay: float | None = None, **projection: object) -> Built:
    model = SharedHeadModel(s.encoders(data), head_of(data, s.width))
    head = {"params": model.head.parameters(), "weight_decay": s.weight_decay if head_decay is None else head_decay}
    options = {"alpha": s.own, "weight_decay": s.weight_decay} | projection
    groups = [{"params": model.encoders.parameters()}, head]
    optimizer = ProjectedSGD(groups, lr=s.lr, momentum=MOMENTUM, **options)
    optimizer.attach(model.head)
    return model, optimizer


def build_mla_before(data: MultimodalData, s: Setting) -> Built:
    return build_mla(data, s, absorb="before")


def build_mla_forget(data: MultimodalData, s: Setting) -> Built:
    return build_mla(data, s, alpha=ALPHA, forget=s.own)


def build_mla_undecayed(data: MultimodalData, s: Setting) -> Built:
    """Weight decay comes after the projection: it shrinks what is protected, too, and no G P can restore that."""
    return build_mla(data, s, head_decay=0.0)


def build_released(data: MultimodalData, s: Setting) -> Built:
    model = SharedHeadModel(s.encoders(data), head_of(data, s.width))
    optimizer = s.sgd(model)
    steps_per_epoch = len(model.steps(data, BATCH_SIZE, "given", torch.Generator()))
    project_as_released(optimizer, model.head, steps_per_epoch)
    return model, optimizer


@dataclass(frozen=True)
class Method:
    """A row of the tables."""

    title: str
    build: Build
    unimodal: str  # where its per-modality accuracies come from
    own: str | None = None  # the hyperparameter that it has beside those of SGD
    candidates: tuple[float, ...] = ()


HEAD, COLUMNS = "the modality's head", "the modality's columns of the head, plus b/M"
PROBE, SHARED = "a linear probe of its features", "the shared head"
ALPHAS = ("alpha", (0.01, 1.0, 100.0, 10000.0))

METHODS = {
    "sum": Method("Sum", build_heads(Sum), HEAD),
    "concat": Method("Concat", build_concat, COLUMNS),
    "late": Method("Late fusion", build_heads(LateFusionModel), HEAD),
    "film": Method("FiLM", build_probed(FiLM), PROBE),
    "bigated": Method("BiGated", build_probed(BiGated), PROBE),
    "ogm-ge": Method("OGM-GE", build_ogm_ge, COLUMNS, "alpha", (0.1, 0.3, 0.5, 0.8)),
    "qmf": Method("QMF", build_qmf, HEAD, "rank weight", (0.1, 0.3, 1.0, 3.0)),
    "mmin": Method("MMIN", build_mmin, "the model, all others missing", "imagination weight", (1.0, 4.0, 16.0, 64.0)),
    "alternating": Method("Alternation alone", build_alternating, SHARED),
    "released": Method("Released code, projection on", build_released, SHARED),
    "mla": Method("MLA", build_mla, SHARED, *ALPHAS),
    "mla-before": Method("MLA, absorb before", build_mla_before, SHARED, *ALPHAS),
    "mla-undecayed": Method("MLA, head not decayed", build_mla_undecayed, SHARED, *ALPHAS),
    "mla-forget": Method("MLA, forget", build_mla_forget, SHARED, "forget", (1e-3, 1e-2, 1e-1, 3e-1)),
    "sum-shared": Method("Sum, one shared head", build_heads(Sum, shared=True), SHARED),
    "late-shared": Method("Late fusion, one shared head", build_heads(LateFusionModel, shared=True), SHARED),
}
