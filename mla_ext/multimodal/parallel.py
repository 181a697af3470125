"""Data parallelism of the training loop: each rank works on its share of every batch.

Everything here does nothing, at no cost, in a process of its own (torch.distributed not initialised).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["broadcast", "is_main", "is_parallel", "joined", "share", "sum_gradients", "sum_over_ranks", "wait_for_all"]


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """As one of the processes that torchrun started, if it did. They speak NCCL on GPUs and gloo on CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_parallel() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return not is_parallel() or dist.get_rank() == 0


def share(indices: Tensor) -> Tensor:
    """This rank's part of a batch (N,); empty where there are more ranks than samples."""
    return indices[dist.get_rank() :: dist.get_world_size()] if is_parallel() else indices


def broadcast(module: nn.Module) -> None:
    """Give every rank the first one's parameters and buffers."""
    if is_parallel():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by their sums over the ranks, which have them for the same parameters."""
    if is_parallel():
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        summed = sum_over_ranks(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, summed.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Summed in place, and returned."""
    if is_parallel():
        dist.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    if is_parallel():
        dist.barrier()
