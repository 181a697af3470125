import json
import subprocess
import sys
import zipfile

import helpers
import numpy as np
import pytest
import torch

from mla_ext.multimodal import checkpoint, cli, commands, demo
from mla_ext.multimodal.files import load_npz
from mla_ext.multimodal.model import FUSIONS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny, learnable data file: a vector and an image."""
    return str(helpers.tiny_data(tmp_path_factory.mktemp("data") / "tiny.npz"))


def error(capsys, *arguments):
    """Run a command that must fail; its one line on standard error."""
    assert cli.main(list(map(str, arguments))) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("mla-ext: error: ")
    return line.removeprefix("mla-ext: error: ")


def train(file, *arguments):
    return cli.main(["train", "--data", file, "--no-progress", *map(str, arguments)])


@pytest.mark.parametrize("method", ["mla", "alternating", "concat", "late"])
def test_train_then_evaluate_print_the_same_table(capsys, tmp_path, file, method):
    options = ["--method", method, "--epochs", 3, "--width", 8, "--seed", 1, "--missing", 0.2, "--out", tmp_path]
    assert train(file, *options) == 0
    trained = capsys.readouterr().out
    last = "joint" if method in ("concat", "late") else "calibrated fusion"
    rows = ["sound", "sight", "mean fusion", "entropy fusion", last]
    assert [line.split("  ")[0] for line in trained.splitlines()[2:-1]] == rows
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["method"], report["epochs"], report["test"]["split"]) == (method, 3, "test")
    entropy = report["test"]["fusions"]["entropy"]
    label = "entropy fusion".ljust(max(map(len, rows)))
    assert f"{label}  {entropy['accuracy']:>7.2%}    {entropy['macro_f1']:>7.2%}" in trained

    assert cli.main(["evaluate", "--data", file, "--run", str(tmp_path)]) == 0
    evaluated = capsys.readouterr().out
    assert evaluated.splitlines()[1:] == trained.splitlines()[1:-1]


def test_the_encoder_is_part_of_the_run(capsys, tmp_path, file):
    """Its own width unless another is asked for; evaluating rebuilds it, resuming and old runs must agree in it."""
    options = ["--encoder", "resnet18", "--epochs", 1, "--batch-size", 36, "--out", tmp_path]
    assert train(file, *options) == 0
    trained = capsys.readouterr().out
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (saved["settings"]["encoder"], saved["settings"]["width"]) == ("resnet18", 512)
    assert saved["model"]["head.weight"].shape == (3, 512)
    assert cli.main(["evaluate", "--data", file, "--run", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == trained.splitlines()[1:-1]
    message = error(capsys, "train", "--data", file, *options, "--encoder", "small", "--width", 512, "--resume")
    assert "resume: expected a run with" in message
    assert "invalid choice: 'vgg'" in error(capsys, "train", "--data", file, "--encoder", "vgg")

    del saved["settings"]["encoder"]
    torch.save(saved, tmp_path / "last.pt")
    assert "got one without encoder" in error(capsys, "evaluate", "--data", file, "--run", tmp_path)
    assert "resume: expected a run with encoder" in error(capsys, "train", "--data", file, *options, "--resume")


def test_resume_ends_where_an_uninterrupted_run_does(capsys, tmp_path, file):
    assert train(file, "--epochs", 4, "--out", tmp_path / "whole") == 0
    assert train(file, "--epochs", 2, "--out", tmp_path / "parts", "--resume") == 0
    assert train(file, "--epochs", 4, "--out", tmp_path / "parts", "--resume") == 0
    for name in ("report.json", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text()
    capsys.readouterr()
    before = (tmp_path / "parts" / "report.json").read_text()
    assert error(capsys, "train", "--data", file, "--out", tmp_path / "parts", "--resume", "--lr", 0.5).startswith(
        "resume: expected a run with lr 0.5, got 0.01 in"
    )
    assert (tmp_path / "parts" / "report.json").read_text() == before


def test_a_folder_is_the_same_data(capsys, tmp_path, file):
    """A run of one goes on with the other, with workers; the results are the same to the last digit."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with np.load(file) as arrays:
        for key, array in arrays.items():
            np.save(folder / f"{key}.npy", array)
    assert train(file, "--epochs", 3, "--out", tmp_path / "file") == 0
    assert train(str(folder), "--epochs", 2, "--workers", 2, "--out", tmp_path / "folders") == 0
    assert train(file, "--epochs", 3, "--out", tmp_path / "folders", "--resume") == 0
    for name in ("report.json", "metrics.jsonl"):
        assert (tmp_path / "file" / name).read_text() == (tmp_path / "folders" / name).read_text()
    capsys.readouterr()
    assert cli.main(["evaluate", "--data", str(folder), "--run", str(tmp_path / "file")]) == 0
    table = capsys.readouterr().out.splitlines()[1:]
    assert cli.main(["evaluate", "--data", file, "--run", str(tmp_path / "file")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == table


def test_device_and_precision(capsys, tmp_path, file):
    assert train(file, "--epochs", 2, "--device", "cpu", "--amp", "bf16", "--out", tmp_path / "half") == 0
    half = capsys.readouterr().out.splitlines()
    assert "trained on cpu, test split:" in half[0]
    assert cli.main(["evaluate", "--data", file, "--run", str(tmp_path / "half")]) == 0  # in the run's precision
    assert capsys.readouterr().out.splitlines()[1:] == half[1:-1]
    assert train(file, "--epochs", 2, "--device", "cpu", "--out", tmp_path / "full") == 0
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("half", "full")]
    assert metrics[0] != metrics[1]
    capsys.readouterr()
    message = error(capsys, "train", "--data", file, "--device", "cpu", "--out", tmp_path / "half", "--resume")
    assert "resume: expected a run with amp None, got 'bf16'" in message
    for option, value, expected in (
        ("--device", "tpu", "device: expected one that works here, got 'tpu'"),
        ("--workers", "-1", "argument --workers: expected an integer of at least 0"),
        ("--amp", "fp8", "invalid choice: 'fp8'"),
    ):
        assert expected in error(capsys, "train", "--data", file, option, value)


def test_methods_and_settings_reach_the_training(capsys, tmp_path, file):
    outputs = set()
    for options in (
        ["mla"],
        ["mla", "--alpha", 1e-3],
        ["alternating"],
        ["alternating", "--weight-decay", 0.1],
        ["concat"],
    ):
        out = tmp_path / str(len(outputs))
        assert train(file, "--method", *options, "--epochs", 2, "--out", out) == 0
        outputs.add((out / "metrics.jsonl").read_text())
    assert len(outputs) == 5


def test_a_refused_run_leaves_the_one_in_out_as_it_is(capsys, tmp_path, file):
    assert train(file, "--epochs", 1, "--out", tmp_path / "out") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    arguments = ["train", "--data", file, "--out", tmp_path / "out"]
    assert error(capsys, *arguments).startswith("--out: expected a directory without a run, got")
    other = dict(np.load(file))
    other["x_sight"] = other["x_sight"] + 1  # data that differs in nothing but its values
    np.savez(tmp_path / "other.npz", **other)
    arguments[2] = tmp_path / "other.npz"
    assert "resume: expected a run with checksum" in error(capsys, *arguments, "--resume")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_bad_input_is_one_line(capsys, tmp_path, file):
    assert "No such file" in error(capsys, "train", "--data", tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no numbers")
    assert "not a readable .npz" in error(capsys, "train", "--data", tmp_path / "text.npz")
    assert "--data" in error(capsys, "train")
    assert "invalid choice: 'sum'" in error(capsys, "train", "--data", file, "--method", "sum")
    for flag in ("--epochs", "--batch-size", "--lr", "--momentum", "--weight-decay", "--alpha", "--width", "--missing"):
        assert f"argument {flag}: expected" in error(capsys, "train", "--data", file, flag, "-1")
    assert "expected an integer of at least 1, got '1.5'" in error(capsys, "train", "--data", file, "--epochs", "1.5")
    assert "--out too" in error(capsys, "train", "--data", file, "--resume")
    assert "directory of a training run" in error(capsys, "evaluate", "--data", file, "--run", tmp_path)
    assert "training loss of s" in error(
        capsys, "train", "--data", file, "--lr", "1e30", "--batch-size", 8, "--no-progress"
    )
    assert "required" in error(capsys)


def test_evaluate_refuses_other_data_and_damaged_runs(capsys, tmp_path, file):
    assert train(file, "--epochs", 1, "--out", tmp_path) == 0
    capsys.readouterr()
    arrays = dict(np.load(file))
    np.savez(tmp_path / "other.npz", **(arrays | {"split": np.arange(60) % 3}))
    assert "--data: expected checksum" in error(capsys, "evaluate", "--data", tmp_path / "other.npz", "--run", tmp_path)
    checkpoint = (tmp_path / "last.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "last.pt") as archive:
        tensor = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    flipped = bytearray(checkpoint)
    flipped[checkpoint.index(tensor)] ^= 1  # between the entries there is padding, which no checksum covers
    for damaged in (bytes(flipped), checkpoint[: len(checkpoint) // 2]):
        (tmp_path / "last.pt").write_bytes(damaged)
        message = error(capsys, "evaluate", "--data", file, "--run", tmp_path)
        assert f"{tmp_path / 'last.pt'}: expected a checkpoint of a training run" in message


def test_interrupting_says_how_to_go_on(capsys, monkeypatch, file):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "fit", interrupt)
    assert train(file) == 130
    assert "--resume" in capsys.readouterr().err


def test_info_and_the_module_entry(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "mla_ext", "info"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert "reference" in facts["backends"]
    assert set(facts) >= {"version", "torch", "cuda", "backends"}


def test_demo_in_brief(capsys, monkeypatch, tmp_path, file):
    time_step = demo.time_step
    monkeypatch.setattr(demo, "digits", lambda seed: load_npz(file))
    monkeypatch.setattr(demo, "time_step", lambda widths: time_step(widths[:1], repeats=3))
    assert cli.main(["demo", "--out", str(tmp_path / "new"), "--epochs", "2", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "new" / "mla_ext_demo.png"
    assert f"Picture: {path}" in printed
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
    for title in ("Concatenation", "Alternation alone", "MLA"):
        (line,) = [line for line in printed.splitlines() if line.startswith(title)]
        assert line.count("%") == (5 if title == "Concatenation" else 4)


def test_step_times():
    times = demo.time_step((8, 33), repeats=3)
    assert set(times) == {8, 33}
    assert all(set(row) == {"SGD", "reference", "mla_ext"} and min(row.values()) > 0 for row in times.values())


@pytest.mark.parametrize("module", ["matplotlib.figure", "sklearn.datasets"])
def test_demo_names_the_missing_extra(capsys, monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install" in error(capsys, "demo", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_keeps_its_temperatures_and_its_fusion(file, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--data", file, "--epochs", "1", "--width", "8", "--out", str(out), "--missing", "0.2"]
    assert cli.main(["train", *options]) == 0
    report = json.loads((out / "report.json").read_text())
    best = checkpoint.load(out / "last.pt")["best"]["model"]
    assert list(report["temperatures"].values()) == best["temperatures"].tolist() != [1.0] * len(best["temperatures"])
    assert report["test"]["fused"] == FUSIONS[best["fusion_index"]]
    capsys.readouterr()
    for fusion in ("auto", "mean"):
        chosen = report["test"]["fused"] if fusion == "auto" else fusion
        evaluate = ["evaluate", "--data", file, "--run", str(out), "--fusion", fusion]
        assert cli.main(evaluate) == 0
        printed = capsys.readouterr().out
        assert f"mla, fused: {chosen}, " in printed
        assert f"{report['reliability']['fused']['after']['ece']:.2%}\n" in printed
        predict = ["predict", *evaluate[1:], "--out", str(tmp_path / "found.csv")]
        assert cli.main(predict) == 0
        assert f"fused accuracy {report['test']['fusions'][chosen]['accuracy']:.2%}" in capsys.readouterr().out
    assert cli.main(["train", *options, "--resume"]) == 0  # nothing is left to do; the same again
    assert json.loads((out / "report.json").read_text()) == report
