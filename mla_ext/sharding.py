"""Head weights that are sharded over ranks: DTensor, as FSDP2's fully_shard leaves them, or whole on one rank each.

P acts on the input side of a weight (C, s), so each rank can step the classes it holds by itself, with the same P.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _library

__all__ = ["check_ranks", "check_sharding", "local_shard", "local_shards", "whole"]

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def check_ranks(process_group: Any) -> None:
    """Raises ValueError for an optimizer that ZeroRedundancyOptimizer is making, unless its ranks step on their own.

    That gives each rank other parameters, so the rank with a head would wait for ranks that never come.
    """
    if process_group == "local" or not (dist.is_available() and dist.is_initialized()):
        return
    frame = sys._getframe().f_back
    while frame is not None:
        if type(frame.f_locals.get("self")).__name__ == "ZeroRedundancyOptimizer":
            raise ValueError(
                "process_group: expected 'local' in a ZeroRedundancyOptimizer, whose ranks step different parameters, "
                f"got {process_group!r}"
            )
        frame = frame.f_back


def check_sharding(name: str, weight: Tensor) -> None:
    """Raises ValueError for a weight that is sharded along its features."""
    if _is_sharded(weight):
        tensor = _dtensors()
        if any(placement not in (tensor.Shard(0), tensor.Replicate()) for placement in weight.placements):
            raise ValueError(f"{name}: expected a weight sharded along dimension 0 only, got {weight.placements}")


def local_shards(weight: Tensor, grad: Tensor, momentum_buffer: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """This rank's rows of each; plain tensors are returned as they are."""
    if not _is_sharded(weight):
        return weight, grad, momentum_buffer
    return _shard(weight), _shard(grad), None if momentum_buffer is None else _shard(momentum_buffer)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's rows; a plain tensor is returned as it is."""
    return _shard(tensor) if _is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor, gathered from the ranks if it is sharded: a collective then."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def _shard(sharded: Tensor) -> Tensor:
    shard = cast("DTensor", sharded).to_local()
    if shard.numel() == 0:  # more ranks than classes: a row that nobody keeps, so that this rank absorbs too
        return shard.new_zeros(1, *shard.shape[1:])
    return shard


def _is_sharded(weight: Tensor) -> TypeGuard[DTensor]:
    if type(weight) in (Tensor, nn.Parameter):
        return False
    return isinstance(weight, _dtensors().DTensor)


def _dtensors() -> Any:
    """torch.distributed.tensor: importing it takes a second, and most programs never need it."""
    name = "_tensor" if _library.is_older(torch.__version__, (2, 5)) else "tensor"
    return importlib.import_module(f"torch.distributed.{name}")
