"""The CUDA kernels compile for every architecture, and nothing of theirs spills from registers to memory.

What each kernel takes is in docs/kernels.md, which this test keeps true. To write it anew, with nvcc on the PATH:
MLA_EXT_UPDATE=1 python -m pytest tests/test_cuda_compile.py
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import tables

ROOT = Path(__file__).resolve().parents[1]
TITLE = "What each CUDA kernel takes"
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TYPES = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not here")


@dataclass(frozen=True)
class Usage:
    registers: int
    shared_bytes: int  # static
    stack_bytes: int
    spill_bytes: int


def compile_source(source: Path, architecture: str, target: Path) -> str:
    """nvcc's report, or AssertionError with what it says against the source."""
    command = [NVCC, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "--Werror", "all-warnings"]
    command.append(f"-I{ROOT / 'csrc'}")
    done = subprocess.run([*command, "--cubin", source, "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def parse(report: str) -> dict[str, Usage]:
    """Of each kernel, named like `feature_mean_kernel, float32`, what ptxas says that it takes."""
    usages = {}
    for entry in report.split("Compiling entry function '")[1:]:
        mangled = re.match(
            r"\S*?\d(?P<kernel>[a-z][a-z_]*_kernel)I(?P<type>\d*[_a-z]\w*?)(?:Lb(?P<aligned>[01])E)?EEv", entry
        )
        assert mangled, entry.splitlines()[0]
        name = f"{mangled['kernel']}, {TYPES[mangled['type']]}"
        if mangled["aligned"]:
            name += ", aligned" if mangled["aligned"] == "1" else ", any rows"
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+) ", entry).groups())
        shared = re.search(r"(\d+) bytes smem", entry)
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        usages[name] = Usage(registers, int(shared[1]) if shared else 0, stack, stores + loads)
    return usages


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where the machine code is: `head_step.sm_90.cubin` and so on."""
    return tmp_path_factory.mktemp("cubins")


@pytest.fixture(scope="module")
def usages(directory) -> dict[str, dict[str, Usage]]:
    """kernel -> architecture -> Usage."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda source: -source.stat().st_size)
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(lambda job: compile_source(*job, directory / f"{job[0].stem}.{job[1]}.cubin"), jobs)
        result: dict[str, dict[str, Usage]] = defaultdict(dict)
        for (_, architecture), report in zip(jobs, reports, strict=True):
            for kernel, usage in parse(report).items():
                result[kernel][architecture] = usage
    return result


def instructions(cubin: Path, kernel: str) -> list[str]:
    """The names of a kernel's instructions, by a part of its mangled name."""
    triton = importlib.util.find_spec("triton")
    own = None if triton is None else Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    program = own if own is not None and own.is_file() else shutil.which("nvdisasm")
    if program is None:
        pytest.skip("no disassembler is here: one comes with Triton")
    listing = subprocess.run([program, "-c", cubin], capture_output=True, text=True, check=True).stdout
    (code,) = (part for part in re.split(r"^\.text\.", listing, flags=re.M)[1:] if kernel in part.partition(":")[0])
    return re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@\S+ +)?([A-Z][\w.]*)", code, re.M)


def nvcc_version() -> str:
    return re.search(r"V([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)[1]


def table(usages: dict[str, dict[str, Usage]]) -> str:
    lines = [
        f"# {TITLE}",
        "",
        f"Registers of a thread, and static shared memory of a block, as nvcc {nvcc_version()} reports them.",
        "No kernel spills or keeps anything in local memory. Dynamic shared memory comes on top, by the shape of the",
        "tensors: `Tiling` in csrc/cuda/product.cuh. Written and checked by tests/test_cuda_compile.py.",
        "",
        f"| kernel | {' | '.join(ARCHITECTURES)} | shared bytes |",
        f"|---|{'---:|' * (len(ARCHITECTURES) + 1)}",
    ]
    for kernel in sorted(usages):
        each = [usages[kernel][architecture] for architecture in ARCHITECTURES]
        shared = sorted({usage.shared_bytes for usage in each})
        lines.append(f"| {kernel} | {' | '.join(str(u.registers) for u in each)} | {', '.join(map(str, shared))} |")
    return "\n".join(lines) + "\n"


def test_every_kernel_on_every_architecture(usages):
    # Head step: 4 kernels × 4 types × aligned or not; fusion: 4 × 2; mean: 4; rank form: 4 × 2 + 4 + 4, and 2.
    assert len(usages) == 44 + 18
    for kernel, by_architecture in usages.items():
        assert set(by_architecture) == set(ARCHITECTURES), kernel


def test_nothing_spills(usages):
    """An array that is not wholly in registers shows as stack."""
    spilled = [
        (kernel, architecture, usage)
        for kernel, by_architecture in usages.items()
        for architecture, usage in by_architecture.items()
        if usage.stack_bytes or usage.spill_bytes
    ]
    assert not spilled


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "most"), [("head_step_fused_kernel", 5700), ("head_step_product_kernel", 2500)])
def test_four_classes_are_loaded_before_they_are_multiplied(usages, directory, kernel, most, architecture):
    """A load from shared memory takes some 30 clocks: with one at a time the products would wait for each."""
    code = instructions(directory / f"head_step.{architecture}.cubin", f"{kernel}IfLb1")  # float32, aligned
    loads_and_products = re.findall(r"LDS\.128|FFMA|BRA", " ".join(code))
    short = "".join({"LDS.128": "L", "FFMA": "F", "BRA": "B"}[name] for name in loads_and_products)
    assert len(re.findall("L{4}F{32}(?!F)", short)) >= 3  # two rows × four classes × four columns
    assert "LFFFFFFFFBLFFFFFFFFB" not in short  # a class on its own
    assert len(code) <= most


def test_table_is_up_to_date(usages):
    text = table(usages)
    tables.update(TITLE, text)
    written = tables.section(TITLE)
    if f"nvcc {nvcc_version()} " in written:
        assert written == text, "docs/kernels.md is out of date: run this test with MLA_EXT_UPDATE=1"
    else:  # another compiler counts otherwise; the kernels must be the same
        assert re.findall(r"^\| (\w+_kernel.*?) \|", written, re.M) == sorted(usages)


def test_parse_sees_spills():
    report = (
        "ptxas info    : Compiling entry function '_ZN3abc12_GLOBAL__N__1_2_kernelx12some_kernelI6__halfLb0EEEvv' for "
        "'sm_80'\n    128 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers, 320 bytes smem\n"
    )
    assert parse(report) == {"some_kernel, float16, any rows": Usage(64, 320, 128, 24)}
