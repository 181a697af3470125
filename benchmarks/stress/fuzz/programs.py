"""Builds the fuzz targets with sanitizers: `cpu` (every instruction set of csrc/cpu) and `cuda` (the emulation)."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cuda_emulation"))
import harness  # noqa: E402

IS_X86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = ("-mavx2", "-mfma")
ISAS = {"baseline": ()}
if IS_X86:
    ISAS |= {"avx2": AVX2, "avx512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")}

COMMON = ("-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)


class Compiler:
    """clang++ brings a coverage-guided driver, libFuzzer; with g++ main.cpp draws the inputs at random."""

    def __init__(self, name: str) -> None:
        self.name, self.guides = name, "clang" in name

    def knows_half(self) -> bool:
        """Which the emulation of CUDA needs: g++ from 12, clang++ from 15."""
        command = [self.name, "-fsyntax-only", "-x", "c++", "-"]
        return subprocess.run(command, input="_Float16 half;", capture_output=True, text=True).returncode == 0

    def compile(self, source: Path, target: Path, flags: Sequence[str]) -> Path:
        coverage = ("-fsanitize=fuzzer-no-link",) if self.guides else ()
        harness.check_output([self.name, *COMMON, *coverage, *flags, "-x", "c++", "-c", source, "-o", target])
        return target

    def link(self, objects: Sequence[Path], target: Path, flags: Sequence[str]) -> Path:
        driver = ("-fsanitize=fuzzer",) if self.guides else ()
        harness.check_output([self.name, *COMMON, *driver, *flags, *objects, "-pthread", "-o", target])
        return target


RANDOM = Compiler("g++")


def coverage_guided() -> Compiler | None:
    """clang++ with libFuzzer, if it is installed (Debian: clang and libclang-rt-dev)."""
    found = sorted(Path(shutil.which("clang++") or "/usr/bin/clang++").parent.glob("clang++*"))
    for name in reversed(found):
        program = subprocess.run(
            [name, "-fsanitize=fuzzer", "-x", "c++", "-", "-o", "/dev/null"],
            input='extern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }',
            capture_output=True,
            text=True,
        )
        if program.returncode == 0:
            return Compiler(str(name))
    return None


def build_cpu(
    directory: Path,
    compiler: Compiler,
    flags: Sequence[str],
    isas: Sequence[str] = tuple(ISAS),
    csrc: Path = ROOT / "csrc",
    base: Path | None = None,
) -> Path:
    """The program that fuzzes the kernels in csrc/cpu, or in a copy of it; `base`: a build to take the rest from."""
    directory.mkdir(parents=True, exist_ok=True)
    flags = (*flags, f"-I{csrc}", f"-I{HERE}")
    if list(isas) == ["baseline"]:
        flags = (*flags, "-DMLA_EXT_BASELINE_ONLY")
    objects = [
        compiler.compile(
            csrc / "cpu" / f"{source}.cpp",
            directory / f"{source}_{isa}.o",
            (*flags, *ISAS[isa], f"-ffp-contract={contract}", f"-DMLA_EXT_ISA={isa}"),
        )
        for isa in isas
        for source, contract in (("kernels", "fast"), ("plain_sgd", "off"))
    ]
    if base is not None:
        return compiler.link([*objects, *base.glob("fuzz_*.o")], directory / "cpu", flags)
    return _finish(directory, compiler, flags, ["cpu", "rank_form", "eigen", "plain_sgd"], objects)


def build_cuda(directory: Path, compiler: Compiler, flags: Sequence[str]) -> Path:
    """The program that fuzzes csrc/cuda on the emulated devices."""
    directory.mkdir(parents=True, exist_ok=True)
    flags = (*flags, f"-I{harness.HERE / 'include'}", f"-I{harness.KERNELS}", f"-I{harness.CSRC}", f"-I{HERE}")
    sources = [*harness.KERNELS.glob("*.cu"), harness.HERE / "emulation.cpp"]
    objects = [compiler.compile(source, directory / f"{source.stem}.o", flags) for source in sources]
    return _finish(directory, compiler, flags, ["cuda"], objects)


def _finish(directory: Path, compiler: Compiler, flags: Sequence[str], backend: list[str], objects: list[Path]) -> Path:
    """`backend`: the sources of one backend alone, the first of which names the program."""
    ours = [*backend, "operations"] + ([] if compiler.guides else ["main"])
    objects += [compiler.compile(HERE / f"{name}.cpp", directory / f"fuzz_{name}.o", flags) for name in ours]
    return compiler.link(objects, directory / backend[0], flags)


def run_program(program: Path, seed: int, seconds: float = 0, inputs: int | None = None) -> str:
    """The random driver for some time, or for some inputs; its last line. RuntimeError with the report of a find."""
    # Leaks are not looked for: the emulation's fibres hide their stacks from the leak checker.
    asan = "abort_on_error=1:detect_leaks=0:detect_stack_use_after_return=0"
    environment = {**os.environ, "ASAN_OPTIONS": asan, "TSAN_OPTIONS": "abort_on_error=1:halt_on_error=1"}
    command = [program, str(seed), str(seconds)] + ([] if inputs is None else [str(inputs)])
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{program}: {done.stderr[-6000:]}")
    return done.stdout.splitlines()[-1]


def run_guided(program: Path, seed: int, seconds: float) -> str:
    """libFuzzer, from the inputs that earlier runs found to reach new code; a find is written beside the program."""
    corpus = program.parent / f"corpus_{program.name}"
    corpus.mkdir(exist_ok=True)
    limits = [f"-max_total_time={max(int(seconds), 1)}", "-max_len=96", "-rss_limit_mb=4096"]
    command = [program, corpus, *limits, f"-seed={seed + 1}", f"-artifact_prefix={program.parent}/"]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{program}: {done.stderr[-6000:]}")
    tally = re.search(r"\d+ inputs, .*", done.stdout)
    return f"{tally[0] if tally else 'no tally'}; guided by coverage, {len(list(corpus.iterdir()))} inputs kept"
