import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mla_ext.multimodal.data import MultimodalData
from mla_ext.multimodal.model import ConcatModel, MultimodalModel, SharedHeadModel

WIDTHS = {"audio": 5, "image": 3, "text": 4}


def make_data(rows=None, samples=23, classes=4):
    """Three vector modalities; `rows` overrides which recording each sample has (-1: lacks it)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % classes
    features = {m: torch.randn(samples, w, generator=generator) for m, w in WIDTHS.items()}
    rows = {m: torch.arange(samples) for m in WIDTHS} | (rows or {})
    split = torch.zeros(samples, dtype=torch.int8)
    return MultimodalData(tuple(WIDTHS), features, rows, labels, tuple("abcd"[:classes]), split)


def shared(head_width=6):
    torch.manual_seed(1)
    return SharedHeadModel({m: nn.Linear(w, head_width) for m, w in WIDTHS.items()}, nn.Linear(head_width, 4))


def concat():
    torch.manual_seed(1)
    return ConcatModel({m: nn.Linear(w, w + 1) for m, w in WIDTHS.items()}, nn.Linear(sum(WIDTHS.values()) + 3, 4))


def lacking(modality, indices, samples=23):
    rows = torch.arange(samples)
    rows[indices] = -1
    return {modality: rows}


def steps(model, data, batch_size=5, order="given", seed=0):
    return model.steps(data, batch_size, order, torch.Generator().manual_seed(seed))


def test_forward_is_the_head_of_that_modalitys_encoder():
    model, x = shared(), torch.randn(2, 3)
    expected = model.head(model.encoders["image"](x))
    assert torch.equal(model("image", x), expected)
    assert model.modalities == ("audio", "image", "text") == tuple(model.encoders)
    with pytest.raises(ValueError, match=r"modality: expected one of .*got 'smell'"):
        model("smell", x)


@pytest.mark.parametrize(
    ("encoders", "error", "text"),
    [
        ({}, ValueError, "at least one"),
        ({"a": len}, TypeError, "nn.Modules"),
        ([nn.ReLU()], TypeError, "mapping"),
        ({"a.b": nn.ReLU()}, ValueError, "can name modules"),
    ],
)
def test_bad_encoders(encoders, error, text):
    with pytest.raises(error, match=f"encoders: .*{text}"):
        SharedHeadModel(encoders, nn.Linear(2, 2))


@pytest.mark.parametrize("left_out", ["steps", "loss", "logits"])
def test_an_incomplete_model_is_refused_when_it_is_made(left_out):
    methods = {name: lambda self: None for name in ("steps", "loss", "logits") if name != left_out}
    with pytest.raises(TypeError, match=left_out):
        type("Incomplete", (MultimodalModel,), methods)({"a": nn.Linear(2, 2)})


def test_bad_heads():
    with pytest.raises(TypeError, match=r"head: expected an nn.Module, got int"):
        SharedHeadModel({"a": nn.ReLU()}, 3)
    with pytest.raises(TypeError, match=r"head: expected an nn.Linear, got ReLU"):
        ConcatModel({"a": nn.ReLU()}, nn.ReLU())


def test_the_model_must_fit_the_data():
    data = make_data()
    with pytest.raises(ValueError, match="modalities"):
        SharedHeadModel({"smell": nn.Linear(5, 4)}, nn.Linear(4, 4)).check(data)
    with pytest.raises(ValueError, match="the head's 3 classes, got 4"):
        SharedHeadModel({"audio": nn.Linear(5, 4)}, nn.Linear(4, 3)).check(data)
    shared().check(data)


@pytest.mark.parametrize(
    ("order", "expected"), [("given", ["audio", "image", "text"]), ("reversed", ["text", "image", "audio"])]
)
def test_steps_take_turns(order, expected):
    plan = steps(shared(), make_data(), order=order)
    assert [s.modalities for s in plan] == [(m,) for m in expected] * 5  # 23 samples in batches of 5
    assert [len(s.indices) for s in plan[-3:]] == [3, 3, 3]  # the incomplete batch is kept
    for m in expected:
        used = torch.cat([s.indices for s in plan if s.modalities == (m,)])
        assert used.sort().values.tolist() == list(range(23))
    assert plan[0].indices.tolist() != plan[1].indices.tolist()


def test_random_order_is_drawn_per_epoch_and_shuffling_does_not_depend_on_it():
    plans = [steps(shared(), make_data(), order="random", seed=seed) for seed in range(30)]
    assert len({tuple(s.modalities[0] for s in plan[:3]) for plan in plans}) == 6
    given, drawn = steps(shared(), make_data(), seed=3), steps(shared(), make_data(), order="random", seed=3)
    assert sorted((s.modalities, s.indices.tolist()) for s in given) == sorted(
        (s.modalities, s.indices.tolist()) for s in drawn
    )


def test_missing_samples_are_not_in_the_batches_and_the_others_go_on():
    data = make_data(lacking("audio", list(range(3, 23))))
    plan = steps(shared(), data)
    assert [s.modalities[0] for s in plan] == ["audio", "image", "text"] + ["image", "text"] * 4
    assert sorted(plan[0].indices.tolist()) == [0, 1, 2]


def test_only_the_steps_modality_and_the_head_get_gradients():
    model, data = shared(), make_data()
    step = steps(model, data)[1]
    model.loss(data, step).backward()
    x, y = data.inputs("image", step.indices), data.labels[step.indices]
    assert torch.equal(model.loss(data, step), F.cross_entropy(model("image", x), y))
    assert all(p.grad is None for m in ("audio", "text") for p in model.encoders[m].parameters())
    assert all(p.grad is not None for p in [*model.encoders["image"].parameters(), *model.head.parameters()])


@pytest.mark.parametrize("make", [shared, concat])
def test_logits_leave_out_what_is_missing(make):
    data = make_data(lacking("image", [4, 7]))
    indices = torch.tensor([7, 2, 4, 9])
    model = make()
    logits = model.logits(data, indices)
    assert logits.present.tolist() == [[True] * 4, [False, True, False, True], [True] * 4]
    assert logits.unimodal.shape == (3, 4, 4)
    assert (logits.unimodal[1, [0, 2]] == 0).all()
    one = model.logits(data, indices[1:2])
    torch.testing.assert_close(one.unimodal, logits.unimodal[:, 1:2])


def test_shared_logits_are_those_of_forward():
    model, data, indices = shared(), make_data(), torch.tensor([3, 1])
    logits = model.logits(data, indices)
    assert logits.joint is None
    for i, m in enumerate(model.modalities):
        torch.testing.assert_close(logits.unimodal[i], model(m, data.inputs(m, indices)))


def test_concat_by_hand():
    model, indices = concat(), torch.tensor([3, 1, 8])
    data = make_data(lacking("image", [1]))
    a, t = (model.encoders[m](data.inputs(m, indices)) for m in ("audio", "text"))
    i = model.encoders["image"](data.features["image"][indices])
    i[1] = 0
    W, b = model.head.weight, model.head.bias
    logits = model.logits(data, indices)
    torch.testing.assert_close(logits.joint, torch.cat([a, i, t], dim=1) @ W.T + b)
    torch.testing.assert_close(logits.unimodal[2], t @ W[:, 10:].T + b / 3)
    torch.testing.assert_close(logits.unimodal.sum(dim=0)[[0, 2]], logits.joint[[0, 2]])
    step = steps(model, data)[0]
    assert step.modalities == model.modalities
    expected = F.cross_entropy(model.logits(data, step.indices).joint, data.labels[step.indices])
    torch.testing.assert_close(model.loss(data, step), expected)
    assert sorted(torch.cat([s.indices for s in steps(model, data)]).tolist()) == list(range(23))


def test_concat_trains_on_a_batch_without_one_modality():
    model, data = concat(), make_data(lacking("image", list(range(22))))
    loss = model.loss(data, steps(model, data, batch_size=1)[0])
    loss.backward()
    assert loss.isfinite()


def test_inputs_follow_the_models_dtype():
    data, model = make_data(), shared().double()
    assert model.logits(data, torch.tensor([0])).unimodal.dtype == torch.float64
