"""The evidence of methods that nobody tuned, the quick look, and the ranking."""

import dataclasses
import json

import numpy as np
import pytest
from evidence_data import write_data

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import protocol, runs
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.protocol import MAIN, Evidence
from benchmarks.evidence.ranking import bootstrap, ranking
from benchmarks.evidence.runs import Results, Run, execute
from benchmarks.evidence.untuned import EndsRun, TimedRun, measure, table0, timed, tolerance


@pytest.fixture
def sources(tmp_path):
    return [write_data(tmp_path / "pairs.npz"), write_data(tmp_path / "triples.npz", 3)]


def evidence(sources, tmp_path, quick=False):
    return Evidence(sources, Results(tmp_path / "runs.jsonl"), tmp_path / "out", 2, 1, 1, quick)


def cells(page, title):
    """The rows of a table by what their first cell says."""
    table = page.partition(f"## {title}")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in lines}


def usual(run):
    """The same run as the other tables make it."""
    return Run(**{field.name: getattr(run, field.name) for field in dataclasses.fields(Run)})


def test_both_ends_of_a_run(sources):
    run = EndsRun(sources[0], "concat", 0.1, 1e-3, None, 1, epochs=4)
    assert run.key != usual(run).key
    last = {}
    for epochs in range(1, 5):
        shorter = dataclasses.replace(run, epochs=epochs)
        found, expected = measure(shorter), execute(usual(shorter))
        assert found["best"] == {"together": expected["accuracy"], "modalities": expected["modalities"]}
        last[epochs] = found["last"]
        # The first epochs of a longer run are a shorter run: its best epoch is the last of one that ends there.
        assert last[expected["epoch"]] == found["best"]
    assert "nan" in measure(EndsRun(sources[0], "qmf", 1e4, 1e-4, 0.1, 0, epochs=2))["diverged"]


def test_a_timed_run_tells_seconds(sources):
    assert 0 < timed(TimedRun(sources[0], "concat", 0.1, 1e-3, None, 0, epochs=1))["seconds"] < 60


def fake(monkeypatch, accuracy):
    """Runs that take no time: `accuracy` of a run at the best epoch, None if it diverged; 0.1 less at the last."""

    def both(run):
        together = accuracy(run)
        if together is None:
            return {"diverged": "nan"}
        alone = {m: together / 2 for m in runs.load(run.data, 0.0, 0).modalities}
        last = {"together": together - 0.1, "modalities": alone}
        return {"best": {"together": together, "modalities": alone}, "last": last}

    def made(run):
        if isinstance(run, TimedRun):
            return {"seconds": 2.0}
        return both(run) if isinstance(run, EndsRun) else {"validation": 1 - abs(run.lr - 0.01)}

    monkeypatch.setattr(runs, "perform", lambda unit, work: [made(run) for run in unit])


def test_table0_has_one_setting_a_method_from_one_sweep_on_one_set(sources, tmp_path, monkeypatch):
    def accuracy(run):
        if run.method == "qmf":
            return None
        return 0.5 + 0.01 * run.seed - (0.2 if run.method == "mla" and "triples" in run.data else 0.0)

    fake(monkeypatch, accuracy)
    e = evidence(sources, tmp_path)
    table0(e)
    made = [json.loads(key) for key in e.results.found]
    trials = [run for run in made if run["split"] == "validation"]
    assert {run["data"] for run in trials} == {"pairs"}
    assert len(trials) == len(MAIN) * len(protocol.LRS) * len(protocol.TUNING_SEEDS)
    final = [run for run in made if run["split"] == "test"]
    assert {run["data"] for run in final if "timed" in run} == {"pairs"}
    assert {(run["lr"], run["weight_decay"]) for run in final} == {(0.01, 1e-3)}
    assert all(run["own"] == METHODS[run["method"]].default for run in made)
    page = (tmp_path / "out" / "table0.md").read_text(encoding="utf-8")
    best = cells(page, "Test accuracy of all modalities together, best epoch")
    assert best["MLA"] == ["lr 0.01, alpha 0.1", "50.5 ± 0.7", "30.5 ± 0.7", "-20.0 triples", "2.0"]
    assert best["QMF"][:3] == ["lr 0.01, rank weight 0.1", *["diverged in 2 of 2"] * 2]
    assert best["QMF"][3].startswith("-50.5") and best["QMF"][4] == "2.0"
    assert best["Alternation alone"][-2].startswith("+0.0")
    last = cells(page, "Test accuracy of all modalities together, last epoch")
    assert last["Concat"][1:3] == ["40.5 ± 0.7"] * 2
    assert cells(page, "triples: each modality alone")["Concat"] == ["25.2 ± 0.4"] * 6


