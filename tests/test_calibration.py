"""`calibrate`: temperatures that are right where the truth is known, and never worse than ones."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mla_ext
from mla_ext import reference
from mla_ext.multimodal.calibration import _fitted
from mla_ext.multimodal.data import SPLITS
from mla_ext.multimodal.metrics import reliability
from mla_ext.multimodal.model import FUSIONS, ConcatModel
from mla_ext.multimodal.predict import predict_split
from mla_ext.multimodal.reliability import reliability_of


def drawn(temperature: float, samples: int = 20000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are `temperature` times too large, and labels drawn from their true distribution."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(1, samples, 5, generator=generator, dtype=torch.float64)
    labels = true[0].softmax(-1).multinomial(1, generator=generator).flatten()
    return temperature * true, labels


def model_for(data):
    torch.manual_seed(0)
    encoders = {m: nn.Sequential(nn.Flatten(), nn.Linear(data.example(m).numel(), 8)) for m in data.modalities}
    model = mla_ext.SharedHeadModel(encoders, nn.Linear(8, len(data.classes)))
    with torch.no_grad():
        model.head.weight.mul_(20)  # over-confident
    return model


def loss(model, data, temperatures):
    indices = data.indices("validation")
    made = mla_ext.predict(model, data, indices)
    fused, _ = reference.calibrated_fusion(made.unimodal.double(), made.present, temperatures)
    return F.cross_entropy(fused, data.labels[indices]).item()


@pytest.mark.parametrize("temperature", [0.25, 1.0, 6.0])
def test_the_temperature_the_logits_were_made_with_is_found(temperature):
    logits, labels = drawn(temperature)
    found = _fitted(logits, torch.ones(1, logits.shape[1], dtype=torch.bool), labels)
    torch.testing.assert_close(found, torch.tensor([temperature]), rtol=0.05, atol=0)


def test_a_modality_that_is_missing_everywhere_keeps_one_and_its_logits_are_not_used():
    logits, labels = drawn(3.0, 2000)
    present = torch.tensor([[True], [False]]).expand(2, 2000)
    found = _fitted(torch.cat([logits, torch.full_like(logits, torch.nan)]), present, labels)
    alone = _fitted(logits, present[:1], labels)
    assert found[1] == 1
    torch.testing.assert_close(found[:1], alone, rtol=1e-3, atol=0)


@pytest.mark.parametrize("worst", [torch.nan, torch.inf])
def test_ones_where_no_temperature_is_better(worst):
    logits, labels = drawn(1.0, 50)
    logits[0, 0, labels[0]] = worst
    assert torch.equal(_fitted(logits, torch.ones(1, 50, dtype=torch.bool), labels), torch.ones(1))


def test_a_split_without_errors_has_a_finite_temperature():
    labels = torch.arange(5)
    found = _fitted(torch.eye(5, dtype=torch.float64)[None], torch.ones(1, 5, dtype=torch.bool), labels)
    assert 0.01 <= found.item() < 1


def test_calibrate_lowers_the_loss_and_the_model_keeps_the_result():
    data = mla_ext.digits()
    model = model_for(data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    temperatures = mla_ext.calibrate(model, data)
    assert loss(model, data, temperatures) < loss(model, data, None)
    assert torch.equal(model.temperatures, temperatures)
    assert all(
        torch.equal(before[k], v) for k, v in model.state_dict().items() if k not in ("temperatures", "fusion_index")
    )
    assert torch.equal(temperatures, mla_ext.calibrate(model, data))  # the same again
    made = mla_ext.predict(model, data, torch.arange(9))
    expected, _ = reference.calibrated_fusion(made.unimodal, made.present, temperatures)
    torch.testing.assert_close(made.fusions["calibrated"], expected)
    assert set(mla_ext.evaluate(model, data).fusions) == {"mean", "entropy", "calibrated"}


def test_state_dicts_carry_temperatures_and_older_ones_load_with_ones():
    data = mla_ext.digits()
    model, other = model_for(data), model_for(data)
    model.temperatures.copy_(torch.arange(1.0, 1 + len(data.modalities)))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.temperatures, model.temperatures)
    other.fusion_index.fill_(0)
    old = {n: value for n, value in model.state_dict().items() if n not in ("temperatures", "fusion_index")}
    other.load_state_dict(old)
    assert torch.equal(other.temperatures, torch.ones(len(data.modalities))) and "temperatures" not in old
    assert other.fusion == "entropy" and "fusion_index" not in old


def test_no_validation_split():
    data = mla_ext.digits()
    bare = dataclasses.replace(data, split=torch.where(data.split == SPLITS.index("validation"), 0, data.split))
    with pytest.raises(ValueError, match="data: expected samples in the validation split, got none"):
        mla_ext.calibrate(model_for(data), bare)


def test_calibrate_chooses_the_fusion_that_is_best_on_validation_and_state_dicts_carry_it():
    data = mla_ext.digits()
    model = model_for(data)
    assert (model.fusion, mla_ext.evaluate(model, data, "validation").fused) == ("entropy", "entropy")
    mla_ext.calibrate(model, data)
    report = mla_ext.evaluate(model, data, "validation")
    assert report.fused == model.fusion
    assert report.accuracy == max(score.accuracy for score in report.fusions.values())
    for name in FUSIONS:
        fixed = mla_ext.evaluate(model, data, "validation", fusion=name)
        indices = data.indices("validation")
        logits = mla_ext.predict(model, data, indices).fusions[name]
        assert (fixed.fused, fixed.loss) == (name, F.cross_entropy(logits, data.labels[indices]).item())
        assert fixed.fusions == report.fusions
        classes = predict_split(model, data, "validation", fusion=name).fused_class
        assert torch.equal(classes, logits.argmax(-1))
        model.fusion_index.fill_(FUSIONS.index(name))
        other = model_for(data)
        other.load_state_dict(model.state_dict())
        assert other.fusion == name and mla_ext.evaluate(other, data).fused == name
        assert torch.equal(predict_split(other, data, "validation").fused_class, classes)


def test_equal_accuracies_choose_entropy():
    data = mla_ext.digits()
    model = model_for(data)
    with torch.no_grad():
        model.head.weight.zero_()  # all predictions are the class with the largest bias
    model.fusion_index.fill_(0)
    mla_ext.calibrate(model, data)
    assert model.fusion == "entropy"


@pytest.mark.parametrize("fusion", ["joint", "", None])
def test_an_unknown_fusion(fusion):
    data = mla_ext.digits()
    for call in (mla_ext.evaluate, predict_split):
        with pytest.raises(ValueError, match=r"fusion: expected one of \('auto', 'mean', 'entropy', 'calibrated'\)"):
            call(model_for(data), data, "test", fusion=fusion)


def test_ece_and_bins_against_sums_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (200,), generator=generator)
    found = reliability(logits, labels)
    confidence, predicted = logits.softmax(-1).max(-1)
    ece = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        assert found.samples[b] == inside.sum()
        if inside.any():
            accuracy = (predicted == labels)[inside].double().mean().item()
            mean = confidence[inside].mean().item()
            assert (found.accuracy[b], found.confidence[b]) == (pytest.approx(accuracy), pytest.approx(mean))
            ece += inside.sum().item() / 200 * abs(accuracy - mean)
    assert found.ece == pytest.approx(ece)


def test_ece_of_certain_predictions():
    logits = torch.tensor([[1e4, 0.0]]).expand(4, 2)
    found = reliability(logits, torch.tensor([0, 0, 0, 1]))
    assert found.ece == 0.25 and found.samples == (0,) * 14 + (4,)


def test_reliability_before_and_after_the_temperatures():
    data = mla_ext.digits().with_missing(0.3, 0)
    model = model_for(data)
    mla_ext.calibrate(model, data)
    found = reliability_of(model, data, "validation")
    assert list(found) == [*data.modalities, "fused"]
    for name in data.modalities:
        assert sum(found[name]["after"].samples) == len(data.indices("validation", name))
    assert found["fused"]["after"].ece < found["fused"]["before"].ece
    model.temperatures.fill_(1)
    assert all(c["before"] == c["after"] for name, c in reliability_of(model, data).items() if name != "fused")
    joint = ConcatModel(dict(model.encoders), nn.Linear(8 * len(data.modalities), 10))
    assert [list(curves) for curves in reliability_of(joint, data).values()] == [["before"]] * (
        len(data.modalities) + 1
    )
