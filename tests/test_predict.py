"""Predictions as tables: what is in them is what `predict` says, and a picture of a run shows it."""

import csv
import json
import sys

import helpers
import numpy as np
import pytest
import torch

import mla_ext
from mla_ext.multimodal import cli, plots
from mla_ext.multimodal.predict import predict_split, read_classes, write
from mla_ext.multimodal.recipe import Settings, build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return helpers.tiny_data(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture(scope="module")
def run(tmp_path_factory, file):
    out = tmp_path_factory.mktemp("runs") / "incomplete"
    options = ["--epochs", "3", "--width", "8", "--missing", "0.4", "--out", str(out), "--no-progress"]
    assert cli.main(["train", "--data", str(file), *options]) == 0
    return out


@pytest.mark.parametrize("method", ["mla", "late"])
def test_the_columns_are_what_the_model_says(tmp_path, file, method):
    data = mla_ext.load_npz(file).with_missing(0.5, 1).standardized()
    model, _ = build(data, Settings(method=method, width=8))
    found = predict_split(model, data, "all")
    expected = mla_ext.predict(model, data, torch.arange(len(data)))
    fused = expected.fusions["joint" if method == "late" else "entropy"].double().softmax(-1)
    assert torch.equal(found.fused_class, fused.argmax(-1))
    torch.testing.assert_close(found.fused_probability, fused.amax(-1))
    p = expected.unimodal.double().softmax(-1)
    present = expected.present
    assert (~present).sum() > 0 and (found.modality_class[~present] == -1).all()
    assert torch.equal(found.modality_class[present], p.argmax(-1)[present])
    torch.testing.assert_close(found.modality_probability[present], p.amax(-1)[present])
    torch.testing.assert_close(found.entropy[present], -(p * p.log()).sum(-1)[present])
    torch.testing.assert_close(found.weight.sum(0), torch.ones(len(data), dtype=torch.float64))
    write(found, tmp_path / "p.npz")
    arrays = np.load(tmp_path / "p.npz")
    assert set(arrays) == set(vars(found)) and arrays["classes"].tolist() == ["one", "two", "three"]
    assert np.array_equal(arrays["modality_class"], found.modality_class.numpy())


def test_the_command_writes_what_training_wrote(tmp_path, capsys, file, run):
    for name in ("test.csv", "new/test.npz"):
        arguments = ["--data", file, "--run", run, "--out", tmp_path / name]
        assert cli.main(["predict", *map(str, arguments)]) == 0
    assert (tmp_path / "test.csv").read_text() == (run / "predictions.csv").read_text()
    with open(tmp_path / "test.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    report = json.loads((run / "report.json").read_text())["test"]
    right = sum(row["label"] == row["predicted"] for row in rows) / len(rows)
    assert len(rows) == 12 and right == pytest.approx(report["fusions"]["entropy"]["accuracy"])
    assert f"fused accuracy {right:.2%}" in capsys.readouterr().out
    sound = [row for row in rows if row["sound class"]]
    assert 0 < len(sound) == report["modalities"]["sound"]["samples"] < 12
    accuracy = sum(row["label"] == row["sound class"] for row in sound) / len(sound)
    assert accuracy == pytest.approx(report["modalities"]["sound"]["accuracy"])
    assert all(float(row["sound weight"]) == 1 for row in sound if not row["sight class"])
    assert read_classes(tmp_path / "test.csv") == ([r["label"] for r in rows], [r["predicted"] for r in rows])


def test_other_splits(tmp_path, file, run):
    for split, samples in {"train": 36, "validation": 12, "all": 60}.items():
        arguments = ["--data", file, "--run", run, "--split", split, "--out", tmp_path / "x.csv"]
        assert cli.main(["predict", *map(str, arguments)]) == 0
        assert len((tmp_path / "x.csv").read_text().splitlines()) == samples + 1


def test_refusals(tmp_path, capsys, file, run):
    assert cli.main(["predict", "--data", str(file), "--run", str(run), "--out", str(tmp_path / "x.txt")]) == 2
    assert "--out: expected a file that ends in .csv or .npz" in capsys.readouterr().err
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected a file of predictions"):
        read_classes(tmp_path / "x.csv")
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert "RUN: expected the directory of a training run" in capsys.readouterr().err


def test_pictures_of_runs(tmp_path, capsys, run):
    drawn = {path.name: path.read_bytes() for path in run.glob("*.png")}
    assert set(drawn) == {"training.png", "confusion.png", "reliability.png"}
    for name in drawn:
        (run / name).unlink()
    assert cli.main(["plot", str(run), str(run), "--out", str(tmp_path / "new" / "both.png")]) == 2  # one run only
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    capsys.readouterr()
    assert cli.main(["plot", str(run), str(other), "--out", str(tmp_path / "new" / "both.png")]) == 0
    assert {path.name: path.read_bytes() for path in run.glob("*.png")} == drawn
    assert [path.name for path in other.glob("*.png")] == ["training.png"]
    for picture in (*run.glob("*.png"), tmp_path / "new" / "both.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 8_000


def lines(ax):
    return {line.get_label(): line.get_ydata() for line in ax.lines}


def test_a_picture_shows_the_history(run):
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracy, loss, plasticity = plots.draw_training(history, "title").axes
    fused = [record["validation"]["fusions"]["entropy"]["accuracy"] for record in history]
    assert list(lines(accuracy)["entropy fusion"]) == fused
    assert {"sound", "sight"} < set(lines(accuracy))
    assert list(lines(loss)["training, sight"]) == [record["training_loss"]["sight"] for record in history]
    values, passed = lines(plasticity).values()
    assert list(values) == [record["plasticity"] for record in history]
    assert list(passed) == [record["gradient_passed"] for record in history]
    assert min(passed) > 0
    assert max(passed) < 1
    assert 0 < values[-1] < values[0] < 1  # P only shrinks
    old = [{key: value for key, value in record.items() if key != "plasticity"} for record in history]
    assert len(plots.draw_training(old, "title").axes) == 2


def test_a_confusion_matrix_counts():
    figure = plots.draw_confusion(list("aabbc"), list("abbba"), "title")
    shares = figure.axes[0].images[0].get_array()
    assert np.allclose(shares, [[0.5, 0.5, 0], [0, 1, 0], [1, 0, 0]])
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["1", "1", "1", "2"]


def test_tensorboard(tmp_path, capsys, file):
    options = ["--epochs", "2", "--width", "8", "--no-progress", "--tensorboard"]
    assert cli.main(["train", "--data", str(file), *options]) == 2
    assert "--tensorboard: expected --out too" in capsys.readouterr().err
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert cli.main(["train", "--data", str(file), *options, "--out", str(tmp_path)]) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    written = [event.value for event in events.Scalars("loss/validation")]
    assert written == pytest.approx([record["validation"]["loss"] for record in history])
    assert {"accuracy/sound", "accuracy/entropy", "loss/training sight", "lr", "plasticity"} <= set(
        events.Tags()["scalars"]
    )


def test_without_tensorboard(tmp_path, capsys, monkeypatch, file):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = ["--out", str(tmp_path / "out"), "--no-progress", "--tensorboard"]
    assert cli.main(["train", "--data", str(file), *options]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
