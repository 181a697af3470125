"""Where prepared data go: one `.npz`, or a folder of `.npy` files that are memory-mapped when they are read.

Either is written whole or not at all, and while recordings come in only one batch of them is in memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.lib import format as npy

from mla_ext.multimodal.checkpoint import write_atomic


class Rows:
    """Rows of one shape and dtype in a `.npy` file that grows, as they may be more than memory holds."""

    def __init__(self, modality: str, file: IO[bytes]) -> None:
        self.modality, self.file = modality, file
        self.count = 0
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.float32)

    def append(self, block: np.ndarray) -> None:
        if self.count == 0:
            self.shape, self.dtype = block.shape[1:], block.dtype
            self._write_header()
        if (block.shape[1:], block.dtype) != (self.shape, self.dtype):
            raise ValueError(
                f"{self.modality}: expected rows of {self.dtype} {self.shape}, as before, got {block.dtype} "
                f"{block.shape[1:]}"
            )
        self.file.write(np.ascontiguousarray(block).data)
        self.count += len(block)

    def array(self) -> np.ndarray:
        """(count, *shape), on the disk. ValueError if there are none."""
        if self.count == 0:
            raise ValueError(f"{self.modality}: expected at least one recording that can be read, found none")
        self.file.seek(0)
        self._write_header()  # with the count that is now known; NumPy leaves room for any
        start = self.file.tell()
        self.file.flush()
        os.fsync(self.file.fileno())
        return np.memmap(self.file, self.dtype, mode="r", offset=start, shape=(self.count, *self.shape))

    def _write_header(self) -> None:
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count, *self.shape)}
        npy.write_array_header_1_0(self.file, header)


class Store(Protocol):
    def rows(self, modality: str) -> AbstractContextManager[IO[bytes]]:
        """A file, to write and read, for the rows of a modality."""

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """All keys of the format. Those of recordings are what was made of the files of `rows`."""


class Npz:
    """Rows wait in nameless temporary files beside the archive."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def rows(self, modality: str) -> AbstractContextManager[IO[bytes]]:
        return tempfile.TemporaryFile(dir=self.out.parent)

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        write_atomic(self.out, lambda file: np.savez_compressed(file, **arrays))


class Folder:
    """Files are written to a folder with another name, which gets its own when all is there."""

    def __init__(self, out: Path) -> None:
        self.out, self.temporary = out, out.with_name(f".{out.name}.tmp")

    def rows(self, modality: str) -> AbstractContextManager[IO[bytes]]:
        return open(self.temporary / f"x_{modality}.npy", "wb+")

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        for key, array in arrays.items():
            if not isinstance(array, np.memmap):
                np.save(self.temporary / f"{key}.npy", array)
        os.rename(self.temporary, self.out)


@contextlib.contextmanager
def opened(out: Path, form: str) -> Iterator[Store]:
    """The store of `form` "npz" or "folder". ValueError if the folder is there already: it may hold hours of work."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if form == "npz":
        yield Npz(out)
        return
    if out.exists():
        raise ValueError(f"--out: expected a folder that does not exist yet, got {out}")
    folder = Folder(out)
    shutil.rmtree(folder.temporary, ignore_errors=True)  # of a run that was killed
    folder.temporary.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder.temporary, ignore_errors=True)
