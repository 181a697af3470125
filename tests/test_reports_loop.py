"""What other people's reports found in the loop: what `fit` and `evaluate` promise holds for any encoder and split."""

import copy
import dataclasses
import enum
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import SHAPES, make, make_data, metrics, run, same
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from benchmarks.evidence import experiments, measures, report, runs
from mla_ext.multimodal import checkpoint
from mla_ext.multimodal.cli import main
from mla_ext.multimodal.data import digits
from mla_ext.multimodal.evaluate import evaluate
from mla_ext.multimodal.files import load_npz
from mla_ext.multimodal.model import ConcatModel, SharedHeadModel


class View(nn.Module):
    """An encoder that cannot reshape a batch of none."""

    def __init__(self, shape, *layers):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(int(np.prod(shape)), 8), *copy.deepcopy(layers))

    def forward(self, x):
        return self.layers(x.view(x.size(0), -1))


def of_views(joint=False, *layers):
    torch.manual_seed(0)
    encoders = {m: View(shape, *layers) for m, shape in SHAPES.items()}
    model = ConcatModel(encoders, nn.Linear(24, 4)) if joint else SharedHeadModel(encoders, nn.Linear(8, 4))
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def without(data, modality, split):
    """The data in which no sample of the split has the modality."""
    rows = dict(data.rows)
    rows[modality] = rows[modality].where(data.split != split, -1)
    return dataclasses.replace(data, rows=rows)


def save_npz(path, data):
    arrays = {f"x_{m}": data.features[m].numpy() for m in data.modalities}
    arrays |= {f"row_{m}": data.rows[m].numpy() for m in data.modalities}
    arrays |= {"y": data.labels.numpy(), "split": data.split.numpy()}
    np.savez(path, modalities=np.array(data.modalities), classes=np.array(data.classes), **arrays)
    return path


def cosine(epoch):
    return (1 + np.cos(epoch / 9)) / 2


def test_scheduler_of_numpy_numbers(tmp_path):
    """Case 9: the checkpoint could not be read back."""
    model, optimizer = make()
    run(model, optimizer, make_data(), epochs=2, scheduler=LambdaLR(optimizer, cosine), out=tmp_path / "a")
    model, optimizer = make()
    schedule = LambdaLR(optimizer, cosine)
    run(model, optimizer, make_data(), epochs=4, scheduler=schedule, out=tmp_path / "a", resume=True)
    whole, optimizer = make()
    run(whole, optimizer, make_data(), epochs=4, scheduler=LambdaLR(optimizer, cosine))
    assert same(model.state_dict(), whole.state_dict())


def test_config_of_numpy_numbers(tmp_path):
    """Kind of 9: NumPy's numbers in the user's config."""
    for resume in (False, True):
        model, optimizer = make()
        run(model, optimizer, make_data(), epochs=1, out=tmp_path, resume=resume, config={"rate": np.float32(0.5)})
    assert checkpoint.load(tmp_path / "last.pt")["settings"]["rate"] == 0.5


