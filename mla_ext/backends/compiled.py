"""The compiled ops, of whichever device: what the backends "cpu" and "cuda" share."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import _fakes, _library
from ..checks import describe
from ..links import see
from ..projection import Projection
from ..step import HeadStep
from .base import Backend

__all__ = ["Compiled"]

if _library.load_error is None:
    _fakes.register()
    # The overloads themselves: finding them by the arguments takes half of a call's time.
    _feature_mean = torch.ops.mla_ext.feature_mean.default
    _rls_update_ = torch.ops.mla_ext.rls_update_.default
    _head_step_ = torch.ops.mla_ext.head_step_.default
    _settle_ = torch.ops.mla_ext.settle_.default
    _entropy_fusion = torch.ops.mla_ext.entropy_fusion.default


class Compiled(Backend):
    """All but where it runs."""

    def feature_mean(self, features: Tensor) -> Tensor:
        mean: Tensor = _feature_mean(features)
        return mean

    def rls_update_(
        self, projection: Tensor, feature_mean: Tensor, alpha: float | Tensor, forget: float | Tensor, normalize: bool
    ) -> None:
        _rls_update_(projection, feature_mean, _number("alpha", alpha), _number("forget", forget), normalize)

    def head_step_(self, step: HeadStep) -> None:
        hyper, P = step.hyper, step.projection
        lr, lr_tensor = _number_or_tensor(hyper.lr, step.weight.device)
        alpha, alpha_tensor = _number_or_tensor(hyper.alpha, step.weight.device)
        _head_step_(
            step.weight,
            step.grad,
            step.momentum_buffer,
            P.base,
            P.beta,
            P.rows,
            P.count,
            step.feature_mean,
            step.step,
            lr,
            _number("momentum", hyper.momentum),
            _number("dampening", hyper.dampening),
            _number("weight_decay", hyper.weight_decay),
            hyper.nesterov,
            hyper.maximize,
            alpha,
            _number("forget", hyper.forget),
            hyper.absorb == "before",
            hyper.normalize,
            step.grad_scale,
            step.found_inf,
            lr_tensor,
            alpha_tensor,
            P.nu,
            self.product(step),
        )

    def product(self, step: HeadStep) -> Tensor | None:
        """G P, where PyTorch multiplies faster than the kernel."""
        return None

    def settle_(self, projection: Projection) -> None:
        if projection.rows is not None and projection.base is not None:
            _settle_(projection.base, None, projection.rows, projection.count)

    def entropy_fusion(
        self, logits: Tensor, present: Tensor | None, temperatures: Tensor | None, equal: bool
    ) -> tuple[Tensor, Tensor]:
        fused, weights = _entropy_fusion(logits, present, temperatures, equal)
        return fused, weights


_read: MutableMapping[Tensor, tuple[int, float]] = WeakIdKeyDictionary()  # the version that was read, and its value


def _number(name: str, value: float | Tensor) -> float:
    """A number on the host. One on a GPU is read when it has changed, not at every step: the host has to wait for it.

    A captured graph keeps the value that was read before.
    """
    if not isinstance(value, Tensor) or value.device.type == "cpu" or torch.compiler.is_compiling():
        return float(value)
    version, number = _read.get(value, (None, 0.0))
    if version != value._version:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{name}: expected a number, or a tensor on the CPU, to capture a step; got {describe(value)}"
                + see("cuda_graphs#cuda-graphs")
            )
        number = float(value)
        _read[value] = value._version, number
    return number


def _number_or_tensor(value: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """A tensor on a GPU or in a graph is left to the kernel: nobody waits for it, or compiles its value in."""
    if isinstance(value, Tensor) and (value.device.type != "cpu" or torch.compiler.is_compiling()):
        return 0.0, value.to(device, torch.float32).reshape(())
    return float(value), None
