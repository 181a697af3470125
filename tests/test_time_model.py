"""benchmarks/speed/time_model.py: its bytes are those that the recorder counts, and its table is that of the docs."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.speed import time_model

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import tables


def counted():
    """s, C, rows, launches and MB in all, of docs/kernels.md."""
    lines = [line.strip("| ").split(" | ") for line in tables.section("What a step moves").splitlines()]
    return [[cell.strip() for cell in line] for line in lines if line[0].isdigit()]


def test_bytes_are_those_that_the_recorder_counts():
    compared = 0
    for s, C, rows, launches, _, _, counts, *_ in counted():
        s, C = int(s), int(C)
        if rows == "40 of 64":
            form = time_model.rank_form(s, C, used=40)
        elif not rows and (s, launches) == (512, "1"):  # of as many multiprocessors as the model is of
            form = time_model.dense_one_launch(s, C)
        elif not rows and (s, launches) == (512, "2"):
            form = time_model.dense_two_launches(s, C, by_blas=False)
        else:
            continue
        assert form.total / 1e6 == pytest.approx(float(counts), rel=0.05), (s, C, rows, launches)
        compared += 1
    assert compared == 3


def test_the_table_is_up_to_date():
    text = tables.section(time_model.TITLE)
    assert text == time_model.table(), "run python -m benchmarks.speed.time_model"
    assert all(f"| {s}, {C} |" in text for s, C in time_model.SHAPES)


def test_what_no_step_can_beat():
    for s, C in time_model.SHAPES:
        for form in filter(None, time_model.forms(s, C).values()):
            assert form.total > form.own > 0
            for gpu in time_model.MEMORY:
                least = time_model.FIRST_LAUNCH + (form.launches - 1) * time_model.NEXT_LAUNCH
                assert form.seconds(gpu, s) >= least + form.flop / time_model.FLOAT32
    dense, rank = (time_model.forms(8192, 6)[name] for name in ("dense, two launches", "rank 64, CUDA"))
    assert dense.seconds("H100", 8192) > 3 * 4 * 8192**2 / 3.35e12  # P is read once and updated, from memory
    assert dense.seconds("H100", 8192) > dense.seconds("H200", 8192) > rank.seconds("H200", 8192)


def test_measured_over_predicted(tmp_path, monkeypatch, capsys):
    seconds = time_model.predicted("mla_ext cuda, rank 64 graphed", "H200", 2048, 6)
    timings = {"mla_ext cuda, rank 64 graphed": {"median": 2e3 * seconds}, "best": {"median": 1.0}}
    file = tmp_path / "head_step_cuda.json"
    rows = [{"sizes": {"s": 2048, "C": 6, "N": 64}, "timings": timings}]
    file.write_text(json.dumps({"about": "NVIDIA H200, float32", "rows": rows}))
    monkeypatch.setattr(sys, "argv", ["time_model", "--measured", str(file)])
    time_model.main()
    *_, last = lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "predicted for H200" in lines[0]
    assert last.startswith("| 2048, 6 | mla_ext cuda, rank 64 graphed |") and last.endswith("| 2.00 |")
    assert time_model.predicted("best", "H100", 2048, 6) is None
