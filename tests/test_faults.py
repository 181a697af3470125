"""The faults of benchmarks/faults.py, each in brief; `make faults` runs them long."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parents[1])  # for benchmarks/, after the mla_ext that is installed
START = f"import sys; sys.path.append({ROOT!r}); from benchmarks.stress.faults import main; main()"


@pytest.mark.rare
@pytest.mark.skipif(not hasattr(os, "fork"), reason="its runs are forked")
def test_a_run_survives_every_fault(tmp_path):
    """In a Python of its own, which has no threads yet when it forks."""
    table = tmp_path / "faults.md"
    command = [sys.executable, "-c", START, "--kills", "3", "--out", str(table)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert table.read_text().count("\n| ") == 1 + 8
