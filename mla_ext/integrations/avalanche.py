"""Avalanche: a plugin that attaches the heads of a strategy's model, and keeps their P through all experiences."""

from __future__ import annotations

from typing import Any

from avalanche.core import SupervisedPlugin

from .. import head_state
from ..layers import named_heads
from ..projected import ProjectedOptimizer
from ..projection import Projection
from ..recording import Handles

__all__ = ["ProjectionPlugin"]


class ProjectionPlugin(SupervisedPlugin):  # type: ignore[misc]  # Avalanche may not be installed
    """For a strategy whose optimizer is a ProjectedSGD or a ProjectedAdamW.

    A strategy may reset its optimizer before an experience, and a head that gets more classes is a new weight (C', s).
    Either would drop P. P (s, s) acts on the features, so it fits all the same, and goes on with the layer's name.

    Args:
        heads: a regular expression for the names of the layers to attach, as of `find_heads`. All, by default.
        bias: as of `attach`.

    Training raises TypeError where the optimizer has no projections, ValueError where no layer has such a name.
    """

    def __init__(self, heads: str = ".*", bias: bool = False) -> None:
        super().__init__()
        self.heads, self.bias = heads, bias
        self._handles = Handles([])
        self._kept: dict[str, Projection] = {}

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """The first experience resets the optimizer, which may have been loaded."""
        self._keep(strategy)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """The strategy has adapted model and optimizer to the experience."""
        optimizer = strategy.optimizer
        if not isinstance(optimizer, ProjectedOptimizer):
            raise TypeError(f"optimizer: expected a ProjectedSGD or ProjectedAdamW, got {type(optimizer).__name__}")
        layers = named_heads(strategy.model, self.heads)
        for name, layer in layers.items():
            state = optimizer.state[layer.weight]
            if name in self._kept and not head_state.has_projection(state):
                head_state.set_projection(state, self._kept[name])
        self._handles.remove()
        self._handles = Handles([optimizer.attach(layer, bias=self.bias) for layer in layers.values()])

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Evaluation may grow a head."""
        self._keep(strategy)

    def _keep(self, strategy: Any) -> None:
        for name, layer in named_heads(strategy.model, self.heads).items():
            P = head_state.get_projection(strategy.optimizer.state.get(layer.weight, {}))
            if P is not None:
                self._kept[name] = P
