"""ProjectedSGD: torch.optim.SGD whose attached weights step along projected gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .gather import HYPERPARAMETERS, Gathered
from .plain import check_plain_step, plain_step
from .projected import ProjectedOptimizer
from .reference import Hyperparameters
from .rules import SGD, Rule

__all__ = ["ProjectedSGD"]

SGD_UPDATE = SGD()


class ProjectedSGD(ProjectedOptimizer):
    """SGD with the gradient modification of MLA (arXiv 2311.10707, eq. 4-6) for the weights of attached heads.

    An attached weight W (C, s) carries a projection P (s, s), at first the identity. Its step projects the gradient,
    G ← G P, does what torch.optim.SGD does with the result, and absorbs the mean h̄ (s,) of the head inputs since the
    last step, P ← P − k kᵀ / d with k = P h̄ and d = αν + h̄ᵀk: later steps leave the head's answers to what it was
    fed before as they were. All other parameters, biases included, step exactly as torch.optim.SGD.

    Args:
        params: parameters or parameter groups, as for any optimizer.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD's.
        alpha: α > 0 of the update. Smaller protects more; may be changed by schedulers like lr.
        alpha_scale: "features" makes ν the running mean of ‖h̄‖², so that P is the same whatever the scale of the
            features. None makes ν 1, the paper's fixed α.
        absorb: "after" projects with P_{t-1} and then absorbs; "before" absorbs first and projects with P_t (OWM).
        normalize: divide P by its Frobenius norm after each update; a dense P only.
        forget: the rate ρ in [0, 1] of P ← (1−ρ) P + ρ I after each update, which gives plasticity back.
        project: "gradient", as the paper has it; weight decay and momentum come after it, and move W along what P
            protects. "update" projects what SGD is about to add to W, with both in it, so that nothing leaks; the
            momentum buffer then holds gradients that are not projected. Elementwise operations of PyTorch make the
            update, so it costs some passes over W more.
        rank: None keeps P as a matrix (s, s), the paper's form. A number R >= 2 keeps P as R rows and one number: exact
            until R updates, then the R/2 strongest directions stay exact. "auto" takes the one that costs less.
        capturable: make lr and alpha tensors on the device of their parameters, where a CUDA graph that captured the
            step reads what schedulers write.
        foreach, fused: as torch.optim.SGD's, for parameters that are not attached.
        differentiable: must be False.
        heads: modules to `attach`.
        backend: "auto", or one of `mla_ext.build_info()["backends"]`.
        process_group: whose ranks share their features: None is the default group once torch.distributed is
            initialised, "local" never communicates.

    Raises TypeError or ValueError for bad arguments, naming the argument; a failed step changes nothing.

    Under torch.amp.GradScaler the kernels divide by its scale themselves, and an overflow leaves weights, momentum
    and P as they are. `mla_ext/head_state.py` says what the state of an attached weight is.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        alpha: float | Tensor = 0.1,
        alpha_scale: str | None = "features",
        absorb: str = "after",
        normalize: bool = False,
        forget: float = 0.0,
        project: str = "gradient",
        rank: int | str | None = "auto",
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        backend: str = "auto",
        process_group: dist.ProcessGroup | str | None = None,
        heads: Iterable[nn.Module] | None = None,
    ) -> None:
        hyper = Hyperparameters(
            lr, momentum, dampening, weight_decay, nesterov, maximize, alpha, absorb, normalize, forget, project
        )
        defaults = {name: getattr(hyper, name) for name in HYPERPARAMETERS}
        defaults |= {"alpha_scale": alpha_scale, "rank": rank, "capturable": capturable}
        defaults |= {"foreach": foreach, "fused": fused}
        self._begin(params, defaults, differentiable, backend, process_group, heads)

    def _rule(
        self, weight: Tensor, state: dict[str, Any], group: dict[str, Any], hyper: Hyperparameters
    ) -> Rule | None:
        return SGD_UPDATE if hyper.project == "update" else None

    def _step_at_once(self, steps: Gathered) -> bool:
        return steps.run_at_once(self.backend)

    def _check_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        check_plain_step(self.state, group, params)

    def _step_plain(
        self, group: dict[str, Any], params: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        plain_step(self.state, group, params, grad_scale, found_inf)
