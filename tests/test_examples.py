"""Every file in examples/ runs and does what it is there to show."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import needs_gpu

FOLDER = Path(__file__).parents[1] / "examples"


def needs(library):
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}")


def run(name):
    """Runs examples/`name`.py in this process, which has torch already; returns its variables."""
    with torch.random.fork_rng(devices=[]):
        return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


def test_each_is_tested_and_short():
    names = {path.stem for path in FOLDER.iterdir() if path.suffix == ".py"}
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(names) >= 7 and {name for name in names if f'"{name}"' not in source} == set()
    longest = {"continual": 100}  # with the methods that it is compared with
    lines = {name: len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in names}
    assert [name for name in names if lines[name] > longest.get(name, 60)] == []
    assert [name for name in names if importlib.util.find_spec(name) is not None] == []  # shadows no library


def test_drop_in(capsys):
    shown = run("drop_in")
    assert shown["accuracy"] > 0.9
    assert shown["eigenvalues"].min() < 0.5
    assert "accuracy" in capsys.readouterr().out


def test_whole_method():
    shown = run("whole_method")
    fused = shown["report"].fusions["entropy"]
    assert fused.accuracy > 0.85 and fused.samples == 120
    assert shown["report"].modalities["image"].samples == 80
    assert len(shown["history"]) == 5
    assert shown["prediction"].weights.sum() == pytest.approx(1)


def test_checkpoint():
    shown = run("checkpoint")
    assert shown["same"]
    weight, other = shown["model"][2].weight, shown["other_model"][2].weight
    assert not torch.equal(weight, shown["saved"]["model"]["2.weight"])  # the run did go on
    P = shown["optimizer"].projection(weight)
    assert torch.equal(P, shown["other_optimizer"].projection(other))
    assert (P - torch.eye(64)).norm() > 1


def test_continual(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with torch.random.fork_rng(devices=[]):
        results = runpy.run_path(str(FOLDER / "continual.py"), run_name="continual")["main"](seeds=1)
    last = {method: accuracy[-1].mean() for method, accuracy in results.items()}
    assert last["projection"] > 0.8 and max(last["SGD"], last["EWC"]) < 0.4
    assert (tmp_path / "continual.png").stat().st_size > 0


def run_on_two_ranks(name, cwd=None):
    """The lines that examples/`name`.py prints on two ranks."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, FOLDER / f"{name}.py"], capture_output=True, text=True, env=environment, cwd=cwd)
    # A gloo thread that DDP keeps alive may abort a process while Python ends (pytorch/pytorch, pull request 179291).
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr
    return done.stdout.splitlines()


def test_ddp():
    (line,) = run_on_two_ranks("ddp")
    assert line.endswith("P equal on all 2 ranks: True")
    assert float(line.partition("accuracy ")[2].partition(";")[0]) > 0.9


def test_ddp_says_how_it_is_started():
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2"):
        run("ddp")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_graph_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as end:
        run("cuda_graph")
    assert not end.value.code
    assert "no GPU here" in capsys.readouterr().out


@needs_gpu
def test_cuda_graph():
    shown = run("cuda_graph")
    assert shown["accuracy"] > 0.9
    assert shown["moved"] > 1
    assert float(shown["optimizer"].param_groups[0]["lr"]) == pytest.approx(0.0005)


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.usefixtures("own_accelerate")
@pytest.mark.parametrize(
    ("name", "accuracy"),
    [
        pytest.param("lightning_module", 0.9, marks=needs("lightning")),
        pytest.param("lightning_manual", 0.9, marks=needs("lightning")),
        pytest.param("accelerate_loop", 0.9, marks=needs("accelerate")),
        pytest.param("transformers_trainer", 0.6, marks=[needs("transformers"), needs("accelerate")]),
        pytest.param("timm_registry", 0.65, marks=needs("timm")),
        pytest.param("skorch_search", 0.7, marks=needs("skorch")),
        pytest.param("ignite_engine", 0.9, marks=needs("ignite")),
        pytest.param("avalanche_plugin", 0.45, marks=needs("avalanche")),
    ],
)
def test_in_a_framework(name, accuracy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run(name)
    assert shown["accuracy"] > accuracy
    assert shown["moved"] > 1
    assert shown.get("resumed", True)
    assert shown.get("plain", 0) < 0.3  # what Avalanche's strategy alone keeps of five tasks


@needs("accelerate")
def test_accelerate_with_two_processes(tmp_path):
    (line,) = run_on_two_ranks("accelerate_loop", cwd=tmp_path)
    assert "of 2 processes; P resumed: True" in line
    assert float(line.removeprefix("accuracy ").partition(" ")[0]) > 0.9
