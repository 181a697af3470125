"""Long runs in float32: a short version of benchmarks/stress/numerics.py, and its page."""

import sys
from dataclasses import replace

import pytest
from helpers import needs_kernels

from benchmarks.stress import numerics

pytestmark = needs_kernels
NAMES = [f"{case.name}, s = {case.s}" for case in numerics.RANK_CASES]


@pytest.mark.parametrize("case", numerics.RANK_CASES, ids=NAMES)
def test_the_rank_form_does_not_drift(case):
    """1000 steps or more, with a compression in every R/2 of them, against the reference in float64."""
    records, _ = numerics.run(replace(case, steps=1500 if case.s < 100 else 1000), truth="reference")
    assert len(records) > 1
    for record in records:
        assert record.asymmetry == 0
        assert record.trace_error < 1e-5
        assert record.P_error < 2e-3 and record.W_error < 1e-3
        assert record.lowest > -1e-6 and record.highest < 1 + 1e-6
        assert record.highest64 <= 1 + 1e-9


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(numerics, "CASES", numerics.CASES[:1])
    monkeypatch.setattr(numerics, "RANK_CASES", numerics.RANK_CASES[:1])
    monkeypatch.setattr(numerics, "DENORMAL", ())
    monkeypatch.setattr(sys, "argv", ["numerics", "--divide", "1000000", "--out", str(tmp_path)])
    numerics.main()
    page = (tmp_path / "numerics.md").read_text("utf-8")
    assert page.count("| usual (ReLU of normals) | 64 |") == 2 and "| 64 | 16 | 500 |" in page
    assert (tmp_path / "numerics.png").read_bytes().startswith(b"\x89PNG")
