"""BalanceMM, the toolkit of BalanceBenchmark: its MLA with the projection and the fusion of this package.

Two imports take the place of two definitions there. `GSPlugin` goes into `balancemm/trainer/MLA_trainer.py`, where the
class of that name is. `calculate_gating_weights` goes into the body of the class `BaseClassifierMLAModel`, in
`balancemm/models/avclassify_model.py`, where the method of that name is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import checks
from ..ops import entropy_fusion
from ..optimizer import ProjectedSGD

__all__ = ["GSPlugin", "calculate_gating_weights"]


class GSPlugin:
    """The projection P of a shared head, for a training loop with an optimizer of its own.

    That optimizer should be SGD: Adam divides the gradient element by element, which undoes the projection.

    Args:
        device, gs_flag: not used. P lies beside the head's weight, and has its width.
        alpha: α of the update, as of `ProjectedSGD`, with ν the running mean of ‖h̄‖².

    Attributes: exp_count, which the trainer counts its steps with.
    """

    def __init__(self, device: Any = None, gs_flag: bool = True, alpha: float = 0.1) -> None:
        self.exp_count = 0
        self.alpha = alpha
        self._projected: nn.Parameter | None = None

    def before_update(
        self,
        model: nn.Linear,
        before_batch_input: Tensor,
        batch_index: int,
        len_dataloader: int,
        train_exp_counter: int,
    ) -> None:
        """Between backward and step: G ← G P in model.weight.grad (C, s), and P absorbs the mean of the features.

        model is the head, before_batch_input (N, s) what it was fed. The other arguments are not used: α does not
        follow the number of the batch, and P is the identity before the first one.
        Raises ValueError where the head has no gradient, or is another than before.
        """
        weight = model.weight
        if weight.grad is None:
            raise ValueError("model: expected a head with a gradient, so call this after backward; got None")
        if self._projected is None:
            self._projected = nn.Parameter(torch.empty_like(weight))
            self._optimizer = ProjectedSGD([self._projected], lr=1.0, maximize=True, alpha=self.alpha)
        checks.check_tensor("model.weight", weight, tuple(self._projected.shape), device=self._projected.device)
        # A step uphill from 0, with the rate 1, ends at G P: by the optimizer's kernels, over all ranks.
        with torch.no_grad():
            self._projected.zero_()
        self._optimizer.observe(self._projected, before_batch_input)
        self._projected.grad = weight.grad
        self._optimizer.step()
        weight.grad.copy_(self._projected.detach())

    @property
    def Pl(self) -> Tensor:
        """P (s, s), a copy. Raises ValueError before the first call of `before_update`."""
        if self._projected is None:
            raise ValueError("Pl: expected a call of before_update first, which tells the size of P; got none")
        return self._optimizer.projection(self._projected)


class _Model(Protocol):
    modalitys: Iterable[str]


def calculate_gating_weights(self: _Model, output: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """λ of each modality, (N, 1): the softmax of −entropy over the modalities, for each sample (eq. 7-8).

    output: the logits (N, C) of each of self.modalitys. Any number of modalities, and logits of any size.
    """
    names = [*self.modalitys]
    _, weights = entropy_fusion(torch.stack([output[name] for name in names]))
    return {name: weight.unsqueeze(1) for name, weight in zip(names, weights, strict=True)}
