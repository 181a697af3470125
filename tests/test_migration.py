"""What version 0.1.0 wrote is loaded and continued: tests/data/0.1.0 against the version at hand.

The files were written by `python tests/test_migration.py tests/data/0.1.0` with mla_ext 0.1.0 installed. On the kind of
machine that wrote them the results have the same bits; elsewhere rounding differs.
"""

import gzip
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mla_ext

pytestmark = pytest.mark.usefixtures("one_thread")

OLD = Path(__file__).parent / "data" / "0.1.0"
ACTIVE = {20: 20, 300: 60}  # s: how many features ever are; elsewhere P stays the identity, so its file is small
FORGET = {20: 1e-3, 300: 0.0}
CLASSES, BEFORE, AFTER = 5, 37, 20


def machine():
    """What the bits of a result depend on."""
    isa, torch_isa = mla_ext.build_info()["cpu_isa"], torch.backends.cpu.get_cpu_capability()
    cpus = Path("/proc/cpuinfo")
    models = [line for line in cpus.read_text().splitlines() if line.startswith("model name")] if cpus.exists() else []
    return {"torch": torch.__version__, "cpu_isa": isa, "torch_isa": torch_isa, "cpu": "".join(models[:1])}


def make(s, **options):
    torch.manual_seed(0)
    encoder, head = nn.Linear(12, s), nn.Linear(s, CLASSES)
    with torch.no_grad():
        encoder.bias[ACTIVE[s] :] = -10.0
    model = nn.Sequential(encoder, nn.ReLU(), head)
    optimizer = mla_ext.ProjectedSGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, alpha=0.1, forget=FORGET[s], **options
    )
    optimizer.attach(head)
    return model, optimizer


def train(model, optimizer, steps):
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x, y = torch.randn(16, 12, generator=generator), torch.randint(CLASSES, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def command_line(*arguments):
    """In this process, so that it has one thread. The module's place changed before 0.1.0."""
    try:
        from mla_ext.multimodal.cli import main
    except ImportError:
        from mla_ext.cli import main
    assert main(["train", "--width", "16", "--batch-size", "16", "--no-progress", *map(str, arguments)]) == 0


def write(folder):
    """Everything in tests/data/0.1.0."""
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    for s in ACTIVE:
        model, optimizer = make(s)
        train(model, optimizer, range(BEFORE))
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        train(model, optimizer, range(BEFORE, BEFORE + AFTER))
        continued = io.BytesIO()
        torch.save({"model": model.state_dict(), "projection": optimizer.projection(model[2].weight)}, continued)
        for name, content in (("saved", buffer), ("continued", continued)):
            (folder / f"{name}_{s}.pt.gz").write_bytes(gzip.compress(content.getvalue(), mtime=0))

    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    np.savez_compressed(
        folder / "data.npz",
        modalities=np.array(["sound", "sight"]),
        x_sound=(rng.normal(size=(3, 5))[y] + rng.normal(size=(90, 5))).astype(np.float32),
        x_sight=(rng.normal(size=(3, 7))[y] + rng.normal(size=(90, 7))).astype(np.float32),
        y=y,
        classes=np.array(["one", "two", "three"]),
        split=np.repeat([0, 1, 2], [54, 18, 18]).astype(np.int8),
    )
    command_line("--data", folder / "data.npz", "--epochs", 2, "--out", folder / "run")
    for epochs in (3, 4):
        out = folder / f"run_{epochs}"
        shutil.copytree(folder / "run", out)
        command_line("--data", folder / "data.npz", "--epochs", epochs, "--out", out, "--resume")
    (folder / "machine.json").write_text(json.dumps(machine(), indent=2) + "\n")


def read(name):
    return torch.load(io.BytesIO(gzip.decompress((OLD / f"{name}.pt.gz").read_bytes())), weights_only=True)


@pytest.fixture
def tolerance():
    return (
        {"rtol": 0, "atol": 0}
        if json.loads((OLD / "machine.json").read_text()) == machine()
        else {"rtol": 1e-4, "atol": 1e-5}
    )


@pytest.mark.parametrize("s", ACTIVE)
def test_an_optimizer_goes_on(s, tolerance):
    saved, continued = read(f"saved_{s}"), read(f"continued_{s}")
    model, optimizer = make(s)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    loaded = optimizer.projection(model[2].weight)
    assert torch.equal(loaded, saved["optimizer"]["state"][2]["projection"])
    train(model, optimizer, range(BEFORE, BEFORE + AFTER))
    P = optimizer.projection(model[2].weight)
    assert not torch.allclose(P, loaded)
    torch.testing.assert_close(P, continued["projection"], **tolerance)
    torch.testing.assert_close(model.state_dict(), continued["model"], **tolerance)


@pytest.mark.parametrize("s", ACTIVE)
def test_the_defaults_of_0_1_0_give_its_results(s, tolerance):
    """docs/changes.md says so."""
    saved = read(f"saved_{s}")
    model, optimizer = make(s, alpha_scale=None, rank=None)
    train(model, optimizer, range(BEFORE))
    P = optimizer.projection(model[2].weight)
    torch.testing.assert_close(P, saved["optimizer"]["state"][2]["projection"], **tolerance)
    torch.testing.assert_close(model.state_dict(), saved["model"], **tolerance)


@pytest.mark.parametrize("epochs", [3, 4])
def test_a_run_goes_on(tmp_path, tolerance, epochs):
    if epochs == 4:  # 0.1.0 made all updates of P at the end of each epoch; now they are made when there are 16
        tolerance = {"rtol": 1e-5, "atol": 1e-7}
    shutil.copytree(OLD / "run", tmp_path / "run")
    command_line("--data", OLD / "data.npz", "--epochs", epochs, "--out", tmp_path / "run", "--resume")
    ours, theirs = (torch.load(folder / "last.pt") for folder in (tmp_path / "run", OLD / f"run_{epochs}"))
    assert ours["epoch"] == theirs["epoch"] == epochs
    for model, expected in ((ours["model"], theirs["model"]), (ours["best"]["model"], theirs["best"]["model"])):
        added = {name: model.pop(name) for name in ("temperatures", "fusion_index")}  # not known to 0.1.0
        assert (added["temperatures"] > 0).all()
        torch.testing.assert_close(model, expected, **tolerance)
    for record, expected in zip(ours["history"], theirs["history"], strict=True):
        losses = [[*r["training_loss"].values(), r["validation"]["loss"]] for r in (record, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=tolerance["rtol"], abs=0)
        assert record["best"] == expected["best"]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
