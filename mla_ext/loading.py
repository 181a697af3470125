"""What load_state_dict of an optimizer with projections does beside torch's own work."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, head_state
from .layers import row_size

if TYPE_CHECKING:
    from .projected import ProjectedOptimizer

__all__ = ["load"]


def load(optimizer: ProjectedOptimizer, torchs: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]) -> bool:
    """Load `state_dict` by torch's own method, and each P as its saved form says.

    Returns whether it is of an optimizer that has not stepped yet. Raises ValueError for a projection that does not
    fit its weight.
    """
    groups = optimizer.param_groups
    kept = [{n: group[n] for n in ("lr", "alpha") if isinstance(group[n], Tensor)} for group in groups]
    saved: dict[Tensor, dict[str, Any]] = {}
    was_new = False

    def before(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        nonlocal was_new
        was_new = is_new(state_dict)
        state_dict, of_params = read(groups, state_dict)
        saved.update(of_params)
        return state_dict

    def after(loaded: Optimizer) -> None:
        for group, tensors in zip(loaded.param_groups, kept, strict=True):
            for name, tensor in tensors.items():  # captured graphs know these tensors, not new ones
                group[name] = tensor.copy_(torch.as_tensor(group[name]).reshape(tensor.shape))
            for param in group["params"]:
                restore(loaded.state, param, saved.get(param, {}), group, optimizer.backend)

    # Between the user's hooks: those before see what torch's do, and those after see the state as it is kept.
    hooks = (
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after, prepend=True),
    )
    try:
        torchs(state_dict)
    finally:
        for hook in hooks:
            hook.remove()
    return was_new


def is_new(state_dict: dict[str, Any]) -> bool:
    """Whether it is of an optimizer with projections that has not stepped yet, so that each P is the identity."""
    return not state_dict["state"] and all("alpha" in group for group in state_dict["param_groups"])


def read(
    param_groups: list[dict[str, Any]], state_dict: dict[str, Any]
) -> tuple[dict[str, Any], dict[Tensor, dict[str, Any]]]:
    """The state_dict to load into these groups, and what it holds for each parameter.

    Hyperparameters that the saved groups lack, as torch.optim.SGD's do, stay what they are here. Raises ValueError for
    a projection that does not fit its weight.
    """
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) == len(param_groups):
        completed = [
            {name: value for name, value in ours.items() if name != "params"} | _dated(theirs)
            for ours, theirs in zip(param_groups, saved_groups, strict=True)
        ]
        state_dict = {**state_dict, "param_groups": completed}
    ids = [index for group in saved_groups for index in group["params"]]
    params = [param for group in param_groups for param in group["params"]]
    saved = {param: state_dict["state"].get(i, {}) for i, param in zip(ids, params, strict=False)}
    for param, state in saved.items():
        head_state.check(state, param)
    return state_dict, saved


def _dated(group: dict[str, Any]) -> dict[str, Any]:
    """A saved group with what its version did without saying so."""
    return {"alpha_scale": None} | group if "alpha" in group else group


def restore(
    states: MutableMapping[Tensor, dict[str, Any]],
    param: Tensor,
    saved: dict[str, Any],
    group: dict[str, Any],
    backend: str,
) -> None:
    """Give a projected weight the state that was saved: torch casts it to the weight's dtype, and copies nothing."""
    if head_state.get_projection(saved) is None:
        return
    state = states[param]
    for name, dtype in head_state.dtypes_of(param).items():
        value = saved.get(name)
        if isinstance(value, Tensor):
            value = value.to(param.device, dtype, copy=True)
            state[name] = value if value.dim() > 1 else value.reshape(())
        elif value is not None:
            state[name] = torch.tensor(value, dtype=dtype, device=param.device)
    P = head_state.get_projection(state)
    assert P is not None
    if group["rank"] != "auto":
        P = P.with_rank(head_state.form_of(group, row_size(param), backends.choose(backend, param.device)))
    head_state.set_projection(state, P)