@pytest.mark.parametrize("value", [Path("x"), enum.Enum("Kind", "A").A, object()])
def test_config_that_cannot_be_read_back(tmp_path, value):
    """Kind of 9: refused before the first step, and the run that is there stays."""
    model, optimizer = make()
    run(model, optimizer, make_data(), epochs=1, out=tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(TypeError, match=r"\['settings'\]\['what'\]"):
        run(model, optimizer, make_data(), epochs=1, out=tmp_path, config={"what": value})
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.fixture
def other_device():
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


@pytest.mark.parametrize("order", ["given", "random"])
def test_fit_under_another_default_device(other_device, order):
    """Case 10: fit and evaluate."""
    data, (model, optimizer), (expected, plain) = make_data(), of_views(), of_views()
    run(expected, plain, data, epochs=1, order=order)
    other_device()
    run(model, optimizer, data, epochs=1, order=order)
    evaluate(model, data)
    assert same(model.state_dict(), expected.state_dict())


def test_load_under_another_default_device(other_device, tmp_path):
    """Case 10: load_npz; kind: with modalities dropped, and standardised."""
    path = save_npz(tmp_path / "a.npz", make_data(missing=False))
    with np.load(path) as file:
        np.savez(path, **{key: file[key] for key in file.files if not key.startswith("row_")})
    other_device()
    data = load_npz(path).with_missing(0.2, 0).standardized()
    assert {t.device.type for t in (*data.features.values(), *data.rows.values(), data.labels)} == {"cpu"}


def test_digits_under_another_default_device(other_device):
    """Case 10: the demo data."""
    other_device()
    assert digits().rows["audio"].device.type == "cpu"


@pytest.mark.parametrize("joint", [False, True])
def test_batch_that_lacks_a_modality(joint):
    """Case 12; kind: the joint model too, and a whole split."""
    model, _ = of_views(joint)
    report = evaluate(model, without(make_data(), "image", 2), batch_size=1)
    assert "image" not in report.modalities and report.fusions["entropy"].samples == 10


def test_training_batch_that_lacks_a_modality():
    """Kind of 12: a step of the joint model."""
    model, optimizer = of_views(joint=True)
    assert run(model, optimizer, make_data(), epochs=1)
    assert model.training


def test_frozen_encoder_stays_frozen():
    """Case 13: its running mean moved."""
    model, optimizer = of_views(False, nn.BatchNorm1d(8))
    model.encoders["image"].eval()
    before = model.encoders["image"].layers[1].running_mean.clone()
    moving = model.encoders["audio"].layers[1].running_mean.clone()
    run(model, optimizer, make_data(samples=120), epochs=1)
    assert torch.equal(model.encoders["image"].layers[1].running_mean, before)
    assert not torch.equal(model.encoders["audio"].layers[1].running_mean, moving)


def test_frozen_dropout_stays_frozen():
    """Kind of 13: one layer, not the whole encoder; its mode is the same afterwards."""
    model, optimizer = make()
    layer = model.encoders["text"][3]
    layer.eval()
    modes = []
    layer.register_forward_hook(lambda module, *_: modes.append(module.training))
    run(model, optimizer, make_data(), epochs=1)
    assert modes and not any(modes) and not layer.training


def test_model_in_evaluation_mode_is_trained():
    """Kind of 13: a model that is wholly in evaluation mode trains as before, and is in it afterwards."""
    (model, optimizer), (expected, other) = make(), make()
    model.eval()
    run(model, optimizer, make_data(), epochs=1)
    run(expected, other, make_data(), epochs=1)
    assert same(model.state_dict(), expected.state_dict()) and not model.training


def refused(tmp_path, model, optimizer, **options):
    """Resuming is a ValueError and changes neither model, optimizer nor files."""
    before = [json.dumps(str(optimizer.state_dict())), json.dumps(str(model.state_dict())), metrics(tmp_path)]
    with pytest.raises(ValueError, match="resume: expected"):
        run(model, optimizer, make_data(samples=120), epochs=3, out=tmp_path, resume=True, **options)
    assert before == [json.dumps(str(optimizer.state_dict())), json.dumps(str(model.state_dict())), metrics(tmp_path)]


def test_resume_with_other_buffers(tmp_path):
    """Case 14: parameters of the same names and shapes, but no running statistics."""
    run(*of_views(False, nn.BatchNorm1d(8)), make_data(samples=120), epochs=1, out=tmp_path)
    refused(tmp_path, *of_views(False, nn.LayerNorm(8)))


def test_resume_with_another_scheduler(tmp_path):
    """Kind of 14."""
    model, optimizer = of_views()
    run(model, optimizer, make_data(samples=120), epochs=1, out=tmp_path, scheduler=LambdaLR(optimizer, cosine))
    model, optimizer = of_views()
    refused(tmp_path, model, optimizer, scheduler=StepLR(optimizer, 1))


def test_resume_with_other_groups(tmp_path):
    """Kind of 14."""
    run(*of_views(), make_data(samples=120), epochs=1, out=tmp_path)
    model, _ = of_views()
    groups = [{"params": model.encoders.parameters()}, {"params": model.head.parameters()}]
    refused(tmp_path, model, torch.optim.SGD(groups, lr=0.05))


def test_train_without_test_samples(tmp_path, capsys):
    """Case 15: all epochs were trained first."""
    data = make_data()
    path = save_npz(tmp_path / "a.npz", dataclasses.replace(data, split=data.split.clamp(max=1)))
    assert main(["train", "--data", str(path), "--out", str(tmp_path / "run"), "--epochs", "1"]) == 2
    assert "expected test samples" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_last_batch_of_one_with_batch_norm():
    """Case 15: failed after nearly an epoch."""
    data = make_data(missing=False)
    model, optimizer = of_views(False, nn.BatchNorm1d(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"epochs": 1, "batch_size": 13, "progress": False}  # 40 = 3 · 13 + 1
    from mla_ext.multimodal.fit import fit

    with pytest.raises(ValueError, match="batch_size: expected one that leaves no batch with a single sample"):
        fit(model, optimizer, data, **options)
    assert same(model.state_dict(), before)
    for encoder in model.encoders.values():  # kind: frozen, it can take one
        encoder.eval()
    fit(model, optimizer, data, **options)


def test_evidence_of_a_modality_that_no_test_sample_has(tmp_path, monkeypatch):
    """Case 15: five minutes of training, then macro_f1 of an empty tensor; kind: nor any validation sample."""
    for split in (2, 1):
        path = save_npz(tmp_path / f"{split}.npz", without(make_data(), "image", split))
        result = runs.execute(runs.Run(str(path), "mla", 0.01, 0.0, 0.1, 0, epochs=1))
        assert (result["modalities"]["image"] is None) == (split == 2)
        assert (result["validation_modalities"]["image"] is None) == (split == 1)


def test_evidence_tells_no_sample_from_divergence(tmp_path):
    """Kind of 15: a modality that no test sample has was reported as "diverged"."""
    wanted = [runs.Run("none", "mla", 0.1, 0.0, 0.1, seed) for seed in range(3)]
    results = runs.Results(tmp_path / "runs.jsonl")
    empty = {"modalities": {"a": None}}
    results.found = {run.key: result for run, result in zip(wanted, (empty, {"diverged": "loss"}, empty), strict=True)}
    evidence = experiments.Evidence([], results, tmp_path, seeds=3, epochs=1, workers=1)
    assert report.percent(evidence.values(wanted, "modalities", "a")) == "diverged in 1 of 3, no sample in 2 of 3"


def test_evidence_without_test_samples(tmp_path, monkeypatch):
    """Kind of 15: refused before training."""
    data = make_data()
    path = save_npz(tmp_path / "a.npz", dataclasses.replace(data, split=data.split.clamp(max=1)))
    monkeypatch.setattr(runs, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match="expected test samples"):
        runs.execute(runs.Run(str(path), "mla", 0.01, 0.0, 0.1, 0, epochs=1))


def test_features_of_a_split_that_lacks_a_modality():
    """Kind of 15: unit features are of the modalities that are there."""
    model, _ = of_views()
    assert set(measures.unit_features(model, without(make_data(), "text", 1), "validation")) == {"audio", "image"}


def test_split_that_lacks_a_class():
    """Kind of 15: scored on the classes that are there."""
    data = make_data()
    split = data.split.where((data.labels != 3) | (data.split != 2), torch.tensor(0, dtype=torch.int8))
    model, _ = of_views()
    assert 0 <= evaluate(model, dataclasses.replace(data, split=split)).fusions["mean"].macro_f1 <= 1
