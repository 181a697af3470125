"""The speed benchmarks: what they count is right, and they see what they are there to see."""

import itertools
import json
import time
from argparse import Namespace

import pytest
import torch

from benchmarks import compare
from benchmarks.speed import baselines, head_step, host_time, report, step, timing, training
from mla_ext import reference


def test_a_cycle_pays_for_what_its_steps_put_off():
    calls = []

    def put_off():
        calls.append("put off")
        if calls.count("put off") % 4 == 0:
            time.sleep(0.04)

    candidates = {
        "put off": timing.Candidate(put_off, 4),
        "at once": timing.Candidate(lambda: (calls.append("at once"), time.sleep(0.01))),
    }
    timings, skipped = timing.time_interleaved(candidates, 0.3, "cpu")
    assert not skipped
    assert timings["put off"].median / timings["at once"].median == pytest.approx(1, rel=0.3)
    assert timings["at once"].p20 <= timings["at once"].median <= timings["at once"].p80
    turns = calls[-20:]  # single steps take turns
    assert all(a != b for a, b in itertools.pairwise(turns))


def test_percentiles_of_few_samples_lie_among_them():
    timing_of_two = timing._summary([1.0, 3.0], 1)
    assert (timing_of_two.median, timing_of_two.p20, timing_of_two.p80) == pytest.approx((2.0, 1.4, 2.6))


def test_what_is_too_slow_is_named_with_the_reason():
    candidates = {"slow": timing.Candidate(lambda: time.sleep(0.5)), "quick": timing.Candidate(lambda: None)}
    timings, skipped = timing.time_interleaved(candidates, 1, "cpu")
    assert list(timings) == ["quick"]
    assert "a call takes 0.5" in skipped["slow"]
    assert "free" in head_step.hindrance(10**7, 6, 5, 7, 4, 1e12, 4, "cpu")
    assert "budget is 80 s" in head_step.hindrance(4096, 1000, 5, 7, 4, 1e9, 4, "cpu")
    assert not head_step.hindrance(128, 6, 5, 7, 4, 1e12, 4, "cpu")


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.zeros(2**18)
    assert timing.peak_memory(lambda: (x + 1) + 1, "cpu") == pytest.approx(2 * x.nbytes, rel=0.01)
    assert timing.peak_memory(lambda: x.add_(1), "cpu") < 100


def test_the_models_of_one_step():
    assert head_step.traffic(10, 3, torch.float32, torch.float32) == 4 * (2 * 100 + 5 * 30 + 10)
    assert head_step.flop(10, 3) == 2 * 3 * 100 + 4 * 100


def test_the_forms_of_p_that_are_timed():
    assert head_step.ours("cpu", 6, 128)["mla_ext cpu, rank 64"] == ("cpu", {"rank": 64}, 32)
    forms = head_step.ours("cpu", 6, 64)  # no larger than its rank: dense forms only
    assert list(forms) == ["mla_ext cpu", "mla_ext cpu, deferred"]
    rows = forms["mla_ext cpu, deferred"][1]["deferred"]
    dense, deferred, rank = (
        baselines.make_state(6, 128, "cpu", **form) for form in ({}, {"deferred": rows}, {"rank": 64})
    )
    assert deferred.nbytes - dense.nbytes == 4 * rows * 128
    assert rank.nbytes - dense.nbytes == 4 * (64 * 128 - 128 * 128)


def test_a_head_step_is_checked_timed_and_weighed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    row = head_step.measure(20, 3, "cpu", torch.float32, 1e12, 1.0)
    names = {"released", "best", "compiled", *head_step.ours("cpu", 3, 20)}
    assert row.memory.keys() == names and {"copy of P", "bare G P"} | names == row.timings.keys() | row.skipped.keys()
    assert row.memory["released"] > row.memory["best"] > 4 * (20 * 20 + 3 * 3 * 20)


def test_where_no_dense_p_fits_the_rank_form_is_timed_alone(monkeypatch):
    name = "mla_ext reference, rank 64"
    monkeypatch.setattr(head_step, "hindrance", lambda *arguments: "too big")
    monkeypatch.setattr(
        head_step, "ours", lambda *arguments: {name: ("reference", {"rank": None}, 1), "other": ("cpu", {}, 1)}
    )
    row = head_step.measure(20, 3, "cpu", torch.float32, 1e12, 0.5)
    assert row.skipped.pop("with a dense P") == "too big" and row.floor is None
    assert row.timings.keys() | row.skipped.keys() == {name} == row.memory.keys()


