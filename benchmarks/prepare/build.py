"""Reads the recordings of a corpus and writes them in the common format (see `mla_ext.load_npz` and `load_folder`)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mla_ext.multimodal.data import SPLITS

from . import audio, images, text
from .samples import Clip, Corpus, Sample, check
from .store import Rows, opened

BATCH = 64  # recordings that an encoder gets at once

Encoder = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Options:
    """encoders: of the modalities that are not to be stored as they are; see `load_encoder`."""

    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    frames: int = 3  # of a video
    size: int = 64  # pixels, the side of an image
    form: str = "npz"  # or "folder"
    tokenizer: str | None = None  # what makes token ids of texts; without it they become tf-idf
    skip_damaged: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Summary:
    samples: dict[str, int]  # in each split
    shapes: dict[str, tuple[int, ...]]  # of x_<m>
    damaged: list[str]  # what could not be read, and why
    dropped: int  # samples of which nothing could be read


def build(corpus: Corpus, out: Path, options: Options) -> Summary:
    """Write `out`, whole or not at all.

    Of every modality one batch is in memory at a time (texts: all). Keys are those of the format, and `name`, which
    sample it was. Raises ValueError that names the recording, the encoder or the split that is not as expected.
    """
    check(corpus)
    recordings = _Recordings(corpus, options)
    arrays: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    with contextlib.ExitStack() as files:
        store = files.enter_context(opened(out, options.form))
        for modality in corpus.modalities:
            stored = Rows(modality, files.enter_context(store.rows(modality)))
            rows[modality] = np.full(len(corpus.samples), -1)
            for indices, block in _encoded(corpus, modality, recordings, options):
                rows[modality][indices] = np.arange(len(indices)) + stored.count
                stored.append(block)
            arrays[f"x_{modality}"] = stored.array()
        kept = np.any([row >= 0 for row in rows.values()], axis=0)
        samples = [sample for sample, keep in zip(corpus.samples, kept, strict=True) if keep]
        check(dataclasses.replace(corpus, samples=samples))
        shapes = {modality: arrays[f"x_{modality}"].shape for modality in corpus.modalities}
        arrays |= {f"row_{modality}": row[kept] for modality, row in rows.items()}
        arrays |= _facts(corpus, samples)
        store.save(arrays)
    counts = {split: sum(sample.split == split for sample in samples) for split in SPLITS}
    return Summary(counts, shapes, recordings.damaged, len(corpus.samples) - len(samples))


def load_encoder(modality: str, name: str) -> Encoder:
    """The function that MODULE:FUNCTION names: batch -> numbers (N, ...), an array or a tensor, stored as float32.

    The module is imported as Python would in the working directory. The function gets up to 64 recordings: texts as a
    list of str; sound as a list of float32 arrays (samples,), 16 kHz mono, of any length; pictures as uint8
    (N, 3 frames, size, size).
    """
    module, _, function = name.partition(":")
    try:
        encoder = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--encoder {modality}: expected MODULE:FUNCTION to import, got {name!r}: {error}") from error
    if not callable(encoder):
        raise ValueError(f"--encoder {modality}: expected a function, got {name!r}, which is {encoder!r}")
    return functools.partial(_checked, f"--encoder {modality}: {name}", encoder)


def _encoded(
    corpus: Corpus, modality: str, recordings: _Recordings, options: Options
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Batches of a modality: which samples, and their rows."""
    items = recordings.read(modality)
    if modality in options.encoders:
        encoder = options.encoders[modality]
    elif modality == "audio":
        encoder = functools.partial(audio.log_mel, seconds=corpus.seconds)
    elif modality == "text" and options.tokenizer is not None:
        encoder = text.token_ids(options.tokenizer)
    elif modality == "text":
        texts = list(items)
        encoder = text.tf_idf([words for i, words in texts if corpus.samples[i].split == "train"])
        items = iter(texts)
    else:
        encoder = np.asarray
    while batch := list(itertools.islice(items, BATCH)):
        indices, contents = zip(*batch, strict=True)
        yield list(indices), encoder(np.stack(contents) if modality in ("image", "video") else list(contents))


class _Recordings:
    """Reads recordings, and keeps account of those that cannot be read."""

    def __init__(self, corpus: Corpus, options: Options) -> None:
        self.corpus, self.options = corpus, options
        self.damaged: list[str] = []
        self.readers: dict[str, Callable[[Any], Any]] = {
            "audio": audio.read,
            "image": functools.partial(images.read, count=1, size=options.size),
            "video": functools.partial(images.read, count=options.frames, size=options.size),
            "text": text.read,
        }
        if not options.skip_damaged:
            self._check_all_there()

    def read(self, modality: str) -> Iterator[tuple[int, Any]]:
        """(index of the sample, recording) of those that can be read; ValueError at the first that cannot, or skip."""
        bar = tqdm(self.corpus.samples, modality, unit="recording", disable=not self.options.progress)
        for i, sample in enumerate(bar):
            source = sample.sources[modality]
            try:
                content = self.readers[modality](source)
            except (ImportError, MemoryError):
                raise
            except Exception as error:  # damaged bytes can fail in any way
                missing = isinstance(error, FileNotFoundError)
                message = f"{sample.name}: " + (str(error) if missing else f"{source.path()} cannot be read: {error}")
                if not self.options.skip_damaged:
                    raise ValueError(f"{message}; --skip-damaged leaves such recordings out") from error
                self.damaged.append(message)
            else:
                yield i, content

    def _check_all_there(self) -> None:
        """Before hours of reading: ValueError if files are missing."""
        missing = []
        for sample, modality in itertools.product(self.corpus.samples, self.corpus.modalities):
            source = sample.sources[modality]
            try:
                if isinstance(source, Clip):
                    source.path()
            except FileNotFoundError as error:
                missing.append(f"{sample.name}: {error}")
        if missing:
            raise ValueError(
                f"{len(missing)} recordings of {len(self.corpus.samples)} samples are missing; --skip-damaged leaves "
                f"them out. The first: {'; '.join(missing[:3])}"
            )


def _checked(name: str, encoder: Encoder, batch: Sequence[Any]) -> np.ndarray:
    """What the user's encoder makes of a batch, as float32."""
    with torch.no_grad():
        result = encoder(batch)
    array = result.detach().cpu().float().numpy() if isinstance(result, torch.Tensor) else np.asarray(result)
    if array.dtype.kind not in "fiu" or array.ndim < 2 or len(array) != len(batch) or math.prod(array.shape[1:]) == 0:
        raise ValueError(f"{name}: expected numbers of shape ({len(batch)}, ...), got {array.dtype} {array.shape}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return array


def _facts(corpus: Corpus, samples: Iterable[Sample]) -> dict[str, np.ndarray]:
    """All keys but those of the recordings."""
    names, labels, splits = zip(*((s.name, s.label, s.split) for s in samples), strict=True)
    return {
        "modalities": np.array(corpus.modalities),
        "y": np.array([corpus.classes.index(label) for label in labels]),
        "classes": np.array(corpus.classes),
        "split": np.array([SPLITS.index(split) for split in splits], dtype=np.int8),
        "name": np.array(names),
    }
