"""The CPU kernels of every instruction set that runs here; one of them is what the other tests use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import needs_kernels

TESTS = Path(__file__).resolve().parent
SUITE = "257-130-40 or 5-513-7 or many_steps or 513-6 or 1100-29 or takes_non_contiguous"


def run(isa, *command):
    environment = {**os.environ, "MLA_EXT_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=TESTS, env=environment, capture_output=True, text=True)


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_the_parity_suite(isa):
    """Which of G P the kernels make and which BLAS makes depends on it too."""
    name = run(isa, "-c", "import mla_ext; print(mla_ext.build_info()['cpu_isa'])")
    if "MLA_EXT_CPU_ISA: expected one that runs on this CPU" in name.stderr:
        pytest.skip(f"{isa} does not run here")
    assert name.stdout.strip() == isa, name.stderr
    suite = run(
        isa,
        "-m",
        "pytest",
        "-q",
        "test_ops.py",
        "test_deferred.py",
        "test_rank.py",
        "-k",
        f"not cpu-reference and ({SUITE})",
    )
    assert suite.returncode == 0, suite.stdout + suite.stderr
    assert int(re.search(r"(\d+) passed", suite.stdout)[1]) > 100