def test_a_state_starts_again_in_place():
    state, start = (baselines.make_state(3, 20, "cpu", torch.bfloat16) for _ in range(2))
    kept = state.weight, state.projection.base
    for _ in range(3):
        baselines.best(state)
    assert not torch.equal(state.weight, start.weight)
    state.restart_()
    assert state.weight is kept[0] and state.projection.base is kept[1]
    for name in ("weight", "grad", "momentum_buffer", "feature_mean", "step"):
        assert torch.equal(getattr(state, name), getattr(start, name))
    assert torch.equal(state.projection.base, start.projection.base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gate_sees_a_candidate_that_is_wrong(dtype):
    states = {name: baselines.make_state(3, 20, "cpu", dtype) for name in ("best", "twice", "mla_ext")}

    calls = []

    def twice():  # nothing, then two steps
        calls.append(1)
        for _ in range(2 if len(calls) % 2 == 0 else 0):
            baselines.best(states["twice"])

    def check(ours):
        head_step.check(
            states,
            {
                "best": timing.Candidate(lambda: baselines.best(states["best"])),
                "twice": timing.Candidate(twice, 2),
                "mla_ext": timing.Candidate(lambda: ours(states["mla_ext"])),
            },
        )

    check(lambda state: head_step.step_with(state, "auto"))
    with pytest.raises(AssertionError, match="mla_ext"):
        check(lambda state: state.projection.base.mul_(0.9))
    for state in states.values():
        state.restart_()
    with pytest.raises(AssertionError, match="mla_ext"):  # P right, the weight not
        check(lambda state: (head_step.step_with(state, "auto"), state.weight.mul_(0.97)))


def test_the_best_fusion_is_the_reference():
    logits = 5 * torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0))
    for actual, expected in zip(baselines.best_fusion(logits), reference.entropy_fusion(logits), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_training_step_waits_for_nothing_and_a_wait_is_seen():
    model = training.make_model(8, 3, "cpu")
    way = training.Training(model, training.make_data(3), report.OURS)
    way.round()
    assert way.waits() == 0
    way.project = lambda: model.head.weight.grad.sum().item()
    assert way.waits() == 1


@pytest.fixture
def ways(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: f)  # which takes long, and whose result is torch's affair
    return step.make_ways("linear", 8, 3, "cpu")


def test_the_contestants_of_a_step_train_alike(ways):
    assert [name for name in ways if name != report.OURS] == step.BASELINES
    step.check(ways, 5)


@pytest.mark.parametrize(("wrong", "truth"), [("SGD fused", "SGD"), ("compiled", "plain"), (report.OURS, "plain")])
def test_a_contestant_of_a_step_that_computes_something_else_is_seen(ways, wrong, truth):
    optimizer = ways[wrong].optimizer
    if truth == "SGD":
        optimizer.param_groups[0]["momentum"] = 0.8
    else:  # the same without the projection
        ways[wrong].step = torch.optim.SGD(
            ways[wrong].model.parameters(), lr=step.LR, momentum=step.MOMENTUM, weight_decay=step.DECAY
        ).step
    with pytest.raises(AssertionError, match=f"{wrong} is not {truth}"):
        step.check(ways, 5)


def test_a_step_has_a_row_of_its_own_and_one_in_the_training_step(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: f)
    rows = step.measure("linear", 8, 3, "cpu", 0.2)
    assert [row.sizes["timed"] for row in rows] == [step.WHOLE, step.STEP]
    for row in rows:
        assert row.timings.keys() | row.skipped.keys() == {*step.BASELINES, report.OURS}
    (images,) = step.make_ways("small", 8, 3, "cpu")["SGD"].model[:1]
    assert images(torch.zeros(1, 3, 64, 64)).shape == (1, 8)


def test_bars_are_baselines_over_ours():
    timings = {"SGD": timing.Timing(4.0, 3.0, 5.0), "mla_ext": timing.Timing(2.0, 1.0, 3.0)}
    rows = [report.Row({"timed": what, "s": 8}, timings) for what in ("step()", "training step")]
    figure = report.bars(rows, ["SGD", "plain"])
    assert [ax.get_title() for ax in figure.axes] == ["step()", "training step"]
    assert [[bar.get_height() for bar in ax.patches] for ax in figure.axes] == [[2.0], [2.0]]


def test_what_comes_before_a_call_is_not_timed():
    calls = []

    def wait():
        calls.append("before")
        time.sleep(0.05)

    candidate = timing.Candidate(lambda: calls.append("call"), before=wait)
    timings, _ = timing.time_interleaved({"it": candidate}, 0.1, "cpu")
    assert timings["it"].median < 25
    assert calls[:2] == ["before", "call"] and calls.count("before") == calls.count("call")


def test_host_time_makes_whole_steps():
    for calls in (host_time.op_calls("cpu", ["reference"]), host_time.step_calls("cpu", ["reference"])):
        row = host_time.measure("step", calls, "cpu", 0.05)
        assert row.timings.keys() | row.skipped.keys() == calls.keys() and row.ours == f"{report.OURS} reference"
    head = host_time.FreeHead("cpu")
    optimizer = baselines.PlainProjectedSGD(head.parameters(), head, **host_time.SETTINGS)
    head(torch.rand(4, host_time.S))
    optimizer.step()
    assert not torch.equal(optimizer.projection.P, torch.eye(host_time.S))


def test_a_row_without_a_floor_has_as_many_cells(tmp_path, capsys):
    timings = {"best": timing.Timing(4.0, 3.0, 5.0), "mla_ext cpu": timing.Timing(2.0, 1.0, 3.0)}
    rows = [
        report.Row({"s": 8, "C": 2}, timings, {}, report.Floor(1e6, 0, 1e9, 1e9)),
        report.Row({"s": 16, "C": 2}, {"mla_ext cpu": timings["mla_ext cpu"]}),
    ]
    report.write("name", "About.", rows, ["best"], Namespace(out=tmp_path, device="cpu", dtype=torch.float32))
    tables = capsys.readouterr().out.split("\n\n")
    assert {len({line.count("|") for line in t.splitlines() if line.startswith("|")}) for t in tables} <= {0, 1}
    assert (tmp_path / "name_cpu.png").stat().st_size > 0


def write_timings(path, **timings):
    named = {name: vars(timing.Timing(*values)) for name, values in timings.items()}
    content = {"about": "", "rows": [{"sizes": {"s": 8, "C": 2}, "timings": named}]}
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("after", "word", "status"),
    [
        ((1.2, 1.15, 1.3), "slower", 1),
        ((1.2, 1.04, 1.3), "", 0),  # the spreads overlap
        ((1.09, 1.08, 1.1), "", 0),  # within the threshold
        ((0.8, 0.7, 0.9), "faster", 0),
        ((0.8, 0.7, 0.96), "", 0),
    ],
)
def test_compare_tells_what_got_slower(after, word, status, tmp_path, capsys):
    a = write_timings(tmp_path / "a.json", ours=(1.0, 0.95, 1.05), gone=(1, 1, 1))
    b = write_timings(tmp_path / "b.json", ours=after, new=(1, 1, 1))
    assert compare.main([a, b]) == status
    out = capsys.readouterr().out
    assert f"| {after[0]:.2f} | {word} |" in out
    assert f"gone: only in {a}" in out and f"new: only in {b}" in out
    assert f"{int(word == 'slower')} slower, {int(word == 'faster')} faster, of 1" in out
    assert compare.main([a, b, "--threshold", "0.5"]) == 0


