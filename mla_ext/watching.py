"""torch's wrapper around an optimizer's step, which costs as much as a small step: only where somebody watches."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = ["watchable"]

_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__
Step = TypeVar("Step", bound=Callable[..., Any])


def watchable(step: Step) -> Step:
    """The method `step` of an optimizer, in torch's wrapper for those who registered hooks, and for a profiler."""
    in_wrapper = Optimizer.profile_hook_step(step)

    @wraps(step)
    def method(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        if not _is_watched(self):
            return step(self, closure)
        return in_wrapper(self) if closure is None else in_wrapper(self, closure)

    method.hooked = True  # type: ignore[attr-defined]  # torch wraps what has no such mark
    return cast("Step", method)


def _is_watched(optimizer: Optimizer) -> bool:
    if getattr(type(optimizer).step, "__code__", None) is _WRAPPER:  # torch has wrapped a subclass's, which calls this
        return False
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    return any(hooks) or (not torch.compiler.is_compiling() and torch._C._autograd._profiler_enabled())
