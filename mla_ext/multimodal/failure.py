"""What can end a training run from outside, said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

__all__ = ["explained"]


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Gives errors that come from the machine a message that says what happened, where, and what helps.

    Raises torch.OutOfMemoryError, MemoryError or RuntimeError from the error as it was. Other errors pass.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{where}: the GPU is out of memory: {_SMALLER}") from error
    except MemoryError as error:
        raise MemoryError(f"{where}: out of memory: {_SMALLER}") from error
    except RuntimeError as error:
        of_torch = type(error) is RuntimeError or (dist.is_available() and isinstance(error, dist.DistError))
        if not of_torch:
            raise
        text = str(error)
        if "can't allocate memory" in text:  # of torch, on a CPU
            raise MemoryError(f"{where}: out of memory: {_SMALLER}") from error
        if text.startswith("DataLoader worker"):
            reason = text.partition("\n")[0].rstrip(". ")
            raise RuntimeError(f"{where}: {reason}: fewer workers need less memory") from error
        if any(name in text for name in ("gloo", "NCCL")):
            raise RuntimeError(f"{where}: another rank stopped: {text.partition(chr(10))[0]}") from error
        raise


_SMALLER = "a smaller batch_size needs less, and so does amp"
