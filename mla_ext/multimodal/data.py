"""Multimodal classification data: samples that may lack modalities, the `.npz` format, and the built-in demo data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .synthesis import keypad_tones, misspelled_names, noisy_images, stratified_split

__all__ = ["INTEGERS", "SPLITS", "MultimodalData", "digits", "load_npz"]

SPLITS = ("train", "validation", "test")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class MultimodalData:
    """N samples of M modalities. A sample may lack modalities (not all), and samples may share a recording.

    Checked when made: ValueError says what is wrong, under the names of the `.npz` format of `load_npz`
    (x_<m>, row_<m>, y, classes, split).
    """

    modalities: tuple[str, ...]  # in order
    features: dict[str, Tensor]  # x_<m>: (recordings, *shape), any numeric dtype, finite as float32
    rows: dict[str, Tensor]  # row_<m>: int64 (N,), the row of features[m] for sample i, -1 where it lacks m
    labels: Tensor  # y: int64 (N,)
    classes: tuple[str, ...]  # (C,)
    split: Tensor  # int8 (N,): index into SPLITS

    def __post_init__(self) -> None:
        _check_names("modalities", self.modalities)
        _check_names("classes", self.classes)
        for field in ("features", "rows"):
            if set(getattr(self, field)) != set(self.modalities):
                raise ValueError(f"{field}: keys are {sorted(getattr(self, field))}, expected {self.modalities}")
        _check_integers("y", self.labels, None, 0, len(self.classes))
        samples = len(self.labels)
        if samples == 0:
            raise ValueError("y: has no samples, expected at least one")
        _check_integers("split", self.split, samples, 0, len(SPLITS))
        for modality in self.modalities:
            _check_features(f"x_{modality}", self.features[modality])
            _check_integers(f"row_{modality}", self.rows[modality], samples, -1, len(self.features[modality]))
        if not (self.split == SPLITS.index("train")).any():
            raise ValueError("split: has no training sample (0), expected at least one")
        bare = torch.stack([self.rows[modality] < 0 for modality in self.modalities]).all(dim=0)
        if bare.any():
            count, first = int(bare.sum()), int(bare.nonzero()[0])
            keys = ", ".join(f"row_{modality}" for modality in self.modalities)
            raise ValueError(
                f"{keys}: {count} of {samples} samples have no modality at all, the first is sample {first}; "
                "expected at least one modality for each sample"
            )
        # Narrowed only now that the values are known to fit.
        object.__setattr__(self, "labels", self.labels.long())
        object.__setattr__(self, "split", self.split.to(torch.int8))
        object.__setattr__(self, "rows", {modality: self.rows[modality].long() for modality in self.modalities})

    def __len__(self) -> int:
        return len(self.labels)

    def present(self, modality: str) -> Tensor:
        """bool (N,): which samples have the modality."""
        self._check_modality(modality)
        return self.rows[modality] >= 0

    def indices(self, split: str, modality: str | None = None) -> Tensor:
        """int64, ascending: the samples of the split, of those that have the modality if one is named."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        chosen = self.split == SPLITS.index(split)
        if modality is not None:
            chosen = chosen & self.present(modality)
        return chosen.nonzero().flatten()

    def inputs(self, modality: str, indices: Tensor) -> Tensor:
        """float32 (len(indices), *shape): the modality of these samples, each of which must have it.

        `indices` is int64 (n,). Raises ValueError on an unknown modality, an index outside 0..N-1 or a sample that
        lacks the modality.
        """
        self._check_modality(modality)
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
            raise TypeError(f"indices must be a one-dimensional int64 tensor, got {_describe(indices)}")
        outside = (indices < 0) | (indices >= len(self))
        if outside.any():
            raise ValueError(f"indices must lie in 0..{len(self) - 1}, got {int(indices[outside][0])}")
        rows = self.rows[modality][indices]
        absent = rows < 0
        if absent.any():
            raise ValueError(
                f"indices must be of samples that have modality {modality!r}: "
                f"{int(absent.sum())} of {len(indices)} lack it, the first is sample {int(indices[absent][0])}"
            )
        return self.features[modality][rows].float()

    def standardized(self) -> MultimodalData:
        """The data with each feature, as float32, at mean 0 and variance 1 over the training samples that have it.

        A recording that several training samples share counts as often as they use it. A feature that is constant
        in training becomes 0 everywhere. Raises ValueError where no training sample has a modality.
        """
        features = {}
        for modality in self.modalities:
            training = self.indices("train", modality)
            if len(training) == 0:
                raise ValueError(f"modality {modality!r}: no training sample has it, so it cannot be standardized")
            recordings = self.features[modality]
            uses = torch.bincount(self.rows[modality][training], minlength=len(recordings))
            features[modality] = _standardize(recordings, uses)
        return replace(self, features=features)

    def with_missing(self, rate: float, seed: int) -> MultimodalData:
        """The data with each modality of each sample dropped with probability `rate`, in every split.

        A sample that would lose all it has keeps one of them, chosen uniformly, so that the share dropped is below
        `rate`. With one seed, what a lower rate drops a higher rate drops too. Features are shared, not copied.
        """
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(f"rate must be a number from 0 to 1, got {rate!r}")
        present = torch.stack([self.present(modality) for modality in self.modalities])
        draws = torch.from_numpy(_generator(seed).random(present.shape))
        draws[~present] = -1
        # The largest draw of a sample is the last to go, and never goes.
        keep = (draws >= rate) | (draws == draws.amax(dim=0))
        rows = {m: self.rows[m].where(kept, -1) for m, kept in zip(self.modalities, keep, strict=True)}
        return replace(self, rows=rows)

    def _check_modality(self, modality: str) -> None:
        if modality not in self.modalities:
            raise ValueError(f"modality must be one of {self.modalities}, got {modality!r}")


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
            raise ValueError(f"{path}: {error}") from error


