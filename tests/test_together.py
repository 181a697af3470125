"""Runs that are trained side by side give what each gives alone."""

import dataclasses

import numpy as np
import pytest
import torch
from evidence_data import write_data

from benchmarks.evidence import runs
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.protocol import Evidence
from benchmarks.evidence.runs import Results, Run, Trained

TOGETHER = [name for name, method in METHODS.items() if method.together]


@pytest.fixture
def source(tmp_path):
    return write_data(tmp_path / "data.npz", 3, samples=150)


@pytest.fixture
def in_float64():
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(usual)


def three(source, method, **changes):
    """Three runs of one group: nothing but data, method and epochs is the same."""
    own = METHODS[method].candidates or (None,) * 3
    made = [
        Run(source, method, lr, decay, own[i], seed, epochs=3, **changes)
        for i, (lr, decay, seed) in enumerate(((0.01, 1e-4, 7), (0.05, 1e-2, 0), (0.2, 1e-3, 1)))
    ]
    assert len({runs.group(run) for run in made}) == 1
    return made


@pytest.mark.parametrize("method", TOGETHER)
def test_weights_and_epochs_are_those_of_fit(source, method, in_float64):
    data = runs.load(source, 0.0, 0)
    made = three(source, method)
    for run, found in zip(made, runs.train_together(made, data), strict=True):
        expected = runs.train(run, data)
        assert (found.best, found.validation) == (expected.best, expected.validation)
        for there, here in ((expected.model.state_dict(), found.model.state_dict()), (expected.last, found.last)):
            assert there.keys() == here.keys()
            for name, value in there.items():
                torch.testing.assert_close(here[name], value, rtol=1e-7, atol=1e-9)


def test_the_mean_of_the_logits_can_stand_for_the_model(source, in_float64):
    data = runs.load(source, 0.0, 0)
    made = three(source, "mla", fusion="mean")
    for run, found in zip(made, runs.train_together(made, data), strict=True):
        assert found.validation == runs.train(run, data).validation


def test_a_run_that_diverges_leaves_the_others_alone(source):
    data = runs.load(source, 0.0, 0)
    made = three(source, "concat")
    alone = runs.train_together(made[:1], data)[0]
    made[1] = dataclasses.replace(made[1], lr=1e30)
    first, wild, last = runs.train_together(made, data)
    assert "loss is" in wild
    assert isinstance(last, Trained) and first.validation == alone.validation
    assert runs.execute(made[1], wild) == {"diverged": wild}


def test_what_cannot_be_trained_side_by_side_is_alone(source, tmp_path):
    run = Run(source, "mla", 0.1, 1e-3, 0.1, 0)
    assert runs.group(run) == runs.group(dataclasses.replace(run, seed=1, lr=0.2, own=1.0, split="validation"))
    for change in ({"method": "igm"}, {"missing": 0.2}, {"order": "random"}, {"order": "m1,m0,m2"}):
        other = dataclasses.replace(run, **change)
        assert runs.group(other) == other
    assert runs.group(dataclasses.replace(run, method="concat")) != runs.group(run)
    assert runs.group(dataclasses.replace(run, epochs=1)) != runs.group(run)


def test_incomplete_data_is_trained_alone(source, tmp_path):
    arrays = dict(np.load(source))
    arrays["row_m0"] = np.where(np.arange(150) % 4 == 0, -1, np.arange(150))
    np.savez(tmp_path / "incomplete.npz", **arrays)
    run = Run(str(tmp_path / "incomplete.npz"), "mla", 0.1, 1e-3, 0.1, 0)
    assert runs.group(run) == run


def test_results_of_groups_are_kept_by_run(source, tmp_path):
    made = three(source, "alternating")
    e = Evidence([source], Results(tmp_path / "together.jsonl"), tmp_path, 2, 3, 1)
    e.complete(made, "together")
    alone = Results(tmp_path / "alone.jsonl")
    alone.complete(made, "alone", 1)
    for run in made:
        assert e.results[run]["accuracy"] == pytest.approx(alone[run]["accuracy"], abs=0.03)
        assert e.results[run].keys() == alone[run].keys()
    assert len((tmp_path / "together.jsonl").read_text().splitlines()) == 3
