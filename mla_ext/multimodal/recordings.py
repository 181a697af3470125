"""The recordings of one modality: a tensor, a memory-mapped array, or any object with `__len__` and `__getitem__`.

A tensor is checked when the data are made. The others may be larger than memory, so they are checked as they are read.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "MapStyle",
    "RecordingError",
    "Recordings",
    "Standardized",
    "as_tensor",
    "check",
    "describe",
    "read",
    "shape",
]

_PART = 2**20  # numbers that are computed with at once


class RecordingError(RuntimeError):
    """A recording could not be read, or is not what it should be. The message names the sample."""


class MapStyle(Protocol):
    """A map-style dataset: `__getitem__(i)` is recording i, a tensor of one shape and dtype for all i."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


Recordings: TypeAlias = "Tensor | np.memmap[Any, Any] | MapStyle"  # in memory and on disk: (recordings, *shape)


@dataclass(frozen=True)
class Standardized:
    """Recordings, each feature shifted and scaled when it is read: float32 of ((x − origin) − mean) · scale.

    origin, mean and scale are float64 (features,). The mean is that of x − origin.
    """

    source: Recordings
    origin: Tensor
    mean: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Tensor:
        return self.apply(read(self.source, torch.tensor([index], device="cpu")))[0]

    def apply(self, x: Tensor) -> Tensor:
        """(n, *shape) of any dtype -> float32. A few rows at a time, as float64 takes 2-8 times the memory of x."""
        flat = x.reshape(len(x), -1)
        out = torch.empty_like(flat, dtype=torch.float32)
        rows = _rows_of_a_part(flat.shape[1])
        for part, result in zip(flat.split(rows), out.split(rows), strict=True):
            result.copy_((part.double() - self.origin - self.mean) * self.scale)
        return out.reshape(x.shape)

    @classmethod
    def over(cls, source: Recordings, uses: Tensor) -> Standardized:
        """Mean 0 and variance 1 where recording i counts `uses[i]` times, int64 (recordings,), not all 0.

        A feature that is constant there becomes 0 everywhere. Recordings that do not count are not read.
        """
        first = uses.nonzero()[0]
        # Deviations from one of the samples: exactly 0 for a constant feature, and E[d²] ≤ N var, so no cancellation.
        origin = read(source, first).flatten().double()
        mean, square = torch.zeros_like(origin), torch.zeros_like(origin)
        weights = uses.double() / uses.sum()
        for rows in _parts(source):
            weight = weights[rows]
            if weight.any():
                deviation = read(source, rows).reshape(len(rows), -1).double() - origin
                mean += weight @ deviation
                square += weight @ deviation.square()
        variance = square - mean.square()
        return cls(source, origin, mean, torch.where(variance > 0, variance.rsqrt(), 0.0))


def shape(recordings: Recordings) -> tuple[int, ...]:
    """Of one recording."""
    if isinstance(recordings, Standardized):
        return shape(recordings.source)
    if isinstance(recordings, Tensor | np.memmap):
        return tuple(recordings.shape[1:])
    return tuple(recordings[0].shape)


def read(
    recordings: Recordings, rows: Tensor, seed: int = 0, name: Callable[[int], str] = "recording {}".format
) -> Tensor:
    """The recordings `rows`, int64 (n,) on the CPU: (n, *shape), in their own dtype.

    Random transforms of an object draw from generators that `seed` and the row alone decide, so that neither the order
    of reading nor the number of processes matters. The global generators are left as they were. RecordingError with
    `name(row)` for a recording that cannot be read or is not as the others or not finite.
    """
    if isinstance(recordings, Tensor):
        return recordings[rows]
    if isinstance(recordings, Standardized):
        return recordings.apply(read(recordings.source, rows, seed, name))
    if isinstance(recordings, np.memmap):
        values = as_tensor(recordings[rows.numpy()])
        _let_go(recordings)
    else:
        values = _items(recordings, rows.tolist(), seed, name)
    if values.is_floating_point():
        finite = values.float().isfinite().flatten(1).all(dim=1)
        if not finite.all():
            row = int(rows[~finite][0])
            raise RecordingError(f"{name(row)}: has NaN or infinite values (as float32), expected finite numbers")
    return values


def whole(recordings: Recordings) -> Iterator[Tensor]:
    """All recordings, a few at a time."""
    for rows in _parts(recordings):
        yield read(recordings, rows)


