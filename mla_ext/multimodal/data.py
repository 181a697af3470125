"""Multimodal classification data: samples that may lack modalities, and the built-in demo data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from . import recordings
from .recordings import Recordings, Standardized, describe
from .synthesis import keypad_tones, misspelled_names, noisy_images, stratified_split

__all__ = ["INTEGERS", "SPLITS", "MultimodalData", "check_names", "digits"]

SPLITS = ("train", "validation", "test")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class MultimodalData:
    """N samples of M modalities. A sample may lack modalities (not all), and samples may share a recording.

    Recordings are a tensor; or a memory-mapped array of NumPy; or any object with `__len__` and `__getitem__(i)`, which
    gives recording i as a tensor, such as a torch Dataset. The last two are read when they are needed, so that the data
    may be larger than memory. An object may draw random numbers from torch, NumPy and `random`.

    Checked when made: ValueError says what is wrong, under the names of the `.npz` format of `load_npz`
    (x_<m>, row_<m>, y, classes, split). What is read later is checked then: see RecordingError.
    """

    modalities: tuple[str, ...]  # in order
    features: dict[str, Recordings]  # x_<m>: (recordings, *shape), any numeric dtype, finite as float32
    rows: dict[str, Tensor]  # row_<m>: int64 (N,), the row of features[m] for sample i, -1 where it lacks m
    labels: Tensor  # y: int64 (N,)
    classes: tuple[str, ...]  # (C,)
    split: Tensor  # int8 (N,): index into SPLITS
    # What training steps read in place of features[m]: the same recordings, augmented. Evaluation never reads it.
    training_features: dict[str, Recordings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_names("modalities", self.modalities)
        check_names("classes", self.classes)
        for name in ("features", "rows"):
            if set(getattr(self, name)) != set(self.modalities):
                raise ValueError(f"{name}: keys are {sorted(getattr(self, name))}, expected {self.modalities}")
        if not set(self.training_features) <= set(self.modalities):
            raise ValueError(
                f"training_features: keys are {sorted(self.training_features)}, expected some of {self.modalities}"
            )
        _check_integers("y", self.labels, None, 0, len(self.classes))
        samples = len(self.labels)
        if samples == 0:
            raise ValueError("y: has no samples, expected at least one")
        _check_integers("split", self.split, samples, 0, len(SPLITS))
        for modality in self.modalities:
            recordings.check(f"x_{modality}", self.features[modality])
            _check_integers(f"row_{modality}", self.rows[modality], samples, -1, len(self.features[modality]))
        for modality, augmented in self.training_features.items():
            recordings.check(f"training_features[{modality!r}]", augmented)
            found, expected = ((len(r), recordings.shape(r)) for r in (augmented, self.features[modality]))
            if found != expected:
                raise ValueError(
                    f"training_features[{modality!r}]: has {found[0]} recordings of shape {found[1]}, expected "
                    f"{expected[0]} of shape {expected[1]}, as features[{modality!r}] has"
                )
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

    def shape(self, modality: str) -> tuple[int, ...]:
        """Of a recording of the modality."""
        self._check_modality(modality)
        return recordings.shape(self.features[modality])

    def inputs(self, modality: str, indices: Tensor) -> Tensor:
        """float32 (len(indices), *shape): the modality of these samples, each of which must have it.

        `indices` is int64 (n,). Raises ValueError on an unknown modality, an index outside 0..N-1 or a sample that
        lacks the modality; RecordingError, which names the sample, for a recording that cannot be read.
        """
        return self.read(modality, indices).float()

    def read(self, modality: str, indices: Tensor, training: bool = False, seed: int = 0) -> Tensor:
        """`inputs` in the dtype that is stored; from `training_features` if `training`.

        `seed` decides what random transforms draw, with the recording's number: see `recordings.read`.
        """
        self._check_modality(modality)
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
            raise TypeError(f"indices must be a one-dimensional int64 tensor, got {describe(indices)}")
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
        source = self.training_features.get(modality, self.features[modality]) if training else self.features[modality]

        def name(row: int) -> str:
            sample = int(indices[(rows == row).nonzero()[0]])
            return f"sample {sample}, modality {modality!r} (recording {row})"

        return recordings.read(source, rows, seed, name)

    def example(self, modality: str) -> Tensor:
        """float32 (1, *shape): the first recording, whichever sample it belongs to."""
        self._check_modality(modality)
        return recordings.read(self.features[modality], torch.zeros(1, dtype=torch.int64, device="cpu")).float()

    def standardized(self, modalities: Sequence[str] | None = None) -> MultimodalData:
        """The data with each feature, as float32, at mean 0 and variance 1 over the training samples that have it.

        `modalities` names those to standardise; the others stay as they are. None: all.

        A recording that several training samples share counts as often as they use it. A feature that is constant
        in training becomes 0 everywhere. Raises ValueError where no training sample has a modality.

        Recordings that are not in memory are read once, and standardised again whenever they are read later. Those of
        `training_features` get the mean and variance of `features`.
        """
        features, training_features = dict(self.features), dict(self.training_features)
        for modality in self.modalities if modalities is None else modalities:
            training = self.indices("train", modality)
            if len(training) == 0:
                raise ValueError(f"modality {modality!r}: no training sample has it, so it cannot be standardized")
            source = self.features[modality]
            uses = torch.bincount(self.rows[modality][training], minlength=len(source))
            standard = Standardized.over(source, uses)
            features[modality] = standard.apply(source) if isinstance(source, Tensor) else standard
            if modality in self.training_features:
                training_features[modality] = replace(standard, source=self.training_features[modality])
        return replace(self, features=features, training_features=training_features)

    def checksum(self) -> str:
        """SHA-256, in hex, of labels, splits, rows and recordings, wherever those lie: all of them are read."""
        total = hashlib.sha256()
        for part in (self.labels, self.split):
            total.update(part.contiguous().numpy().data)
        for source in self.features.values():
            for values in recordings.whole(source):
                total.update(values.contiguous().numpy().data)
        for rows in self.rows.values():
            total.update(rows.contiguous().numpy().data)
        return total.hexdigest()

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


def check_names(key: str, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"{key}: is empty, expected at least one name")
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{key}: is {names}, expected non-empty names (str)")
    if len(set(names)) != len(names):
        raise ValueError(f"{key}: is {names}, expected no name twice")


def _check_integers(key: str, values: Tensor, length: int | None, low: int, high: int) -> None:
    """(length,) integers, low <= value < high; a length of None is any."""
    if not isinstance(values, Tensor) or values.dtype not in INTEGERS or values.ndim != 1:
        raise ValueError(f"{key}: has {describe(values)}, expected one-dimensional integers")
    if length is not None and len(values) != length:
        raise ValueError(f"{key}: has length {len(values)}, expected {length}, the number of samples")
    outside = (values < low) | (values >= high)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ValueError(
            f"{key}: {int(outside.sum())} of {len(values)} values out of range, the first is {int(values[first])} at "
            f"{first}; expected {low}..{high - 1}"
        )


def _generator(seed: int) -> np.random.Generator:
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}")
    return np.random.default_rng(int(seed))
