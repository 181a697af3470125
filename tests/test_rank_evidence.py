"""The evidence of the rank form: its runs are what they say, and its tables count right."""

import json

import pytest
import torch
from evidence_data import write_data
from helpers import needs_kernels

from benchmarks.evidence import defaults, frontier, kept, plasticity, rank
from benchmarks.evidence.rank import FORMS, SCALED_ALPHA, USUAL_ALPHA, Gain, RankRun, Study, execute, limited
from benchmarks.evidence.runs import Results
from mla_ext import ProjectedSGD, load_npz, reference

TINY = ["--epochs", "1", "--seeds", "2"]


@pytest.fixture
def source(tmp_path):
    return write_data(tmp_path / "toy.npz", samples=90)


def test_tables_of_the_rank_form(source, tmp_path, monkeypatch):
    monkeypatch.setattr(rank, "WIDTHS", (20,))
    runs = tmp_path / "runs.jsonl"
    arguments = ["--data", source, *TINY, "--samples", "20", "--workers", "1", "--runs", str(runs), "--out"]
    rank.main([*arguments, str(tmp_path)])
    records = [json.loads(line) for line in runs.read_text().splitlines()]
    assert len(records) == 2 * (1 + 2 * len(FORMS))
    page = (tmp_path / "rank.md").read_text("utf-8")
    assert "At most 20 training samples are used: toy has 30." in page
    assert page.count("\n| 20 | R = 16 |") == 9 and page.count("\n| toy | 20 | ") == 4
    # From the file of runs alone, and by hand.
    monkeypatch.setattr(rank, "execute", None)
    rank.main([*arguments, str(tmp_path / "again")])
    assert (tmp_path / "again" / "rank.csv").read_text("utf-8") == (tmp_path / "rank.csv").read_text("utf-8")
    found = {(r["run"]["alpha"], r["run"]["rank"], r["run"]["seed"]): r["result"] for r in records}
    scaled = float(f"{0.3 * found[None, None, 0]['scale']:.2g}")
    by_hand = [
        100 * (found[scaled, 16, seed]["test"]["last"]["alone"] - found[scaled, None, seed]["test"]["last"]["alone"])
        for seed in range(2)
    ]
    study = Study([source], Results(runs), 2, 1, 20)
    gain = study.gain(20, SCALED_ALPHA, 16, (SCALED_ALPHA, None), "test", "last", "alone")
    assert gain.over == {("toy", seed): pytest.approx(value) for seed, value in enumerate(by_hand)}
    assert study.values(source, 20, USUAL_ALPHA, 16, "test", "best", "fused") == {
        seed: found[0.1, 16, seed]["test"]["best"]["fused"] for seed in range(2)
    }


def test_a_gain_is_the_mean_over_pairs_with_its_interval():
    gain = Gain({("a", 0): 1.0, ("a", 1): 0.5, ("b", 0): 0.0})
    assert str(gain) == "+0.50 [-0.74, +1.74]"  # 4.303 · 0.5 / √3
    assert gain.worst() == "+0.0 b"
    assert rank.together([gain, Gain({("a", 1): 1.5, ("c", 0): 1.0})]).over == {("a", 1): 1.0}


def test_a_run_is_of_the_form_that_it_names(source, monkeypatch):
    made = []
    usual = ProjectedSGD.step
    monkeypatch.setattr(ProjectedSGD, "step", lambda self, closure=None: (usual(self, closure), made.append(self))[0])
    for form in (None, 16):
        made.clear()
        execute(RankRun(source, 20, 0.1, form, 0, 1, 1000))
        states = [state for state in made[-1].state.values() if "step" in state and state.keys() & {"base", "beta"}]
        assert [len(state["rows"]) if "beta" in state else None for state in states] == [form]
    made.clear()
    assert execute(RankRun(source, 20, None, None, 0, 1, 1000))["scale"] > 0 and made == []


def test_fewer_training_samples_are_always_the_same_ones(source):
    some, again, every = limited(source, 10), limited(source, 10), limited(source, 1000)
    assert len(some.indices("train")) == 10 and torch.equal(some.labels, again.labels)
    assert len(every) == 90 and len(some) == 70
    assert len(some.indices("test")) == len(every.indices("test"))


# ---- What a compression keeps ----------------------------------------------------------------------------------------


def stream(steps, s):
    return torch.randn(steps, s, generator=torch.Generator().manual_seed(0), dtype=torch.float64).relu()


