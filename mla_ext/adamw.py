"""ProjectedAdamW: torch.optim.AdamW whose attached weights step along projected updates."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.adamw import adamw

from . import checks
from .projected import ProjectedOptimizer
from .reference import Hyperparameters, accumulate_dtype
from .rules import AdamW as Update
from .rules import Rule
from .sharding import local_shard

__all__ = ["ProjectedAdamW"]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
INIT_TAKES_AMSGRAD = "amsgrad" in signature(AdamW._init_group).parameters  # in PyTorch 2.4


class ProjectedAdamW(ProjectedOptimizer, AdamW):
    """AdamW with the projection of MLA (arXiv 2311.10707, eq. 4-6) for the weights of attached heads.

    An attached weight W (C, s) carries a projection P (s, s). Its step projects what AdamW is about to add, decoupled
    weight decay included, W ← W − γ (λW + m̂ / (√v̂ + ε)) P, and then absorbs the mean of the head inputs as
    ProjectedSGD's does. A projected gradient would leak: AdamW divides it element by element, which turns it out of
    what P leaves. The moments are of gradients that are not projected, in float32 (float64 for float64 weights).
    All other parameters, biases included, step exactly as torch.optim.AdamW.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, fused: as torch.optim.AdamW's.
        alpha, alpha_scale, absorb, normalize, forget, rank, differentiable, backend, process_group, heads: as those of
            ProjectedSGD.

    Raises TypeError or ValueError for bad arguments, naming the argument; a failed step changes nothing.

    Under torch.amp.GradScaler the host waits for the overflow check of parameters that are not attached, as with
    torch.optim.AdamW, unless fused=True. Attached weights never wait.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        alpha: float | Tensor = 0.1,
        alpha_scale: str | None = "features",
        absorb: str = "after",
        normalize: bool = False,
        forget: float = 0.0,
        rank: int | str | None = "auto",
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        backend: str = "auto",
        process_group: dist.ProcessGroup | str | None = None,
        heads: Iterable[nn.Module] | None = None,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {
            "amsgrad": amsgrad,
            "maximize": maximize,
            "alpha": alpha,
            "alpha_scale": alpha_scale,
            "absorb": absorb,
            "normalize": normalize,
            "forget": forget,
        }
        defaults |= {"rank": rank, "capturable": capturable, "foreach": foreach, "fused": fused}
        # What AdamW's own code looks for in a group.
        defaults |= {"differentiable": False, "decoupled_weight_decay": True}
        self._begin(params, defaults, differentiable, backend, process_group, heads)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer; the group's hyperparameters are checked first."""
        merged = self.defaults | (param_group if isinstance(param_group, dict) else {})
        checks.check_adamw(merged["betas"], merged["eps"], merged["amsgrad"])
        for name, value in (("lr", merged["lr"]), ("betas", merged["betas"][0])):
            if isinstance(value, Tensor) and merged["foreach"] and not merged["capturable"]:
                raise ValueError(f"{name}: expected numbers with foreach=True and capturable=False, got a tensor")
        super().add_param_group(param_group)

    def _rule(
        self, weight: Tensor, state: dict[str, Any], group: dict[str, Any], hyper: Hyperparameters
    ) -> Rule | None:
        dtype = accumulate_dtype(weight.dtype)
        names = MOMENTS if group["amsgrad"] else MOMENTS[:2]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
            elif state[name].dtype != dtype or state[name].device != weight.device:  # the model was converted
                state[name] = state[name].to(weight.device, dtype)
        moments = [local_shard(state[name]) for name in names]
        return Update(moments[0], moments[1], moments[2] if group["amsgrad"] else None, group["betas"], group["eps"])

    def _check_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            if param.grad is not None and param.grad.is_sparse:
                raise TypeError(f"grad: expected a dense tensor, as AdamW needs, got {checks.describe(param.grad)}")

    def _step_plain(
        self, group: dict[str, Any], params: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if not group["fused"]:  # only the fused kernel reads scale and overflow itself
            if found_inf is not None and found_inf.item():
                return
            for param in params if grad_scale is not None else ():
                param.grad = cast("Tensor", param.grad) / cast("Tensor", grad_scale)
            grad_scale = found_inf = None
        if found_inf is not None:  # which torch subtracts from its 0-d steps
            found_inf = found_inf.reshape(())
        lists: list[list[Tensor]] = [[] for _ in range(6)]  # params, grads, the moments and steps: filled by torch
        filled: list[Any] = [*lists]
        if INIT_TAKES_AMSGRAD:
            filled.insert(2, group["amsgrad"])
        has_complex = self._init_group({**group, "params": params}, *filled)  # type: ignore[no-untyped-call]
        adamw(
            lists[0],
            lists[1],
            lists[2],
            lists[3],
            lists[4],
            lists[5],
            foreach=group["foreach"],
            capturable=group["capturable"],
            fused=group["fused"],
            grad_scale=grad_scale,
            found_inf=found_inf,
            has_complex=has_complex,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
