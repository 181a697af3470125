"""Training runs that are killed, starved of disk, given damaged files and changed clocks, and what is left of them.

    python -m benchmarks.stress.faults               # writes benchmarks/results/faults.md
    python -m benchmarks.stress.faults --kills 5     # in brief

Each fault is one function: it does the damage, checks that the run ends where an uninterrupted one does, to the last
bit of what is in its files, or fails as it is meant to, and says what happened. Runs are children of this process,
forked after the imports, so that a kill costs no start of Python.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from mla_ext.multimodal import checkpoint, cli

from .. import RESULTS
from ..machine import machine

EPOCHS = 12
TEXTS = ["config.toml", "metrics.jsonl", "predictions.csv", "report.json"]
FILES = sorted([*TEXTS, "last.pt", "training.png", "confusion.png", "reliability.png"])
AT_THE_END = ("report.json", "predictions.csv", "training.png", "confusion.png", "reliability.png")  # written


def write_data(path: Path) -> Path:
    """Two modalities, four classes, 240 samples: an epoch takes some ten milliseconds."""
    rng = np.random.default_rng(0)
    y = np.arange(240) % 4
    a, b = (rng.normal(size=(4, s))[y] + rng.normal(size=(240, s)) for s in (20, 30))
    split = np.arange(240) // 4 % 4
    arrays = {"x_a": a, "x_b": b, "y": y, "split": np.where(split == 3, 0, split)}
    np.savez(path, modalities=np.array(["a", "b"]), classes=np.array(list("wxyz")), **arrays)
    return path


class Runs:
    """Training runs with the same data and settings, each in a directory; "whole" is the one to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, write_data(folder / "data.npz")
        code, error = self.train("whole")
        if code != 0:
            raise RuntimeError(f"the uninterrupted run failed: {error}")

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def start(self, name: str, prepare: Callable[[], None] = lambda: None, epochs: int = EPOCHS) -> int:
        """A child that trains, or goes on training, in the directory `name`; returns its process id."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        with open(self.folder / f"{name}.err", "w") as error:
            os.dup2(error.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 70
        try:
            prepare()
            code = cli.main(self.arguments(name, epochs))
        finally:
            sys.stderr.flush()
            os._exit(code)

    def arguments(self, name: str, epochs: int = EPOCHS) -> list[str]:
        options = ["--batch-size", "20", "--width", "32", "--epochs", str(epochs), "--resume", "--no-progress"]
        return ["train", "--data", str(self.data), "--out", str(self[name]), *options]

    def train(self, name: str, prepare: Callable[[], None] = lambda: None, epochs: int = EPOCHS) -> tuple[int, str]:
        """The exit status and what was written to standard error."""
        _, status = os.waitpid(self.start(name, prepare, epochs), 0)
        return os.waitstatus_to_exitcode(status), (self.folder / f"{name}.err").read_text()

    def check_whole(self, name: str, other: str = "whole") -> None:
        """The same files as those of the other run, and no others: their bytes, or all bits of a checkpoint's content.

        (Pickle writes equal strings once or twice, depending on whether they are one object.)
        """
        found = sorted(path.name for path in self[name].iterdir())
        assert found == FILES, f"{name}: {found}"
        ours, theirs = self[name], self[other]
        for file in TEXTS:
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), f"{name}/{file} differs"
        assert _same(checkpoint.load(ours / "last.pt"), checkpoint.load(theirs / "last.pt")), f"{name}/last.pt differs"

    def check_resumes(self, name: str) -> None:
        code, error = self.train(name)
        assert code == 0, error
        self.check_whole(name)

    def stopped(self, name: str, epochs: int = 5) -> Path:
        """A run that ended after some epochs, before its report was written; returns its checkpoint."""
        shutil.rmtree(self[name], ignore_errors=True)
        code, error = self.train(name, epochs=epochs)
        assert code == 0, error
        for file in AT_THE_END:
            (self[name] / file).unlink()
        return self[name] / "last.pt"


def _same(a: Any, b: Any) -> bool:
    """Equal to the last bit, through dicts and lists."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def kills(runs: Runs, count: int, seed: int) -> str:
    """SIGKILL again and again until the run is through; then another run, until `count` kills.

    At a random moment; one of four when, after that, a checkpoint is half written.
    """
    rng = random.Random(seed)
    start = time.perf_counter()
    runs.train("clock")
    alone = time.perf_counter() - start
    half_written = runs["killed"] / ".last.pt.tmp"
    done, through, halves = 0, 0, 0
    while done < count:
        shutil.rmtree(runs["killed"], ignore_errors=True)
        longest = 0.3 * alone
        while True:
            before = _modified(half_written)  # what an earlier kill has left
            child = runs.start("killed")
            moment = time.perf_counter() + rng.uniform(0, longest)
            longest *= 1.2  # else a machine that has become slower never reaches the end of an epoch
            in_mid_write = rng.random() < 0.25
            finished, status = os.waitpid(child, os.WNOHANG)
            while not finished and (
                time.perf_counter() < moment or (in_mid_write and _modified(half_written) <= before)
            ):
                time.sleep(0.0002)
                finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                assert os.waitstatus_to_exitcode(status) == 0, (runs.folder / "killed.err").read_text()
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
            halves += _modified(half_written) > before
        runs.check_whole("killed")
        through += 1
    return (
        f"{done} kills (seed {seed}) in {through} runs of {EPOCHS} epochs, {halves} of them in the midst of writing "
        "a checkpoint: every run ended with what the uninterrupted one has in its files, to the last bit"
    )


