"""What is known of a dataset before its recordings are read: samples, labels, splits, and where each modality lies."""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mla_ext.multimodal.data import SPLITS
from mla_ext.multimodal.synthesis import stratified_split

SEED = 0  # of every split that is ours
LEFT_BY_TOOLS = ("__MACOSX", "__pycache__", "@eaDir")  # folders; other such names begin with a dot


@dataclass(frozen=True)
class Clip:
    """A recording on disk: the first of `paths` that exists.

    Of a video's pictures only those from `start` to `end` seconds count (None: to its end), and of each only the
    `half`, "left" or "right", if one is named.
    """

    paths: tuple[Path, ...]
    start: float = 0.0
    end: float | None = None
    half: str | None = None

    def path(self) -> Path:
        """Its suffix may be in capitals. FileNotFoundError if there is none."""
        for path in self.paths:
            for suffix in dict.fromkeys((path.suffix, path.suffix.upper(), path.suffix.capitalize())):
                spelled = path.with_name(path.name.removesuffix(path.suffix) + suffix)
                if spelled.exists():
                    return spelled
        raise FileNotFoundError(f"{' or '.join(map(str, self.paths))} is missing")


@dataclass(frozen=True)
class Sample:
    """sources: for each modality where its recording is, or the text itself."""

    name: str
    label: str
    split: str
    sources: dict[str, Clip | str]


@dataclass(frozen=True)
class Corpus:
    """A dataset: its classes and modalities, in order, and its samples. Sound is cut or padded to `seconds`.

    left_out: recordings that are there and make no sample, each with the reason.
    """

    classes: tuple[str, ...]
    modalities: tuple[str, ...]
    samples: list[Sample]
    seconds: float = 0.0
    left_out: tuple[str, ...] = ()


def folder(*parts: str | Path) -> Path:
    """The folder, which must exist; else ValueError says what is there instead."""
    return _existing(Path(*parts), "folder", Path.is_dir)


def file(*parts: str | Path) -> Path:
    """The file, which must exist; else ValueError says what is there instead."""
    return _existing(Path(*parts), "file", Path.is_file)


def entries(parent: Path, pattern: str) -> list[Path]:
    """What matches, whatever the case, in order of name; ValueError if nothing does."""
    found = [path for path in visible(parent) if fnmatch.fnmatchcase(path.name.lower(), pattern.lower())]
    if not found:
        raise ValueError(f"{parent}: expected {pattern} in it, found {_content(parent)}")
    return found


def visible(parent: Path) -> list[Path]:
    """What the folder holds, in order of name, without what systems and tools leave beside data."""
    return sorted(path for path in parent.iterdir() if not path.name.startswith((".", *LEFT_BY_TOOLS)))


def read_csv(path: Path) -> list[list[str]]:
    """The rows that are not blank, each cell stripped. ValueError where the file holds none or is no text."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a csv file in UTF-8: {error}") from error
    rows = [row for row in rows if any(row)]
    if not rows:
        raise ValueError(f"{path}: expected rows, found none")
    return rows


def check_label(label: str, classes: Sequence[str], where: object) -> str:
    """The label; ValueError if it is of none of the classes."""
    if label not in classes:
        raise ValueError(f"{where}: expected one of the labels {', '.join(classes)}, found {label!r}")
    return label


def random_split(labels: Sequence[str], **fractions: float) -> list[str]:
    """A split name for each label, drawn with a fixed seed within each class, in these fractions that sum to 1."""
    _, codes = np.unique(np.array(labels, dtype=str), return_inverse=True)
    parts = stratified_split(codes, list(fractions.values()), np.random.default_rng(SEED))
    names = list(fractions)
    return [names[part] for part in parts]


def hold_out_validation(samples: list[Sample]) -> list[Sample]:
    """The samples with a tenth of the training samples of each class moved to validation, drawn with a fixed seed."""
    training = [sample for sample in samples if sample.split == "train"]
    drawn = random_split([sample.label for sample in training], train=0.9, validation=0.1)
    moved = [dataclasses.replace(sample, split=split) for sample, split in zip(training, drawn, strict=True)]
    return moved + [sample for sample in samples if sample.split != "train"]


def check(corpus: Corpus) -> None:
    """ValueError if a name comes twice or a split has no sample."""
    seen: set[str] = set()
    for sample in corpus.samples:
        if sample.name in seen:
            raise ValueError(f"{sample.name}: comes twice, expected each sample once")
        seen.add(sample.name)
    counts = {split: sum(sample.split == split for sample in corpus.samples) for split in SPLITS}
    if not all(counts.values()):
        raise ValueError(f"expected samples in every split, found {counts}")


def _existing(path: Path, kind: str, is_kind: Callable[[Path], bool]) -> Path:
    if is_kind(path):
        return path
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    raise ValueError(f"{path}: expected this {kind}; in {parent} there is {_content(parent)}")


def _content(parent: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in parent.iterdir())
    return ", ".join(names[:8]) + (" and more" if len(names) > 8 else "") or "nothing"
