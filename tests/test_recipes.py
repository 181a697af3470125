"""The paper's recipes in examples/recipes/: each from a small made copy of its dataset to its row of the table."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_prepare
import torch

from benchmarks.prepare.__main__ import main as prepare
from mla_ext import load_folder
from mla_ext.multimodal import cli, config
from mla_ext.multimodal.recipe import Settings

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # transformers' own
FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
NAMES = sorted(path.stem for path in FOLDER.iterdir())
MODALITIES = {
    "cremad": ("audio", "video"),
    "kinetics_sounds": ("audio", "video"),
    "food101": ("text", "image"),
    "mvsa": ("text", "image"),
    "iemocap": ("audio", "video", "text"),
}
CLASSES = {"cremad": 6, "kinetics_sounds": 3, "food101": 2, "mvsa": 3, "iemocap": 4}  # of the made copies
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers (the extra `text`)"
)


def commands(name):
    """The commands in the comments of a recipe, in words."""
    text = (FOLDER / f"{name}.toml").read_text("utf-8")
    return [shlex.split(line) for line in re.findall(r"^#   (\S.*)$", text, flags=re.MULTILINE)]


def test_there_is_one_for_each_dataset_of_the_paper():
    assert sorted(MODALITIES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_the_papers(name):
    content = config._loads((FOLDER / f"{name}.toml").read_text("utf-8"))
    values = {key: value for table in content.values() for key, value in table.items()}
    expected = {"method": "mla", "lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 64, "epochs": 100}
    expected |= {"schedule": "step", "step_size": 70, "gamma": 0.1, "seed": 0, "order": "given", "amp": "bf16"}
    assert {key: values.get(key) for key in expected} == expected
    assert set(values) == set(expected) | {"data", "encoder", "workers"}
    encoders = " ".join(values["encoder"])
    assert ("resnet18" in encoders) == ("video" in MODALITIES[name])
    assert ("text=transformers:bert" in encoders) == ("text" in MODALITIES[name])
    assert ("image=transformers:google/vit" in encoders) == ("image" in MODALITIES[name])
    assert sorted(set(MODALITIES[name])) == sorted(
        re.search(r'order = "given"  # (.*)', (FOLDER / f"{name}.toml").read_text("utf-8"))[1].split(", ")
    )


def save_tokenizer(folder, words):
    folder.mkdir(exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')


def made(name, tmp_path):
    """What the recipe's first command prepares of a small copy, with small pictures and a tokenizer of a few words."""
    _, _, _, dataset, *options = commands(name)[0]
    root, out = tmp_path / "copy", tmp_path / "data"
    test_prepare.MAKERS[dataset](root)
    values = {"--root": root, "--out": out, "--size": 32, "--tokenizer": tmp_path / "bert"}
    options = [str(values.get(flag, value)) for flag, value in zip(["", *options], options, strict=False)]
    if "--tokenizer" in options:
        save_tokenizer(tmp_path / "bert", ["apple", "pie", "tweet", "of", "positive", "it", "is"])
    assert prepare([dataset, *options, "--no-progress"]) == 0
    return out


def save_encoders(folder):
    """A BERT for 128 tokens and a ViT for pictures of 32 pixels, as small as they can be."""
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "hidden_size": 16}
    BertModel(BertConfig(vocab_size=50, max_position_embeddings=128, **sizes)).save_pretrained(folder / "bert")
    ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder / "vit")


@pytest.mark.parametrize(
    "name",
    ["cremad", "kinetics_sounds", *(pytest.param(n, marks=needs_transformers) for n in ("food101", "mvsa", "iemocap"))],
)
def test_from_a_copy_to_the_row(name, tmp_path, capsys):
    data = made(name, tmp_path)
    options = ["--data", data, "--epochs", 1, "--workers", 0, "--out", tmp_path / "run", "--no-progress"]
    options += ["--device", "cpu"]
    if "text" in MODALITIES[name]:
        save_encoders(tmp_path)
        options += ["--encoder", f"text=transformers:{tmp_path / 'bert'}"]
        assert load_folder(data).features["text"].dtype == np.int32
    if "image" in MODALITIES[name]:
        options += ["--encoder", f"image=transformers:{tmp_path / 'vit'}"]
    if name != "cremad":  # seconds, where ResNet-18 takes a minute
        options += ["--encoder", "small"]
    if "video" in MODALITIES[name]:
        options += ["--batch-size", 16]
    assert cli.main(["train", "--config", str(FOLDER / f"{name}.toml"), *map(str, options)]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())["test"]
    assert tuple(report["modalities"]) == MODALITIES[name]
    assert report["fusions"]["entropy"]["samples"] > 0
    assert "entropy fusion" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run" / "last.pt")
    assert saved["model"]["head.weight"].shape[0] == CLASSES[name]
    settings = Settings.of_run(saved["settings"])
    assert (settings.amp, settings.schedule, settings.lr) == ("bf16", "step", 1e-3)
    assert settings.encoder == ("resnet18" if name == "cremad" else "small")
    assert (tmp_path / "run" / "confusion.png").exists()


def test_with_torchrun(tmp_path):
    """The third command of a recipe, on two processes."""
    data = made("cremad", tmp_path)
    torchrun = commands("cremad")[2]
    assert torchrun[:2] == ["torchrun", "--nproc-per-node"]
    arguments = torchrun[torchrun.index("mla_ext") + 1 :]
    values = {"--config": FOLDER / "cremad.toml", "--out": tmp_path / "run"}
    arguments = [str(values.get(flag, value)) for flag, value in zip(["", *arguments], arguments, strict=False)]
    arguments += ["--data", str(data), "--epochs", "1", "--workers", "0", "--encoder", "small", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mla_ext"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("entropy fusion") == 1
    assert "# processes: 2" in (tmp_path / "run" / "config.toml").read_text()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["epochs"] == 1


@needs_transformers
def test_token_ids(tmp_path, capsys):
    save_tokenizer(tmp_path / "bert", ["apple", "pie"])
    from benchmarks.prepare.text import token_ids

    ids = token_ids(str(tmp_path / "bert"))(["Apple pie", "pie " * 300])
    assert ids.dtype == np.int32 and ids.shape == (2, 128)
    assert ids[0, :5].tolist() == [2, 5, 6, 3, 0] and not ids[0, 5:].any()
    assert ids[1, 0] == 2 and ids[1, -1] == 3 and (ids[1, 1:-1] == 6).all()
    test_prepare.food_101(tmp_path / "copy")
    options = ["--root", str(tmp_path / "copy"), "--out", str(tmp_path / "x.npz"), "--no-progress"]
    assert prepare(["food-101", *options, "--tokenizer", str(tmp_path / "none")]) == 2
    assert "--tokenizer: expected" in capsys.readouterr().err
