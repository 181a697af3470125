"""Options in files: what a run writes repeats it, and what a file says is checked like the command line."""

import json
import sys

import helpers
import pytest
import torch

from mla_ext.multimodal import cli, config
from mla_ext.multimodal.options import GROUPS

pytestmark = pytest.mark.usefixtures("one_thread")
loads = config._loads


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(helpers.tiny_data(tmp_path_factory.mktemp("data") / "tiny.npz"))


def train(*arguments):
    return cli.main(["train", "--no-progress", "--device", "cpu", *map(str, arguments)])


# One value of each option that is not its default.
OTHER = {
    "missing": 0.1,
    "method": "mla",
    "encoder": ["small", "sight=small"],
    "width": 8,
    "lr": 0.02,
    "momentum": 0.8,
    "dampening": 0.0,
    "weight_decay": 0.001,
    "nesterov": True,
    "alpha": 0.2,
    "alpha_scale": "none",
    "absorb": "before",
    "forget": 0.01,
    "normalize": True,
    "rank": "none",
    "reset_projection": True,
    "epochs": 2,
    "batch_size": 16,
    "seed": 3,
    "order": "random",
    "schedule": "step",
    "step_size": 1,
    "gamma": 0.5,
    "label_smoothing": 0.1,
    "clip_grad_norm": 1.0,
    "amp": "bf16",
    "device": "cpu",
    "workers": 0,
    "compile": False,
    "progress": False,
    "tensorboard": False,
}


def test_what_a_run_writes_repeats_it_to_the_bit(tmp_path, file):
    text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in OTHER.items())
    (tmp_path / "mine.toml").write_text(text)
    assert train("--config", tmp_path / "mine.toml", "--data", file, "--out", tmp_path / "first") == 0
    written = tmp_path / "first" / "config.toml"
    tables = loads(written.read_text())
    assert set(tables) == set(GROUPS) - {"results"}
    values = {name: value for table in tables.values() for name, value in table.items()}
    assert values == OTHER | {"data": file}
    assert "# mla_ext: " in written.read_text() and "# checksum of the data: " in written.read_text()
    assert train("--config", written, "--out", tmp_path / "second") == 0
    names = ["config.toml", "metrics.jsonl", "report.json", "predictions.csv"]
    first, second = ([(tmp_path / run / name).read_text() for name in names] for run in ("first", "second"))
    assert first == second
    saved = torch.load(tmp_path / "second" / "last.pt")
    assert saved["settings"]["absorb"] == "before" and saved["settings"]["encoders"] == {"sight": "small"}
    group = saved["optimizer"]["param_groups"][0]
    expected = {"nesterov": True, "normalize": True, "rank": None, "forget": 0.01, "lr": pytest.approx(0.02 * 0.25)}
    assert {name: group[name] for name in expected} == expected


def test_every_setting_changes_the_training(tmp_path, file):
    """Each alone, against the run with all others: none is lost on its way."""

    def metrics(name, values):
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
        (tmp_path / f"{name}.toml").write_text(text)
        assert train("--config", tmp_path / f"{name}.toml", "--data", file, "--out", tmp_path / name) == 0
        return (tmp_path / name / "metrics.jsonl").read_text()

    base = {"width": 8, "epochs": 2, "batch_size": 16}
    plain = metrics("plain", base)
    alone = {"rank": 2, "dampening": 0.5, "schedule": "cosine", "normalize": True, "label_smoothing": 0.1}
    alone |= {"clip_grad_norm": 0.1, "reset_projection": True, "order": "reversed", "forget": 0.5, "nesterov": True}
    alone |= {"absorb": "before", "amp": "bf16", "alpha_scale": "none"}
    changed = {name: metrics(name, base | {name: value}) for name, value in alone.items()}
    assert [name for name, text in changed.items() if text == plain] == []
    assert len({plain, *changed.values()}) == len(changed) + 1


def test_arguments_win_over_the_file(tmp_path, file):
    (tmp_path / "c.toml").write_text("[training]\nepochs = 3\n[optimizer]\nnesterov = true\n[model]\nwidth = 8\n")
    out = tmp_path / "out"
    options = ["--epochs", 1, "--no-nesterov", "--data", file, "--out", out]
    assert train("--config", tmp_path / "c.toml", *options) == 0
    tables = loads((out / "config.toml").read_text())
    assert tables["training"]["epochs"] == 1 and tables["optimizer"]["nesterov"] is False
    assert tables["model"]["width"] == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr = 'fast'", "argument --lr: expected a number above 0, got 'fast'"),
        ("learning_rate = 1", "expected options of `mla-ext train`, got 'learning_rate'"),
        ("resume = true", "expected options of `mla-ext train`, got 'resume'"),
        ("lr = ", "c.toml: expected TOML"),
        ("encoder = 'vgg'", "argument --encoder: invalid choice: 'vgg'"),
        ("encoder = 'smell=small'", "encoder: expected modalities of ('sound', 'sight'), got smell"),
        ("schedule = 'warm'", "argument --schedule: invalid choice: 'warm'"),
        ("reset_projection = true\nmethod = 'concat'", "reset_projection: expected method 'mla'"),
        ("nesterov = true\nmomentum = 0.0", "esterov"),
        ("rank = 1", "argument --rank: expected auto, none or an integer of at least 2, got '1'"),
    ],
)
def test_what_a_file_may_not_say(tmp_path, capsys, file, text, expected):
    (tmp_path / "c.toml").write_text(text)
    assert train("--config", tmp_path / "c.toml", "--data", file) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and printed.out == "" and len(printed.err.splitlines()) == 1


def test_a_file_that_is_not_there_or_no_text(tmp_path, capsys):
    assert train("--config", tmp_path / "none.toml") == 2
    assert "none.toml" in capsys.readouterr().err
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    assert train("--config", tmp_path / "c.toml") == 2
    assert "expected TOML" in capsys.readouterr().err


def test_without_a_parser_of_toml(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10))
    monkeypatch.setitem(sys.modules, "tomli", None)
    (tmp_path / "c.toml").write_text("lr = 1")
    assert train("--config", tmp_path / "c.toml") == 2
    assert "--config needs Python 3.11 or newer, or tomli: pip install tomli" in capsys.readouterr().err


def test_any_text_survives(tmp_path):
    values = {"data": 'ü "quoted" \\ path\n😀', "lr": 1e-30, "epochs": 3, "nesterov": True, "encoder": ["a", "b=c"]}
    assert loads(config.text({"t": values | {"amp": None}}, {})) == {"t": values}


def test_a_schedule_that_ends_is_not_stretched(tmp_path, capsys, file):
    options = ["--data", file, "--width", 8, "--out", tmp_path / "run", "--schedule", "cosine"]
    assert train(*options, "--epochs", 2) == 0
    capsys.readouterr()
    assert train(*options, "--epochs", 3, "--resume") == 2
    assert "resume: expected a run with epochs 3, got 2" in capsys.readouterr().err
    rates = [json.loads(line)["lr"][0] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.01, 0.005])


def test_help_is_one_screen_in_groups(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120
    assert [group for group in GROUPS if f"{group}:" not in lines] == []
