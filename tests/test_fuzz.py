"""The fuzz targets of benchmarks/stress/fuzz in brief, on the same inputs each time; and that they can fail."""

from __future__ import annotations

import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "stress" / "fuzz"))
import programs
import public

needs_compiler = pytest.mark.skipif(programs.harness.COMPILER is None, reason="the programs are built with g++")
INPUTS = 200
FLAGS = {"address": programs.ADDRESS, "thread": programs.THREAD}


@pytest.fixture(params=FLAGS)
def sanitizer(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The program of a sanitizer, built once: the CPU kernels of one instruction set, whose code is the others' too."""

    @cache
    def build(sanitizer: str) -> Path:
        return programs.build_cpu(tmp_path_factory.mktemp(sanitizer), programs.RANDOM, FLAGS[sanitizer], ["baseline"])

    return build


@pytest.fixture
def program(sanitizer, built) -> Path:
    return built(sanitizer)


@needs_compiler
def test_the_cpu_kernels_agree_with_plain_loops(program):
    assert f"{INPUTS} inputs" in programs.run_program(program, seed=0, inputs=INPUTS)


# Defects put into a copy of the kernels: sanitizer, file, what is replaced, by what, what the report says.
DEFECTS = [
    ("address", "rls_update.h", "for (; j < s; ++j) row[j] =", "for (; j <= s; ++j) row[j] =", "AddressSanitizer|P"),
    ("address", "rank_step.h", "= k[j] / root;", "= k[j] / d;", r"K\["),
    ("address", "plain_sgd.cpp", "i < end; ++i) {", "i + 1 < end; ++i) {", r"weight\[|momentum_buffer\["),
    ("thread", "product.h", "end * kRows < s ? end * kRows : s", "end * kRows + 1 < s ? end * kRows + 1 : s",
     "ThreadSanitizer: data race"),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(("sanitizer", "file", "old", "new", "report"), DEFECTS, indirect=["sanitizer"])
def test_a_defect_is_found(program, sanitizer, file, old, new, report, tmp_path):
    """An access beyond a row, another divisor, an element left out; threads that write the same row."""
    shutil.copytree(programs.ROOT / "csrc", tmp_path, dirs_exist_ok=True)
    source = tmp_path / "cpu" / file
    assert source.read_text().count(old) == 1
    source.write_text(source.read_text().replace(old, new))
    broken = programs.build_cpu(
        tmp_path / "build", programs.RANDOM, FLAGS[sanitizer], ["baseline"], csrc=tmp_path, base=program.parent
    )
    with pytest.raises(RuntimeError, match=report):
        programs.run_program(broken, seed=0, inputs=INPUTS)


@pytest.mark.rare
@needs_compiler
def test_the_emulated_cuda_kernels_agree_with_plain_loops(tmp_path):
    program = programs.build_cuda(tmp_path, programs.RANDOM, programs.ADDRESS)
    assert programs.run_program(program, 0, inputs=INPUTS).startswith(f"{INPUTS} inputs")


@pytest.mark.parametrize("name", public.TARGETS)
def test_public_functions_refuse_or_return(name, tmp_path):
    outcomes = {public.run_one(name, seed, tmp_path) for seed in range(60)}
    assert outcomes == {"refused", "returned"}
