"""The method in plain PyTorch, as the baselines of the speed tables: SGD with momentum, absorb after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mla_ext.ops import Projection
from mla_ext.reference import accumulate_dtype

from ..released import released_update

LR, MOMENTUM, ALPHA = 1e-3, 0.9, 0.1


@dataclass
class State:
    """What one head's step reads and changes, all on one device."""

    weight: Tensor  # (C, s)
    grad: Tensor  # (C, s), in the dtype of weight
    momentum_buffer: Tensor  # (C, s), in the accumulate dtype, as P and feature_mean
    projection: Projection  # P (s, s)
    feature_mean: Tensor  # (s,)
    step: Tensor

    @property
    def nbytes(self) -> int:
        P = self.projection
        own = (self.weight, self.grad, self.momentum_buffer, self.feature_mean, P.base, P.rows)
        return sum(tensor.nbytes for tensor in own if tensor is not None)

    def restart_(self) -> None:
        """Back to the start, in place, as CUDA graphs want it."""
        self.weight.copy_(make_weight(*self.weight.shape))
        self.momentum_buffer.zero_()
        self.projection.reset_()
        self.step.zero_()


def make_weight(C: int, s: int) -> Tensor:
    return torch.rand(C, s, generator=torch.Generator().manual_seed(0))


def make_state(
    C: int, s: int, device: str, dtype: torch.dtype = torch.float32, rank: int | None = None, deferred: int = 0
) -> State:
    """Every time the same. P is the identity: in the rank form with `rank` rows, or dense with `deferred` rows."""
    generator = torch.Generator().manual_seed(1)
    accumulate = {"dtype": accumulate_dtype(dtype), "device": device}
    return State(
        weight=make_weight(C, s).to(device, dtype),
        grad=(10 * (torch.rand(C, s, generator=generator) - 0.5)).to(device, dtype),  # a step shows in bfloat16 too
        momentum_buffer=torch.zeros(C, s, **accumulate),
        projection=Projection.identity(s, rank, deferred, **accumulate),
        feature_mean=torch.rand(s, generator=generator).to(**accumulate),
        step=torch.zeros((), device=device),
    )


def released(state: State) -> None:
    """The operations of the released code one by one. Its numbers are its own: see `released_update`."""
    P = released_update(state.projection.base, state.feature_mean, ALPHA)
    state.projection.base = P
    grad = state.grad.to(P.dtype) @ P.t()
    state.momentum_buffer.mul_(MOMENTUM).add_(grad)
    state.weight.add_(state.momentum_buffer, alpha=-LR)


def project_and_absorb(grad: Tensor, feature_mean: Tensor, P: Tensor) -> Tensor:
    """The projected gradient (C, s); P (s, s) absorbs feature_mean (s,). One product, one rank-1 update."""
    Z = torch.cat([grad.to(P.dtype), feature_mean.unsqueeze(0)]) @ P
    k = Z[-1]
    d = ALPHA + torch.dot(feature_mean, k)
    P.addr_(k / d, k, alpha=-1)
    return Z[:-1]


def best(state: State) -> None:
    """The best plain PyTorch for the same mathematics as ours."""
    projected = project_and_absorb(state.grad, state.feature_mean, state.projection.base)
    state.momentum_buffer.mul_(MOMENTUM).add_(projected)
    state.weight.add_(state.momentum_buffer, alpha=-LR)


def best_fusion(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest eager PyTorch we know for the entropy fusion of logits (M, N, C), none missing or infinite."""
    f = logits.to(accumulate_dtype(logits.dtype))
    log_p = f.log_softmax(-1)
    entropy = -log_p.exp().mul_(log_p).sum(-1)
    weights = (-entropy).softmax(0)
    fused = weights[0].unsqueeze(-1) * f[0]
    for weight, rows in zip(weights[1:], f[1:], strict=True):
        fused.addcmul_(weight.unsqueeze(-1), rows)
    return fused.to(logits.dtype), weights


class PlainProjection:
    """What projects a head's gradient in plain PyTorch, to be called between backward() and the step of an SGD."""

    def __init__(self, head: nn.Linear) -> None:
        self.weight = head.weight
        self.P = torch.eye(head.in_features, device=head.weight.device)
        head.register_forward_pre_hook(self._record)

    def _record(self, head: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.feature_mean = args[0].detach().mean(0)

    def projected(self) -> Tensor:
        return project_and_absorb(self.weight.grad, self.feature_mean, self.P)

    def __call__(self) -> None:
        self.weight.grad = self.projected()


class PlainProjectedSGD(Optimizer):
    """The method as a user would write it in plain PyTorch: SGD by hand, one head's gradient projected before it."""

    def __init__(self, params: Iterable[Tensor], head: nn.Linear, lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.projection = PlainProjection(head)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                grad = self.projection.projected() if param is self.projection.weight else param.grad
                grad = grad.add(param, alpha=group["weight_decay"])
                state = self.state[param]
                if "momentum_buffer" in state:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(grad)
                else:
                    state["momentum_buffer"] = grad.clone()
                param.add_(state["momentum_buffer"], alpha=-group["lr"])


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """Replays a CUDA graph of the call, which must change its tensors in place. Capturing calls it four times."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
