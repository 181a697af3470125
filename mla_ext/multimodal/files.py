"""Multimodal data in files: one `.npz`, or a folder of `.npy` files that may be larger than memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..links import see
from .data import MultimodalData, check_names
from .recordings import Recordings, as_tensor, describe

__all__ = ["load", "load_folder", "load_npz"]

_FORMAT = see("training#the-data-format")


def load_npz(path: str | os.PathLike[str]) -> MultimodalData:
    """Reads multimodal data from a `.npz` file, without pickles.

    Keys: `modalities` (names, in order); `x_<m>` numeric, one row per recording; optional `row_<m>` integer (N,),
    the row of `x_<m>` for sample i, -1 where the sample lacks the modality (key absent: row i); `y` integer (N,), the
    class; `classes` (names); `split` (N,): 0 train, 1 validation, 2 test. Other keys are ignored.

    Features keep their dtype where torch computes with it and become float32 otherwise. Raises ValueError naming
    the file, the key, what was found and what was expected; OSError where the file cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            try:
                archive = np.load(file, allow_pickle=False)
            except Exception as error:  # bytes that are no archive fail in many ways, all meaning this
                raise ValueError(f"is not a readable .npz file, or is cut short ({error})") from error
            if isinstance(archive, np.ndarray):
                raise ValueError("is a single .npy array, expected a .npz file with named arrays")
            with archive:
                return _from_archive(archive)
        except ValueError as error:
            raise ValueError(f"{path}: {error}{_FORMAT}") from error


def load_folder(path: str | os.PathLike[str]) -> MultimodalData:
    """Reads multimodal data from a folder of `.npy` files, named after the keys of `load_npz` and holding the same.

    The recordings, `x_<m>.npy`, are memory-mapped: they are read, and checked to be finite, when they are needed, and
    may be more than memory holds. Raises as `load_npz`, with the folder and the key.
    """
    path = Path(path)
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a folder of .npy files")
    try:
        return _from_archive(_Folder(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}{_FORMAT}") from error


def load(path: str | os.PathLike[str]) -> MultimodalData:
    """`load_folder` where `path` is a folder, else `load_npz`."""
    return load_folder(path) if Path(path).is_dir() else load_npz(path)


class _Folder(Mapping[str, np.ndarray]):
    """A folder of `.npy` files as an archive; recordings are memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getitem__(self, key: str) -> np.ndarray:
        file = self.path / f"{key}.npy"
        array: np.ndarray
        if key.startswith("x_"):
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            array = np.load(file, allow_pickle=False)
        return array

    def __contains__(self, key: object) -> bool:
        return key in list(self)

    def __iter__(self) -> Iterator[str]:
        return (file.stem for file in self.path.glob("*.npy"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _from_archive(archive: Mapping[str, np.ndarray]) -> MultimodalData:
    modalities = _names(archive, "modalities")
    check_names("modalities", modalities)
    labels = _integers(archive, "y")
    features: dict[str, Recordings] = {}
    rows: dict[str, Tensor] = {}
    for modality in modalities:
        key = f"x_{modality}"
        features[modality] = _numbers(archive, key)
        if f"row_{modality}" in archive:
            rows[modality] = _integers(archive, f"row_{modality}")
        elif len(features[modality]) == len(labels):
            rows[modality] = torch.arange(len(labels), device="cpu")
        else:
            raise ValueError(
                f"{key}: has {len(features[modality])} rows for {len(labels)} samples; expected one for each sample, "
                f"or a key row_{modality}"
            )
    return MultimodalData(
        modalities, features, rows, labels, classes=_names(archive, "classes"), split=_integers(archive, "split")
    )


def _array(archive: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    if key not in archive:
        raise ValueError(f"{key}: missing, the keys are {sorted(archive)}")
    try:
        array = archive[key]
    except Exception as error:  # damaged bytes and pickles fail in many ways, all meaning this
        raise ValueError(f"{key}: cannot be read as a plain array ({error})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{key}: is no array but {len(array)} raw bytes")
    return array


def _names(archive: Mapping[str, np.ndarray], key: str) -> tuple[str, ...]:
    array = _array(archive, key)
    if array.dtype.kind != "U" or array.ndim != 1:
        raise ValueError(f"{key}: has {describe(array)}, expected a one-dimensional array of names (str)")
    try:
        return tuple(array.tolist())
    except (SystemError, ValueError) as error:
        raise ValueError(f"{key}: holds characters that do not exist, expected names (str)") from error


def _integers(archive: Mapping[str, np.ndarray], key: str) -> Tensor:
    array = _array(archive, key)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{key}: has {describe(array)}, expected a one-dimensional array of integers")
    wide = array.astype(np.int64)
    if array.dtype == np.uint64 and (wide < 0).any():
        raise ValueError(f"{key}: holds {array.max()}, out of range: expected integers that fit int64")
    return torch.from_numpy(wide)


def _numbers(archive: Mapping[str, np.ndarray], key: str) -> Recordings:
    array = _array(archive, key)
    if array.dtype.kind not in "biuf" or array.ndim < 2:
        raise ValueError(f"{key}: has {describe(array)}, expected numbers of shape (recordings, features, ...)")
    return array if isinstance(array, np.memmap) else as_tensor(array)