@pytest.mark.parametrize("compress", kept.VARIANTS.values(), ids=kept.VARIANTS)
def test_every_variant_is_exact_until_it_compresses_and_stays_a_projection(compress):
    means = stream(60, 30)
    exact = kept.absorb(means[:15], 0.1, None, compress)
    torch.testing.assert_close(kept.absorb(means[:15], 0.1, 16, compress), exact, rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(kept.absorb(means, 0.1, 16, compress))
    assert values[0] > -1e-12 and values[-1] < 1 + 1e-12


def test_the_newest_directions_keep_their_eigenvalues_and_p_its_trace():
    beta, rows = torch.ones((), dtype=torch.float64), torch.zeros(0, 30, dtype=torch.float64)
    for mean in stream(16, 30):
        beta, rows = reference.rank_update(beta, rows, mean, 0.1)
    new_beta, new_rows = kept.newest(beta, rows, 8)
    before, after = (b * torch.eye(30).double() - K.T @ K for b, K in ((beta, rows), (new_beta, new_rows)))
    torch.testing.assert_close(after.trace(), before.trace(), rtol=1e-12, atol=0)
    span = torch.linalg.qr(rows[8:].T).Q
    torch.testing.assert_close(span.T @ after @ span, span.T @ before @ span, rtol=0, atol=1e-12)
    kept_beta, kept_rows = kept.newest_rows(beta, rows, 8)
    assert kept_beta == beta and torch.equal(kept_rows, rows[8:])


def test_the_page_of_what_is_kept(source, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "WIDTHS", (20,))
    monkeypatch.setattr(kept, "RANKS", (4,))
    usual = reference.rank_compress
    runs = tmp_path / "runs.jsonl"
    kept.main(["--data", source, *TINY, "--workers", "1", "--runs", str(runs), "--out", str(tmp_path)])
    assert reference.rank_compress is usual
    results = [json.loads(line)["result"]["validation"] for line in runs.read_text().splitlines()]
    assert len(results) == 2 * len(kept.VARIANTS)
    page = (tmp_path / "rank_kept.md").read_text("utf-8")
    assert page.count("the newest R/2, β as it was") == 2 and "| toy | 20 | 2 | dense | - | - |" in page


# ---- The default of alpha --------------------------------------------------------------------------------------------


def test_the_page_of_the_default(source, tmp_path, monkeypatch):
    """Every setting has its own runs, and a rate that is not the default's takes effect."""
    monkeypatch.setattr(defaults, "ALPHAS", (0.1,))
    runs, usual = tmp_path / "runs.jsonl", reference.NU_RATE
    defaults.main(["--data", source, *TINY, "--workers", "1", "--runs", str(runs), "--out", str(tmp_path)])
    made = [json.loads(line)["run"] for line in runs.read_text().splitlines()]
    settings = [(None, None), (0.1, None), (0.1, 0.01), (0.1, 0.1)]
    assert sorted(map(str, {(run["alpha"], run["rate"]) for run in made})) == sorted(map(str, settings))
    assert len(made) == 2 * len(settings) and usual == reference.NU_RATE
    page = (tmp_path / "defaults.md").read_text("utf-8")
    assert page.count("\n| 0.1 ν, rate 0.1 |") == 3 and page.count("\n| 0.1 ν, rate 0.01 |") == 1
    assert page.count("\n| 0.1, fixed |") == 3


# ---- The frontier ----------------------------------------------------------------------------------------------------


@needs_kernels
def test_the_frontier_and_its_picture(source, tmp_path):
    options = ["--width", "20", "--alphas", "0.1", "--sizes", "70", "80", "--seconds", "0.01", "--out", str(tmp_path)]
    frontier.main(["--data", source, *TINY, *options])
    page = (tmp_path / "rank_frontier.md").read_text("utf-8")
    assert "| plain SGD | - | 1.0000 |" in page and page.count("\n| R = 16 |") == 2 and "| s = 70 | s = 80 |" in page
    assert (tmp_path / "rank_frontier.png").read_bytes().startswith(b"\x89PNG")


def test_plasticity_takes_options_of_the_optimizer(source):
    data = load_npz(source).standardized()
    plain = plasticity.run(data, None, {}, 1, 0, width=20)
    dense, few = (plasticity.run(data, 0.1, {"rank": form}, 3, 0, width=20) for form in (None, 2))
    assert plain[0] == pytest.approx(1, abs=1e-6) and dense[0] < 0.9
    assert few != dense
