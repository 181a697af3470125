"""timm: our optimizers by name, `create_optimizer_v2(model, "projectedsgd", heads=[model.get_classifier()])`."""

from __future__ import annotations

from timm.optim import OptimInfo, list_optimizers
from timm.optim._optim_factory import default_registry

from ..adamw import ProjectedAdamW
from ..optimizer import ProjectedSGD

__all__ = ["register"]

OPTIMIZERS = (
    OptimInfo("projectedsgd", ProjectedSGD, "SGD with projected gradients", has_eps=False, has_momentum=True),
    OptimInfo("projectedadamw", ProjectedAdamW, "AdamW with projected updates", has_betas=True),
)


def register() -> None:
    """Add "projectedsgd" and "projectedadamw" to timm's registry of optimizers. A second call changes nothing.

    As with timm's own "sgd", momentum is 0.9 unless it is given, and a model gets timm's groups of parameters. timm
    does not tell an optimizer which layer is the head, so pass `heads=`, or `attach` it afterwards.
    """
    known = list_optimizers()
    for info in OPTIMIZERS:
        if info.name not in known:
            default_registry.register(info)
