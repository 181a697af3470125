"""Builds the kernels' own sources with the host compiler and runs them on the emulated device."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = CSRC / "cuda"
COMPILER = shutil.which("g++")
UNAVAILABLE = (
    "the emulation is built with g++, which is not here"
    if COMPILER is None
    else "the emulation's fibres are written for x86-64"
    if platform.machine() not in ("x86_64", "AMD64")
    else None
)

FAST = ("-Og",)  # compiles in a third of the time of -O2, and runs almost as fast
SANITIZED = ("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
RECORDED = ("-O0", "-fsanitize=thread")  # the kernels alone: every access then calls back to recorder.cpp

FEATURE_MEAN, RLS_UPDATE, HEAD_STEP, ENTROPY_FUSION = range(4)
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType
# Rows of kDevices in emulation.cpp: multiprocessors × blocks on each, and how much shared memory.
H100, THREE, FORTY, FIVE_BY_TWO, ONE, PARTLY_HELD = range(6)
SHARED, WORKSPACE = -2, -1  # beside the numbers of a call's arrays, in what a recorder says


@dataclass
class Call:
    """One call of driver.cpp; None stands for a null pointer, offsets are bytes past an aligned address."""

    operation: int
    integers: Sequence[int]
    reals: Sequence[float] = ()
    arrays: Sequence[Tensor | None] = ()
    device: int = H100
    seed: int = 0
    offsets: dict[int, int] = field(default_factory=dict)
    launches: int | None = None  # how many kernels it took, once it has run

    def encode(self) -> bytes:
        parts = [struct.pack("<3q", self.operation, self.device, self.seed)]
        parts.append(struct.pack(f"<q{len(self.integers)}q", len(self.integers), *map(int, self.integers)))
        parts.append(struct.pack(f"<q{len(self.reals)}d", len(self.reals), *self.reals))
        parts.append(struct.pack("<q", len(self.arrays)))
        for i, array in enumerate(self.arrays):
            data = None if array is None else to_bytes(array)
            parts.append(struct.pack("<2q", -1 if data is None else len(data), self.offsets.get(i, 0)))
            parts.append(data or b"")
        return b"".join(parts)


def to_bytes(array: Tensor) -> bytes:
    return array.contiguous().flatten().view(torch.uint8).numpy().tobytes() if array.numel() else b""


@dataclass(frozen=True)
class Traffic:
    """What a launch moved to and from one array, or shared memory. See recorder.cpp."""

    read: int = 0
    written: int = 0
    sectors: int = 0
    ideal: int = 0  # sectors
    wavefronts: int = 0
    smallest: int = 0  # wavefronts

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Launch:
    """What recorder.cpp says of one: Traffic by the array's number in the call, and what is wrong, and where."""

    blocks: int
    threads: int
    traffic: dict[int, Traffic]
    wrong: dict[str, str]

    @staticmethod
    def parse(line: str) -> Launch:
        data = json.loads(line)
        traffic = {int(number): Traffic(*counts) for number, counts in data["traffic"].items()}
        return Launch(data["blocks"], data["threads"], traffic, data["wrong"])

    def of(self, array: int) -> Traffic:
        return self.traffic.get(array, Traffic())


def compile_and_link(
    directory: Path,
    flags: Sequence[str],
    kernels: Path,
    sources: list[Path],
    objects: list[Path],
    kernel_flags: Sequence[str] = (),
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    common = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags]

    def compile_one(source: Path) -> Path:
        target = directory / f"{source.stem}.o"
        includes = [f"-I{path}" for path in (HERE / "include", kernels, CSRC)]
        own = kernel_flags if source.suffix == ".cu" else ()
        check_output([COMPILER, *common, *own, *includes, "-x", "c++", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(compile_one, sources))
    program = directory / "driver"
    check_output([COMPILER, *common, *compiled, *objects, "-o", program])
    return program


def check_output(command: list) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def build(directory: Path, flags: Sequence[str]) -> Path:
    """Compiles everything into `directory` and returns the program. Warnings are errors."""
    sources = sorted(KERNELS.glob("*.cu"), key=lambda source: -source.stat().st_size)  # the longest first
    return compile_and_link(directory, flags, KERNELS, [*sources, HERE / "emulation.cpp", HERE / "driver.cpp"], [])


def build_recorder(directory: Path, kernels: Path = KERNELS) -> Path:
    """The program whose launches `record` hears of. `kernels` may be a copy that asks for emulation::planted(...)."""
    sources = [*sorted(kernels.glob("*.cu")), *(HERE / f"{name}.cpp" for name in ("emulation", "driver", "recorder"))]
    flags = (*RECORDED, "-include", str(HERE / "recorder.h"))
    return compile_and_link(directory, ["-O2"], kernels, sources, [], flags)


def record(program: Path, calls: Sequence[Call], directory: Path, planted: int | None = None) -> list[list[Launch]]:
    """Every call's launches, of a program of `build_recorder`. RuntimeError as from `run`."""
    environment = {} if planted is None else {"MLA_EXT_PLANTED": str(planted)}
    lines = iter(run_in_turn(program, calls, directory / "recorded", environment)[1].splitlines())
    return [[Launch.parse(next(lines)) for _ in range(call.launches or 0)] for call in calls]


def rebuild(directory: Path, flags: Sequence[str], kernels: Path, changed: str, base: Path) -> Path:
    """The program of `base` with one source compiled anew from the copy `kernels` of the sources."""
    source = kernels / changed
    others = [path for path in base.glob("*.o") if path.stem != source.stem]
    return compile_and_link(directory, ["-w", *flags], kernels, [source], others)


def run(program: Path, calls: Sequence[Call], directory: Path) -> list[list[Tensor | None]]:
    """Every call's arrays afterwards. RuntimeError with the report if the program stops or a launch fails."""
    with ThreadPoolExecutor(2) as pool:  # every other call to each of two processes
        halves = list(pool.map(lambda i: run_in_turn(program, calls[i::2], directory / f"calls{i}")[0], range(2)))
    return [halves[i % 2][i // 2] for i in range(len(calls))]


def run_in_turn(
    program: Path, calls: Sequence[Call], file: Path, variables: Mapping[str, str] | None = None
) -> tuple[list[list[Tensor | None]], str]:
    """Every call's arrays, and what the program printed."""
    source, target = file.with_suffix(".in"), file.with_suffix(".out")
    source.write_bytes(b"".join(call.encode() for call in calls))
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    environment = {**os.environ, **options, **(variables or {})}
    done = subprocess.run([program, source, target], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"the emulation stopped ({done.returncode}):\n{done.stderr[-4000:]}")
    data = io.BytesIO(target.read_bytes())
    results = []
    for call in calls:
        error, call.launches = struct.unpack("<2q", data.read(16))
        if error != 0:
            raise RuntimeError(f"launch failed with cudaError_t {error}: {call.operation} {call.integers}")
        results.append([None if array is None else from_bytes(data, array) for array in call.arrays])
    return results, done.stdout


def from_bytes(data: io.BytesIO, like: Tensor) -> Tensor:
    raw = bytearray(data.read(like.numel() * like.element_size()))
    return torch.frombuffer(raw, dtype=like.dtype).reshape(like.shape) if raw else torch.empty_like(like)
