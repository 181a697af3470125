"""The faults of benchmarks/faults.py, each in brief; `make faults` runs them long."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its runs are forked")
def test_a_run_survives_every_fault(tmp_path):
    """In a Python of its own, which has no threads yet when it forks."""
    table = tmp_path / "faults.md"
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", "8", "--out", str(table)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert table.read_text().count("\n| ") == 1 + 8