def test_compare_refuses_what_it_cannot_compare(tmp_path, capsys):
    good, other = (write_timings(tmp_path / f"{name}.json", **{name: (1, 1, 1)}) for name in ("good", "other"))
    (tmp_path / "bad.json").write_text("[]", encoding="utf-8")
    for arguments, message in (
        ([good, str(tmp_path / "bad.json")], "expected a JSON file that a speed benchmark wrote"),
        ([good, str(tmp_path / "none.json")], "none.json"),
        ([good, other], "a candidate in common"),
        ([good, good, "--threshold", "-1"], "--threshold: expected a number >= 0, got -1"),
    ):
        with pytest.raises(SystemExit) as stop:
            compare.main(arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("floor", [None, report.Floor(1e6, 0, 1e9, 1e9)])
def test_the_report_holds_every_row(tmp_path, capsys, floor):
    timings = {"best": timing.Timing(4.0, 3.0, 5.0), "mla_ext cpu": timing.Timing(2.0, 1.0, 3.0)}
    rows = [
        report.Row({"s": 8, "C": 2}, timings, {}, floor, {"best": 2**20}),
        report.Row({"s": 16, "C": 2}, skipped={"all": "too big"}),
    ]
    assert rows[0].speedup("best") == 2 and rows[1].ours is None
    assert floor is None or (floor.ms, floor.bound, rows[0].times_floor) == (1.0, "bytes", 2.0)
    parsed = Namespace(out=tmp_path, device="cpu", dtype=torch.bfloat16)
    report.write("name", "About.", rows, ["best"], parsed)
    page = (tmp_path / "name_cpu_bfloat16.md").read_text(encoding="utf-8")
    assert page == capsys.readouterr().out[:-1]
    assert "| 8 | 2 | 4 (3–5) | 2 (1–3) |" in page and "- s=16, C=2, all: too big" in page
    assert len((tmp_path / "name_cpu_bfloat16.csv").read_text(encoding="utf-8").splitlines()) == 4
    saved = json.loads((tmp_path / "name_cpu_bfloat16.json").read_text(encoding="utf-8"))
    assert saved["rows"][0]["timings"]["best"]["median"] == 4.0
    assert (tmp_path / "name_cpu_bfloat16.png").stat().st_size > 0