def check(key: str, recordings: Recordings) -> None:
    """ValueError unless they can be recordings; of those on disk or made one by one, the first is read."""
    if isinstance(recordings, np.memmap):
        _check_like_numbers(key, recordings, recordings.dtype.kind in "biuf")
    elif isinstance(recordings, Tensor):
        _check_like_numbers(key, recordings, not recordings.is_complex())
        _check_finite(key, recordings)
    elif isinstance(recordings, np.ndarray) or not all(hasattr(recordings, m) for m in ("__len__", "__getitem__")):
        raise ValueError(
            f"{key}: has {describe(recordings)}, expected numbers of shape (recordings, features, ...): a tensor, a "
            "memory-mapped array, or an object with __len__ and __getitem__"
        )
    elif len(recordings) == 0:
        raise ValueError(f"{key}: is empty, expected at least one recording")
    else:
        try:
            read(recordings, torch.zeros(1, dtype=torch.int64, device="cpu"))
        except RecordingError as error:
            raise ValueError(f"{key}: {error}") from error


def describe(value: object) -> str:
    if isinstance(value, np.ndarray | Tensor):
        return f"type {type(value).__name__}, dtype {value.dtype} and shape {tuple(value.shape)}"
    return f"type {type(value).__name__}"


def as_tensor(array: np.ndarray) -> Tensor:
    """The array, in its dtype where torch computes with it and as float32 otherwise. Copied only where needed."""
    unsupported = (array.dtype.kind == "u" and array.dtype.itemsize > 1) or array.dtype.itemsize > 8
    dtype = np.float32 if unsupported else array.dtype.newbyteorder("=")
    with np.errstate(over="ignore"):  # becomes infinite, and is refused for that
        return torch.from_numpy(array.astype(dtype, order="C", copy=False))


def _items(recordings: MapStyle, rows: list[int], seed: int, name: Callable[[int], str]) -> Tensor:
    items: list[Tensor] = []
    for row in rows:
        with _seeded(seed, row):
            try:
                item = recordings[row]
            except Exception as error:  # what decodes files can fail in any way
                reason = f"{type(error).__name__}: {error}"
                raise RecordingError(f"{name(row)}: cannot be read: {reason}") from error
        if not isinstance(item, Tensor) or item.is_complex() or item.ndim == 0 or item.numel() == 0:
            raise RecordingError(f"{name(row)}: has {describe(item)}, expected a tensor of numbers")
        if items and (item.shape, item.dtype) != (items[0].shape, items[0].dtype):
            raise RecordingError(
                f"{name(row)}: has {describe(item)}, expected {describe(items[0])}, as {name(rows[0])} has"
            )
        items.append(item)
    if not items:
        first = recordings[0]
        return first.new_empty(0, *first.shape)
    return torch.stack(items)


@contextmanager
def _seeded(seed: int, row: int) -> Iterator[None]:
    """Seeds the generators that transforms draw from, and gives them back as they were."""
    entropy = np.random.SeedSequence((seed, row)).generate_state(2, np.uint32).tolist()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(entropy[0] << 32 | entropy[1])
        random.seed(entropy[0])
        np.random.seed(entropy[1])
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _let_go(array: np.memmap[Any, Any]) -> None:
    """Forget the pages that were read: the system may keep them, but they are no memory of this process."""
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.base
    if base is not None and array.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def _rows_of_a_part(features: int) -> int:
    return max(1, _PART // features)


def _parts(recordings: Recordings) -> tuple[Tensor, ...]:
    rows = _rows_of_a_part(int(np.prod(shape(recordings))))
    parts: tuple[Tensor, ...] = torch.arange(len(recordings), device="cpu").split(rows)
    return parts


def _check_like_numbers(key: str, values: Tensor | np.memmap[Any, Any], numbers: bool) -> None:
    if not numbers or values.ndim < 2 or 0 in values.shape:
        raise ValueError(f"{key}: has {describe(values)}, expected numbers of shape (recordings, features, ...)")


def _check_finite(key: str, values: Tensor) -> None:
    if values.is_floating_point():
        finite = values.float().isfinite()
        if not finite.all():
            first = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"{key}: {int((~finite).sum())} of {values.numel()} values are NaN or infinite (as float32), the "
                f"first is {values[tuple(first)].item()} at {first}; expected finite numbers"
            )
