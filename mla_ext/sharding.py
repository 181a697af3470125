"""Head weights that are sharded over ranks (DTensor, as FSDP2's fully_shard leaves them).

P acts on the input side of a weight (C, s), so each rank can step the classes it holds by itself, with the same P.
"""

from __future__ import annotations

from torch import Tensor, nn


def check_sharding(name: str, weight: Tensor) -> None:
    """Raises ValueError for a weight that is sharded along its features."""
    if _is_sharded(weight):
        from torch.distributed.tensor import Replicate, Shard

        if any(placement not in (Shard(0), Replicate()) for placement in weight.placements):
            raise ValueError(f"{name}: expected a weight sharded along dimension 0 only, got {weight.placements}")


def local_shards(weight: Tensor, grad: Tensor, momentum_buffer: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """This rank's rows of each; plain tensors are returned as they are."""
    if not _is_sharded(weight):
        return weight, grad, momentum_buffer
    shards = [None if t is None else t.to_local() for t in (weight, grad, momentum_buffer)]
    if shards[0].numel() == 0:  # more ranks than classes: a row that nobody keeps, so that this rank absorbs too
        shards = [None if t is None else t.new_zeros(1, t.shape[1]) for t in shards]
    return tuple(shards)


def _is_sharded(weight: Tensor) -> bool:
    if type(weight) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # takes a second, and most programs never need it

    return isinstance(weight, DTensor)