def digits(seed: int = 0) -> MultimodalData:
    """The demo data: 1797 digits 0-9 seen, heard and read, split 60/15/25 % within each class.

    - "audio" float32 (32, 12): log spectrogram of the digit's tone on a telephone keypad, in noise. It dominates: a
      small network reaches about 95 % with it alone.
    - "image" float32 (8, 8): scikit-learn's handwritten digit, in noise. About 79 % alone.
    - "text" float32 (271,): the digit's name, misspelled, as counts of letters and letter pairs. About 68 % alone.

    The modalities of a sample share its class and nothing else. The same seed gives the same data, whatever
    the state of global random generators, which stays as it was. Needs scikit-learn (ImportError without it).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits() needs scikit-learn: pip install scikit-learn") from error
    # A stream for each part: none depends on how much another draws.
    audio, image, text, split = _generator(seed).spawn(4)
    images, labels = load_digits(return_X_y=True)
    features = {
        "audio": keypad_tones(labels, audio),
        "image": noisy_images(images.reshape(-1, 8, 8), image),
        "text": misspelled_names(labels, text),
    }
    return MultimodalData(
        modalities=tuple(features),
        features={modality: torch.from_numpy(array) for modality, array in features.items()},
        rows={modality: torch.arange(len(labels), device="cpu") for modality in features},
        labels=torch.from_numpy(labels).long(),
        classes=tuple("0123456789"),
        split=torch.from_numpy(stratified_split(labels, (0.6, 0.15, 0.25), split)),
    )


def _from_archive(archive: np.lib.npyio.NpzFile) -> MultimodalData:
    modalities = _names(archive, "modalities")
    _check_names("modalities", modalities)
    labels = _integers(archive, "y")
    features, rows = {}, {}
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


def _array(archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    if key not in archive:
        raise ValueError(f"{key}: missing, the keys are {sorted(archive.files)}")
    try:
        array = archive[key]
    except Exception as error:  # damaged bytes and pickles fail in many ways, all meaning this
        raise ValueError(f"{key}: cannot be read as a plain array ({error})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{key}: is no array but {len(array)} raw bytes")
    return array


def _names(archive: np.lib.npyio.NpzFile, key: str) -> tuple[str, ...]:
    array = _array(archive, key)
    if array.dtype.kind != "U" or array.ndim != 1:
        raise ValueError(f"{key}: has {_describe(array)}, expected a one-dimensional array of names (str)")
    try:
        return tuple(array.tolist())
    except (SystemError, ValueError) as error:
        raise ValueError(f"{key}: holds characters that do not exist, expected names (str)") from error


def _integers(archive: np.lib.npyio.NpzFile, key: str) -> Tensor:
    array = _array(archive, key)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{key}: has {_describe(array)}, expected a one-dimensional array of integers")
    wide = array.astype(np.int64)
    if array.dtype == np.uint64 and (wide < 0).any():
        raise ValueError(f"{key}: holds {array.max()}, out of range: expected integers that fit int64")
    return torch.from_numpy(wide)


def _numbers(archive: np.lib.npyio.NpzFile, key: str) -> Tensor:
    array = _array(archive, key)
    if array.dtype.kind not in "biuf" or array.ndim < 2:
        raise ValueError(f"{key}: has {_describe(array)}, expected numbers of shape (recordings, features, ...)")
    unsupported = (array.dtype.kind == "u" and array.dtype.itemsize > 1) or array.dtype.itemsize > 8
    dtype = np.float32 if unsupported else array.dtype.newbyteorder("=")
    with np.errstate(over="ignore"):  # becomes infinite, and is refused for that
        return torch.from_numpy(array.astype(dtype, order="C", copy=False))


def _check_names(key: str, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"{key}: is empty, expected at least one name")
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{key}: is {names}, expected non-empty names (str)")
    if len(set(names)) != len(names):
        raise ValueError(f"{key}: is {names}, expected no name twice")


def _check_integers(key: str, values: Tensor, length: int | None, low: int, high: int) -> None:
    """(length,) integers, low <= value < high; a length of None is any."""
    if not isinstance(values, Tensor) or values.dtype not in INTEGERS or values.ndim != 1:
        raise ValueError(f"{key}: has {_describe(values)}, expected one-dimensional integers")
    if length is not None and len(values) != length:
        raise ValueError(f"{key}: has length {len(values)}, expected {length}, the number of samples")
    outside = (values < low) | (values >= high)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ValueError(
            f"{key}: {int(outside.sum())} of {len(values)} values out of range, the first is {int(values[first])} at "
            f"{first}; expected {low}..{high - 1}"
        )


def _check_features(key: str, values: Tensor) -> None:
    if not isinstance(values, Tensor) or values.is_complex() or values.ndim < 2 or values[:1].numel() == 0:
        raise ValueError(f"{key}: has {_describe(values)}, expected numbers of shape (recordings, features, ...)")
    if values.is_floating_point():
        finite = values.float().isfinite()
        if not finite.all():
            first = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"{key}: {int((~finite).sum())} of {values.numel()} values are NaN or infinite (as float32), the "
                f"first is {values[tuple(first)].item()} at {first}; expected finite numbers"
            )


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray | Tensor):
        return f"type {type(value).__name__}, dtype {value.dtype} and shape {tuple(value.shape)}"
    return f"type {type(value).__name__}"


def _generator(seed: int) -> np.random.Generator:
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}")
    return np.random.default_rng(int(seed))


def _standardize(recordings: Tensor, uses: Tensor) -> Tensor:
    """(recordings, *shape) -> float32 of that shape; `uses` (recordings,) weighs each in the mean and variance."""
    flat = recordings.reshape(len(recordings), -1)
    # Computed in float64 a few rows at a time, as all of them would take 2-8 times the memory of the data.
    rows = max(1, 2**20 // flat.shape[1])
    weights = (uses.double() / uses.sum()).split(rows)
    # Deviations from one of the samples: exactly 0 for a constant feature, and E[d²] ≤ N var, so no cancellation.
    origin = flat[uses.nonzero()[0, 0]].double()
    mean, square = torch.zeros_like(origin), torch.zeros_like(origin)
    for part, weight in zip(flat.split(rows), weights, strict=True):
        deviation = part.double() - origin
        mean += weight @ deviation
        square += weight @ deviation.square()
    variance = square - mean.square()
    scale = torch.where(variance > 0, variance.rsqrt(), 0.0)
    parts = [((part.double() - origin - mean) * scale).float() for part in flat.split(rows)]
    return torch.cat(parts).reshape(recordings.shape)