def _no_files_above(size: int) -> Callable[[], None]:
    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails with EFBIG, as on a full disk with ENOSPC
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


def _check_refused(runs: Runs, name: str, code: int, error: str, *expected: str) -> None:
    assert code == 2 and error.startswith("mla-ext: error:") and error.count("\n") == 1, f"{code}: {error}"
    assert all(text in error for text in expected), error


def disk_limit(runs: Runs) -> str:
    """No file may grow beyond half a checkpoint."""
    last = runs.stopped("limited")
    before = last.read_bytes()
    code, error = runs.train("limited", _no_files_above(len(before) // 2))
    _check_refused(runs, "limited", code, error, "last.pt")
    assert last.read_bytes() == before and not [*runs["limited"].glob(".*.tmp")]
    runs.check_resumes("limited")
    return f"one line, exit status 2 (`{_message(error, runs)}`); the checkpoint of the epoch before is kept, resumes"


def disk_full(runs: Runs) -> str:
    """A file system with room for one checkpoint and not for two. Needs the right to mount."""
    last = runs.stopped("full")
    size = last.stat().st_size
    mounted = runs["mounted"]
    mounted.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={(size * 3 // 2) // 4096 * 4}k", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True).returncode != 0:
        return "not tried: mounting a file system is not allowed here"
    try:
        for file in runs["full"].iterdir():
            shutil.copy(file, mounted)
        before = (mounted / "last.pt").read_bytes()
        code, error = runs.train("mounted")
        _check_refused(runs, "mounted", code, error, "last.pt")
        assert (mounted / "last.pt").read_bytes() == before
        shutil.rmtree(runs["full"])
        shutil.copytree(mounted, runs["full"])
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
    assert not [*runs["full"].glob(".*.tmp")]
    runs.check_resumes("full")
    return f"one line, exit status 2 (`{_message(error, runs)}`); the checkpoint of the epoch before is kept, resumes"


def damaged_checkpoint(runs: Runs, count: int = 40) -> str:
    """Cut short, or with a byte changed: the run does not start, and leaves what it found.

    A changed byte that carries nothing, such as a size that the zip format holds twice, may pass: then the content is
    the same to the last bit.
    """
    last = runs.stopped("damaged")
    whole, content, rng = last.read_bytes(), checkpoint.load(last), random.Random(0)
    idle = 0
    for i in range(count):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if i % 2 else whole)
        if not i % 2:
            damaged[rng.randrange(len(whole))] ^= 0xFF
        last.write_bytes(damaged)
        try:
            found = checkpoint.load(last)
        except ValueError as error:
            assert str(last) in str(error), error
        else:
            assert i % 2 == 0 and _same(found, content), "a damaged checkpoint was loaded"
            idle += 1
    code, error = runs.train("damaged")
    _check_refused(runs, "damaged", code, error, "last.pt")
    assert last.read_bytes() == damaged
    last.write_bytes(whole)
    runs.check_resumes("damaged")
    refused = f"{count - idle} of {count} ways: refused, the file named, left as it is (`{_message(error, runs)}`)"
    return f"{refused}; {idle} changed a byte that carries nothing, and load to the same bits"


def unreadable_checkpoint(runs: Runs) -> str:
    """A directory in its place: what even root cannot read."""
    last = runs.stopped("unreadable")
    last.rename(runs["kept.pt"])
    last.mkdir()
    code, error = runs.train("unreadable")
    _check_refused(runs, "unreadable", code, error, "last.pt")
    last.rmdir()
    runs["kept.pt"].rename(last)
    runs.check_resumes("unreadable")
    return f"one line, exit status 2 (`{_message(error, runs)}`)"


def changed_clock(runs: Runs) -> str:
    """Files from the past and from the future, and clocks that run backwards: nothing is decided by time."""
    for name, when in (("past", 0), ("future", 2**32)):
        os.utime(runs.stopped(name), (when, when))

        def backwards() -> None:
            for clock in ("time", "monotonic", "perf_counter"):
                ticks = iter(range(10**9, 0, -1))
                mock.patch.object(time, clock, lambda ticks=ticks: float(next(ticks))).start()

        code, error = runs.train(name, backwards)
        assert code == 0, error
        runs.check_whole(name)
    return "the run resumes, to the same bits"


def _message(error: str, runs: Runs) -> str:
    return error.strip().removeprefix("mla-ext: error: ").replace(f"{runs.folder}/", "")


def killed_rank(runs: Runs, victim: int, seconds: float = 60) -> str:
    """Two processes that train together; one is killed in mid-run. The other must stop by itself, and both resume."""
    whole, name = "two-ranks", f"rank-{victim}-killed"
    if not runs[whole].exists():
        for rank in [_start_rank(runs, whole, rank, port) for port in [_free_port()] for rank in (0, 1)]:
            assert os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) == 0, (runs.folder / f"{whole}.err").read_text()
    port = _free_port()
    ranks = [_start_rank(runs, name, rank, port) for rank in (0, 1)]
    end = time.perf_counter() + seconds
    while not (runs[name] / "last.pt").exists():
        assert time.perf_counter() < end, "no epoch was reached"
        time.sleep(0.01)
    os.kill(ranks[victim], signal.SIGKILL)
    killed = time.perf_counter()
    os.waitpid(ranks[victim], 0)
    survivor, status = ranks[1 - victim], (0, 0)
    while status[0] == 0:
        if time.perf_counter() > killed + seconds:
            os.kill(survivor, signal.SIGKILL)
            raise AssertionError(f"the other rank still waits after {seconds} s")
        time.sleep(0.01)
        status = os.waitpid(survivor, os.WNOHANG)
    waited = time.perf_counter() - killed
    code = os.waitstatus_to_exitcode(status[1])
    error = (runs.folder / f"{name}-{1 - victim}.err").read_text()
    assert code == 2 and "mla-ext: error:" in error, f"{code}: {error}"
    checkpoint.load(runs[name] / "last.pt")
    port = _free_port()
    for rank in [_start_rank(runs, name, rank, port) for rank in (0, 1)]:
        assert os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) == 0
    runs.check_whole(name, whole)
    return (
        f"rank {1 - victim} stopped after {waited:.1f} s with exit status 2; both resumed, to the bits of two ranks "
        "that were left alone"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start_rank(runs: Runs, name: str, rank: int, port: int) -> int:
    """A process of its own, with the environment that torchrun gives its workers."""
    environment = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def prepare() -> None:
        os.environ.update({key: str(value) for key, value in environment.items()})
        os.dup2(os.open(runs.folder / f"{name}-{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)

    return runs.start(name, prepare, epochs=4 * EPOCHS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.md", help="the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        faults: dict[str, Callable[[], str]] = {
            "killed (SIGKILL) at random moments": lambda: kills(runs, arguments.kills, arguments.seed),
            "a full disk (tmpfs)": lambda: disk_full(runs),
            "a limit on file sizes": lambda: disk_limit(runs),
            "a damaged checkpoint": lambda: damaged_checkpoint(runs),
            "a checkpoint that cannot be read": lambda: unreadable_checkpoint(runs),
            "a clock that moved": lambda: changed_clock(runs),
            "rank 1 of 2 killed": lambda: killed_rank(runs, 1),
            "rank 0 of 2 killed": lambda: killed_rank(runs, 0),
        }
        rows = []
        for name, fault in faults.items():
            rows.append(f"| {name} | {fault()} |")
            print(rows[-1], flush=True)
    lines = [
        "# Faults, and what is left of a training run",
        "",
        f"{machine('cpu')}; {(time.perf_counter() - begin) / 60:.0f} minutes",
        "(`python -m benchmarks.stress.faults`, which stops at the first fault that does not end like this).",
        "",
        "| fault | what happens |",
        "|---|---|",
        *rows,
    ]
    checkpoint.write_text(arguments.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
