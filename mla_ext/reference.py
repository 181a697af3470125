"""The method in plain PyTorch: the specification every other backend is tested against.

MLA: "Multimodal Representation Learning by Alternating Unimodal Adaptation" (Zhang, Yoon, Bansal, Yao;
CVPR 2024; arXiv 2311.10707), with the recursive least squares (RLS) of orthogonal weight modification
(Zeng et al. 2019). Shapes: N samples, s features, C classes, M modalities.

Every function returns new tensors, on any device, and computes in `accumulate_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Hyperparameters",
    "accumulate_dtype",
    "adamw_update",
    "calibrated_fusion",
    "entropy_fusion",
    "feature_mean",
    "head_step",
    "next_nu",
    "rank_compress",
    "rank_head_step",
    "rank_product",
    "rank_update",
    "rls_update",
    "sgd_update",
]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of P, of h̄ and of a projected weight's momentum buffer: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Hyperparameters:
    """Of one head step: torch.optim.SGD's own, and those of the projection. Numbers may be 0-d tensors.

    `alpha` is the α and `forget` the forgetting rate ρ of the RLS update; `normalize` divides P by its Frobenius
    norm after each update; `absorb` says which P projects: "after" P_{t-1} (the paper's text), "before" P_t (OWM).
    `project` says what: the "gradient", before momentum and weight decay, or the "update" with both in it.
    """

    lr: float | Tensor = 1e-3
    momentum: float | Tensor = 0.0
    dampening: float = 0.0
    weight_decay: float | Tensor = 0.0
    nesterov: bool = False
    maximize: bool = False
    alpha: float | Tensor = 0.1
    absorb: str = "after"
    normalize: bool = False
    forget: float | Tensor = 0.0
    project: str = "gradient"


def feature_mean(features: Tensor) -> Tensor:
    """h̄ = (1/N) Σ_k h(x_k), eq. 4: (N, s) -> (s,)."""
    return features.to(accumulate_dtype(features.dtype)).mean(dim=0)


NU_RATE = 0.1
"""How fast ν follows ‖h̄‖²: the exponential mean's weight of the newest."""


def next_nu(nu: Tensor, feature_mean: Tensor) -> Tensor:
    """ν_t, the exponential mean of ‖h̄‖² with this one in it: 0-d. It is 0 before the first, and then ‖h̄‖² itself.

    With alpha_scale="features" the α of an update is αν_t, so that P is the same whatever the scale of the features.
    The caller keeps the old ν where the update has no finite d.
    """
    squares = torch.dot(feature_mean, feature_mean)
    return torch.where(nu == 0, squares, nu + NU_RATE * (squares - nu))


def rls_update(
    projection: Tensor,
    feature_mean: Tensor,
    alpha: float | Tensor = 0.1,
    forget: float | Tensor = 0.0,
    normalize: bool = False,
) -> Tensor:
    """P_t = P − k kᵀ / d, with k = P h̄ and d = α + h̄ᵀk (eq. 4-5); then (1−ρ)P + ρI; then P / ‖P‖_F.

    k is divided by √|d| before the outer product, so that P stays symmetric to the last bit. In exact arithmetic
    d ≥ α; where rounding has made P slightly indefinite d may be negative, and the signed update then mends P
    (clamping d instead lets P diverge). A mean that makes d infinite or NaN is not absorbed.
    """
    P, h = projection, feature_mean
    k = P @ h
    d = alpha + torch.dot(h, k)
    u = k / d.abs().sqrt()
    updated = (1 - forget) * (P - d.sign() * torch.outer(u, u))
    updated = updated + forget * torch.eye(len(P), dtype=P.dtype, device=P.device)
    if normalize:
        updated = updated / torch.linalg.matrix_norm(updated)
    return torch.where(d.isfinite() & (d != 0), updated, P)


RANK_NOISE = 64
"""In the rank form, an eigenvalue of P below so many epsilon of β is nothing but rounding."""


def _rank_noise(dtype: torch.dtype) -> float:
    return RANK_NOISE * torch.finfo(dtype).eps


def rank_product(X: Tensor, beta: Tensor, rows: Tensor) -> Tensor:
    """X P of the rank form P = βI − KᵀK, as βX − (X Kᵀ) K: X (..., s), beta 0-d, rows K (r, s) -> (..., s)."""
    return beta * X - (X @ rows.T) @ rows


def rank_update(
    beta: Tensor,
    rows: Tensor,
    feature_mean: Tensor,
    alpha: float | Tensor = 0.1,
    forget: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor]:
    """`rls_update` of P = βI − KᵀK: one row k / √d more, with k = P h̄; then β ← (1−ρ)β + ρ and K ← √(1−ρ) K.

    Returns β (0-d) and K (r + 1, s), or both as they were where d is infinite, NaN or 0. In exact arithmetic
    h̄ᵀk ≥ |k|²/β, because 0 ⪯ P ⪯ βI; the larger of the two is used. k is P h̄ only to within εβ|h̄|, and an error that
    is large beside √d would make P indefinite: α is at least RANK_NOISE εβ|h̄|². Where h̄ᵀk is less than that, P has
    nothing left along h̄, and no row is added.
    """
    h = feature_mean
    k = rank_product(h, beta, rows)
    along, least = torch.dot(h, k), torch.where(beta > 0, torch.dot(k, k) / beta, 0.0)
    noise = _rank_noise(rows.dtype) * beta * torch.dot(h, h)
    d = noise.clamp(min=alpha) + torch.maximum(along, least)
    if not (d.isfinite() and d > 0):
        return beta, rows
    if along >= noise:
        rows = torch.cat([rows, (k / d.sqrt()).unsqueeze(0)])
    return (1 - forget) * beta + forget, (1 - forget) ** 0.5 * rows


def rank_compress(beta: Tensor, rows: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """P = βI − KᵀK with `keep` rows: its strongest directions stay as they are, the rest becomes one number.

    With K Kᵀ = V Λ Vᵀ, P has the eigenvalue p_i = β − λ_i on the direction vᵢᵀK / √λ_i, and β on whatever is
    orthogonal to K. The directions of the `keep` largest λ stay. Everything else gets the mean of its eigenvalues,
    β' = (Σ dropped p_i + (s − r) β) / (s − keep), so the trace stays. A row is √(β' − p_i) times its direction. A p_i
    that is nothing but rounding becomes RANK_NOISE εβ: none becomes negative over the compressions.
    Returns β' (0-d) and K (keep, s). The eigenvectors are found in float64.
    """
    r, s = rows.shape
    K, b = rows.double(), beta.double()
    values, vectors = torch.linalg.eigh(K @ K.T)
    values, vectors = values.flip(0), vectors.flip(1)  # the largest first
    p = (b - values).clamp(min=_rank_noise(rows.dtype) * b)
    rest = ((p[keep:].sum() + (s - r) * b) / (s - keep)).clamp(min=0) if s > keep else b
    values, p = values[:keep], p[:keep]
    is_there = (values > 1e-15 * b) & (rest > p)  # a direction that is not there becomes a row of zeros
    factor = torch.where(is_there, (rest - p) / values, 0.0).sqrt()
    return rest.to(beta.dtype), (factor.unsqueeze(1) * (vectors[:, :keep].T @ K)).to(rows.dtype)


def sgd_update(
    weight: Tensor, grad: Tensor, momentum_buffer: Tensor | None, step: Tensor, hyper: Hyperparameters
) -> tuple[Tensor, Tensor | None]:
    """X (C, s) of torch.optim.SGD's step W ← W − γX, in the dtype of grad (C, s), and the new momentum_buffer."""
    g = -grad if hyper.maximize else grad
    g = g + hyper.weight_decay * weight.to(g.dtype)
    if momentum_buffer is not None:
        blended = hyper.momentum * momentum_buffer + (1 - hyper.dampening) * g
        momentum_buffer = torch.where(step == 0, g, blended)
        g = g + hyper.momentum * momentum_buffer if hyper.nesterov else momentum_buffer
    return g, momentum_buffer


def adamw_update(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor, Tensor | None],
    step: Tensor,
    hyper: Hyperparameters,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """X (C, s) of torch.optim.AdamW's step W ← W − γX, decoupled decay included, and the new moments.

    moments: exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq, each like grad (C, s); step: 0-d, the steps before
    this one; hyper: its weight_decay and maximize.
    """
    g = -grad if hyper.maximize else grad
    first, second, largest = moments
    first = first + (1 - betas[0]) * (g - first)
    second = betas[1] * second + (1 - betas[1]) * g * g
    largest = None if largest is None else torch.maximum(largest, second)
    t = step.double() + 1
    scale = ((second if largest is None else largest) / (1 - betas[1] ** t)).sqrt() + eps
    return hyper.weight_decay * weight.to(g.dtype) + first / (1 - betas[0] ** t) / scale, (first, second, largest)


def _project(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    step: Tensor,
    hyper: Hyperparameters,
    product: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor | None]:
    """The new weight and momentum_buffer; `product` multiplies by P."""
    if hyper.project == "update":
        update, momentum_buffer = sgd_update(weight, grad, momentum_buffer, step, hyper)
        update = product(update)
    else:
        update, momentum_buffer = sgd_update(weight, product(grad), momentum_buffer, step, hyper)
    return (weight.to(update.dtype) - hyper.lr * update).to(weight.dtype), momentum_buffer


def head_step(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    projection: Tensor,
    feature_mean: Tensor | None,
    step: Tensor,
    hyper: Hyperparameters,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One step of the shared head, eq. 6: W ← W − γ · SGD(G P), and P ← rls_update(P, h̄).

    With hyper.project == "update" it is W ← W − γ · SGD(G) P.

    Args: weight and grad (C, s); momentum_buffer (C, s) or None without momentum; projection P (s, s);
    feature_mean h̄ (s,) or None when there is nothing to absorb; step 0-d, the updates momentum_buffer has seen.
    Returns the new weight, momentum_buffer and projection. As in torch.optim.SGD the first step's momentum buffer
    is the gradient itself, and weight decay is added after the projection.
    """
    absorbed = projection
    if feature_mean is not None:
        absorbed = rls_update(projection, feature_mean, hyper.alpha, hyper.forget, hyper.normalize)
    P = absorbed if hyper.absorb == "before" else projection
    weight, momentum_buffer = _project(weight, grad.to(P.dtype), momentum_buffer, step, hyper, lambda X: X @ P)
    return weight, momentum_buffer, absorbed


def rank_head_step(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    beta: Tensor,
    rows: Tensor,
    capacity: int,
    feature_mean: Tensor | None,
    step: Tensor,
    hyper: Hyperparameters,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`head_step` with P = βI − KᵀK: beta 0-d and rows K (r, s), r < capacity, in place of the projection.

    Returns the new weight, momentum_buffer, beta and rows. When there are `capacity` rows the step ends with
    rank_compress to capacity // 2. `normalize` needs all of P: a ValueError.
    """
    if hyper.normalize:
        raise ValueError("normalize: expected False with the rank form, got True")
    absorbed = (beta, rows)
    if feature_mean is not None:
        absorbed = rank_update(beta, rows, feature_mean, hyper.alpha, hyper.forget)
    P = absorbed if hyper.absorb == "before" else (beta, rows)
    weight, momentum_buffer = _project(
        weight, grad.to(rows.dtype), momentum_buffer, step, hyper, lambda X: rank_product(X, *P)
    )
    if len(absorbed[1]) == capacity:
        absorbed = rank_compress(*absorbed, capacity // 2)
    return weight, momentum_buffer, *absorbed


def entropy_fusion(
    logits: Tensor, present: Tensor | None = None, temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fuse the modalities' logits sample by sample, each weighted by its certainty (eq. 7-9).

    f_m = logits_m / T_m; e_m = −Σ_c p log p of p = softmax(f_m); λ = softmax_m(−e_m) over the present modalities;
    fused = Σ_m λ_m f_m. logits (M, N, C), present bool (M, N), temperatures T (M,), 1 where None -> fused (N, C) in
    the dtype of logits, weights λ (M, N). An absent modality has λ = 0 and its logits are never used; a sample with
    none has all-zero λ and fused logits.
    """
    f, present = _scaled(logits, present, temperatures)
    log_p = f.log_softmax(dim=-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0 * p).sum(dim=-1)
    weights = (-entropy).masked_fill(~present, -torch.inf).softmax(dim=0)
    weights = torch.where(present, weights, torch.zeros_like(weights))
    return _weighted(weights, f, logits.dtype)


def calibrated_fusion(
    logits: Tensor, present: Tensor | None = None, temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mean of f_m = logits_m / T_m over the present modalities: `entropy_fusion` with equal λ."""
    f, present = _scaled(logits, present, temperatures)
    weights = present.to(f.dtype) / present.sum(dim=0).clamp(min=1)
    return _weighted(weights, f, logits.dtype)


def _scaled(logits: Tensor, present: Tensor | None, temperatures: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits / T in the accumulate dtype, zero where absent; and what is present."""
    if present is None:
        present = logits.new_ones(logits.shape[:2], dtype=torch.bool)
    f = logits.to(accumulate_dtype(logits.dtype)).masked_fill(~present.unsqueeze(-1), 0.0)
    return (f if temperatures is None else f / temperatures.to(f).view(-1, 1, 1)), present


def _weighted(weights: Tensor, f: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (weights.unsqueeze(-1) * f).sum(dim=0).to(dtype), weights