def test_every_method_with_a_hyperparameter_has_a_default():
    assert {name for name, m in METHODS.items() if (m.own is None) != (m.default is None)} == set()


def test_tolerance_counts_the_learning_rates_that_are_as_good(sources, tmp_path, monkeypatch):
    def accuracy(run):
        if run.method == "concat":
            return None if run.lr == 1.0 else 0.8
        return 0.8 - (0.03 if run.lr < 0.03 else 0.0)

    fake(monkeypatch, accuracy)
    tolerance(evidence(sources, tmp_path))
    page = (tmp_path / "out" / "tolerance.md").read_text(encoding="utf-8")
    best = cells(page, "Mean over the data, best epoch")
    assert best["Concat"] == [*["80.0"] * 5, "0.0", "5 of 6: 0.003 to 0.3"]
    assert best["MLA"] == ["77.0", "77.0", *["80.0"] * 4, "4 of 6: 0.03 to 1"]
    assert cells(page, "Mean over the data, last epoch")["MLA"][0] == "67.0"
    assert (tmp_path / "out" / "tolerance.png").stat().st_size > 0


# ---- The ranking -----------------------------------------------------------------------------------------------------


def test_who_is_always_better_wins():
    noise = 0.01 * np.random.default_rng(0).random((3, 4, 5))
    ranks = bootstrap(noise + np.array([0.5, 0.7, 0.3])[:, None, None], reference=0, draws=200)
    assert ranks.mean.tolist() == [2, 1, 3]
    assert ranks.interval.tolist() == [[2, 1, 3], [2, 1, 3]]
    assert ranks.first.tolist() == [0, 1, 0]
    assert ranks.difference[0] == 0 and ranks.difference[1] == pytest.approx(20, abs=1)
    low, high = ranks.difference_interval[:, 1]
    assert 19 < low < ranks.difference[1] < high < 21


def test_methods_that_are_the_same_share_ranks_and_draws():
    same = np.random.default_rng(0).random((1, 3, 5)).repeat(4, axis=0)
    ranks = bootstrap(same, reference=0, draws=100)
    assert ranks.mean.tolist() == [2.5] * 4
    assert ranks.first == pytest.approx([0.25] * 4)
    assert (ranks.difference_interval == 0).all()


def test_a_win_on_half_of_the_data_is_no_win():
    means = np.array([[0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9]])
    ranks = bootstrap(means[:, :, None].repeat(3, axis=2), reference=0, draws=2000)
    assert ranks.mean.tolist() == [1.5, 1.5]
    assert ranks.interval.tolist() == [[1, 1], [2, 2]]
    assert 0.4 < ranks.first[0] < 0.6 and ranks.first.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("better", "words"),
    [(0.2, "MLA has the lowest mean rank in 100 % of the draws: it wins."), (0.0, "no method wins.")],
)
def test_the_ranking_says_who_wins(sources, tmp_path, monkeypatch, better, words):
    def execute(run):
        if run.split == "validation":
            return {"validation": 0.5}
        return {"accuracy": 0.5 + 0.01 * run.seed + (better if run.method == "mla" else 0.0)}

    monkeypatch.setattr(runs, "perform", lambda unit, work: [execute(run) for run in unit])
    ranking(evidence(sources, tmp_path, quick=True))
    page = (tmp_path / "out" / "ranking.md").read_text(encoding="utf-8")
    assert words in page
    rows = cells(page, "Ranks")
    assert len(rows) == len(MAIN) + 1
    if better:
        assert rows["MLA"] == ["1.0 [1.0, 1.0]", "100 %", "+20.00 [+20.00, +20.00]"]


# ---- A quick look ----------------------------------------------------------------------------------------------------


def test_a_quick_look_has_few_trials_and_every_page_says_so(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(["table3", "--quick", "--data", sources[0], "--epochs", "1", "--workers", "1"]) == 0
    made = [json.loads(line)["run"] for line in (tmp_path / "runs" / "quick.jsonl").read_text().splitlines()]
    trials = [run for run in made if run["split"] == "validation"]
    assert len(trials) == 2 * len(protocol.LRS) and {run["seed"] for run in trials} == {protocol.TUNING_SEEDS[0]}
    assert {run["seed"] for run in made if run["split"] == "test"} == {0, 1}
    page = (tmp_path / "build" / "evidence-quick" / "table3.md").read_text(encoding="utf-8")
    assert page.startswith("# Table 3: projection and dynamic fusion (a quick look)")
    assert "A QUICK LOOK: 2 seeds, 4 trials, epochs 1." in page and "15 trials" not in page


def test_a_full_look_does_not_say_so(tmp_path):
    e = evidence([], tmp_path)
    assert e.label == "" and "15 trials" in e.protocol and "quick" not in e.protocol.lower()
