"""Reads what the steps of training and evaluation need, in worker processes ahead of time if asked to."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .data import MultimodalData
from .model import Step
from .recordings import RecordingError

__all__ = ["AtHand", "Loader"]


class _Request(NamedTuple):
    """A step, with its indices as an array, which costs less to send to a worker than a tensor."""

    modalities: tuple[str, ...]
    indices: np.ndarray
    training: bool
    seed: int  # of random transforms


# Of each modality of a step the samples that have it, in their order, in the stored dtype.
_Batch: TypeAlias = dict[str, Tensor]


class _Batches(Dataset["_Batch | RecordingError"]):
    """A map-style dataset whose items are batches, and whose "indices" are the requests for them."""

    def __init__(self, data: MultimodalData) -> None:
        self.data = data

    def __getitem__(self, request: _Request) -> _Batch | RecordingError:
        modalities, array, training, seed = request
        indices, batch = torch.from_numpy(array), {}
        try:
            for modality in modalities:
                having = indices[self.data.present(modality)[indices]]
                if len(having) > 0:
                    batch[modality] = self.data.read(modality, having, training, seed)
        except RecordingError as error:  # returned: raised in a worker it would come with a page of traceback
            return error
        return batch


class AtHand(MultimodalData):
    """The data, of which the recordings of one step are read and on the device. Others are read when asked for."""

    def __init__(self, data: MultimodalData, step: Step, batch: _Batch) -> None:
        self.__dict__.update(vars(data))
        self.__dict__["at_hand"] = (step.indices, batch)

    def inputs(self, modality: str, indices: Tensor) -> Tensor:
        ours, batch = self.__dict__["at_hand"]
        if modality in batch and torch.equal(indices, ours[self.present(modality)[ours]]):
            inputs: Tensor = batch[modality].float()
            return inputs
        return super().inputs(modality, indices)


class Loader:
    """Reads batches of `data` for a model on `device`: in this process, or in `workers` of its own, ahead of time.

    The workers live until the loader is closed: use it in a `with` statement.
    """

    def __init__(self, data: MultimodalData, device: torch.device, workers: int = 0) -> None:
        self.data, self.device = data, device
        self.waiting = 0.0  # the share of the last training epoch in which steps waited for their batch
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._requests: list[_Request] = []
        self._batches = DataLoader(
            _Batches(data),
            batch_size=None,  # a request is a batch already
            sampler=self._requests,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else it would draw from the global one
            # Forked workers share the data. Others would get a copy of what is memory-mapped.
            multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
        )

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the workers now. An error on its way would keep them alive, for workers that start later to inherit."""
        end = getattr(self._batches._iterator, "_shutdown_workers", None)
        if end is not None:
            with suppress(RuntimeError):  # by torch, while it waits for a worker that was killed
                end()

    def read(self, steps: Sequence[Step], training: bool = False, seed: int = 0) -> Iterator[AtHand]:
        """For each step the data with its batch at hand. RecordingError, by name, for what cannot be read."""
        self._requests[:] = [_Request(step.modalities, step.indices.numpy(), training, seed) for step in steps]
        start, waited = time.perf_counter(), 0.0
        with torch.device("cpu"):  # where a DataLoader draws its seed, whatever the user's default
            batches = iter(self._batches)
        for step in steps:
            begin = time.perf_counter()
            batch = self._next(batches)
            waited += time.perf_counter() - begin
            if isinstance(batch, RecordingError):
                raise batch
            yield AtHand(self.data, step, batch if self._copies is None else self._on_gpu(batch, self._copies))
        if training:
            self.waiting = waited / (time.perf_counter() - start)

    def _next(self, batches: Iterator[Any]) -> Any:
        try:
            return next(batches)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            # The sockets of a killed worker close a moment before torch can tell that it is dead.
            if self._batches.num_workers == 0:
                raise
            raise RuntimeError(f"DataLoader worker lost its connection ({type(error).__name__})") from error

    def _on_gpu(self, batch: _Batch, copies: torch.cuda.Stream) -> _Batch:
        """Copied on a stream of its own, while the GPU is still busy with the steps before."""
        with torch.cuda.stream(copies):
            moved = {modality: x.to(self.device, non_blocking=True) for modality, x in batch.items()}
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(copies)
        for x in moved.values():
            x.record_stream(current)  # its memory is not given away before the current stream has used it
        return moved


def _as_it_is(batch: Any) -> Any:
    return batch
