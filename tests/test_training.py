import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from mla_ext import reference
from mla_ext.multimodal import checkpoint
from mla_ext.multimodal import fit as training
from mla_ext.multimodal.batches import Loader
from mla_ext.multimodal.data import MultimodalData
from mla_ext.multimodal.evaluate import evaluate, predict
from mla_ext.multimodal.files import load_npz
from mla_ext.multimodal.fit import NonFiniteLossError, fit
from mla_ext.multimodal.metrics import macro_f1, score
from mla_ext.multimodal.model import ConcatModel, Logits, MultimodalModel, SharedHeadModel, Step
from mla_ext.multimodal.precision import Precision
from mla_ext.multimodal.recipe import Settings, build
from mla_ext.optimizer import ProjectedSGD

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"audio": (4, 3), "image": (6,), "text": (5,)}


def make_data(samples=60, classes=4, missing=True):
    """A learnable problem: 2/3 training, 1/6 validation, 1/6 test; some samples lack a modality."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (samples,), generator=generator)
    features, rows = {}, {}
    for k, (m, shape) in enumerate(SHAPES.items()):
        centres = torch.randn(classes, *shape, generator=generator)
        features[m] = centres[labels] + 0.7 * torch.randn(samples, *shape, generator=generator)
        rows[m] = torch.arange(samples)
        if missing:
            rows[m][k::7] = -1
    split = torch.tensor([0, 0, 0, 0, 1, 2], dtype=torch.int8).repeat(samples // 6)
    return MultimodalData(tuple(SHAPES), features, rows, labels, tuple("abcd"[:classes]), split)


def make_encoder(shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 8), nn.ReLU(), nn.Dropout(0.2))


def make(method="mla", lr=0.05):
    torch.manual_seed(7)
    encoders = {m: make_encoder(shape) for m, shape in SHAPES.items()}
    joint = method == "concat"
    model = (ConcatModel if joint else SharedHeadModel)(encoders, nn.Linear(24 if joint else 8, 4))
    plain = {"lr": lr, "momentum": 0.9, "weight_decay": 1e-2}
    if method != "mla":
        return model, torch.optim.SGD(model.parameters(), **plain)
    optimizer = ProjectedSGD(model.parameters(), **plain)
    optimizer.attach(model.head)
    return model, optimizer


def run(model, optimizer, data, epochs=4, **options):
    return fit(model, optimizer, data, epochs=epochs, batch_size=16, progress=False, **options)


def same(a, b):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


class Interrupted(Exception):
    pass


def interrupt_at(optimizer, step, error=None):
    """Raise the error, or Interrupted, in place of the optimizer's step number `step`."""
    count = 0

    def interrupt(*_):
        nonlocal count
        count += 1
        if count == step:
            raise error or Interrupted

    optimizer.register_step_pre_hook(interrupt)


# --- steps ---


@pytest.mark.parametrize("method", ["mla", "alternating"])
def test_steps_alternate_and_idle_encoders_do_not_move(method):
    data, (model, optimizer) = make_data(), make(method)
    original, seen = optimizer.step, []

    def watched():
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        original()
        moved = {name.rsplit(".", 2)[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        seen.append({name.split(".")[1] if "." in name else name for name in moved})

    optimizer.step = watched
    run(model, optimizer, data, epochs=2)
    turns = [{m, "head"} for m in SHAPES] * 3  # 34 or so samples each, in batches of 16
    assert [{part if part in SHAPES else "head" for part in parts} for parts in seen] == turns * 2


def test_idle_batchnorm_statistics_do_not_move():
    data, (model, optimizer) = make_data(missing=False), make("alternating")
    norm = nn.BatchNorm1d(8)
    model.encoders["audio"].append(norm)
    statistics, original = [], optimizer.step

    def watched():
        statistics.append(norm.num_batches_tracked.item())
        original()

    optimizer.step = watched
    run(model, optimizer, data, epochs=1)
    assert statistics == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_order_and_missing_reach_the_model(monkeypatch):
    data, (model, optimizer) = make_data(), make()
    steps = []
    original = model.loss
    monkeypatch.setattr(model, "loss", lambda data, step: steps.append(step) or original(data, step))
    run(model, optimizer, data, epochs=2, order="reversed")
    assert [s.modalities[0] for s in steps[:4]] == ["text", "image", "audio", "text"]
    for m in SHAPES:
        epochs = [torch.cat([s.indices for s in half if s.modalities == (m,)]) for half in (steps[:9], steps[9:])]
        assert epochs[0].tolist() != epochs[1].tolist()  # shuffled anew
        assert all(torch.equal(e.sort().values, data.indices("train", m)) for e in epochs)


def test_training_learns_and_reports():
    data, (model, optimizer) = make_data(240), make()
    history = run(model, optimizer, data, epochs=8)
    assert [record["epoch"] for record in history] == list(range(1, 9))
    losses = [sum(record["training_loss"].values()) for record in history]
    assert losses[-1] < 0.6 * losses[0]
    assert set(history[0]["training_loss"]) == set(SHAPES)
    assert history[0]["lr"] == [0.05]
    assert evaluate(model, data).accuracy > 0.85


def test_training_loss_is_the_mean_over_samples():
    data, (model, optimizer) = make_data(), make("alternating", lr=0.0)
    model.eval()  # fit trains in training mode all the same; without dropout the loss is known
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    (record,) = run(model, optimizer, data, epochs=1)
    assert not model.training
    for m in SHAPES:
        expected = model.loss(data, Step((m,), data.indices("train", m))).item()
        assert record["training_loss"][m] == pytest.approx(expected, rel=1e-5)


def test_joint_training_reports_one_loss():
    data, (model, optimizer) = make_data(), make("concat")
    history = run(model, optimizer, data, epochs=2)
    assert set(history[0]["training_loss"]) == {"audio+image+text"}
    assert history[0]["validation"]["fused"] == "joint"


# --- choosing the epoch ---


class Scripted(MultimodalModel):
    """Its only weight counts the steps taken; after step t it classifies the first script[t] samples rightly."""

    def __init__(self, script, logit=5.0):
        super().__init__({"audio": nn.Identity()})
        self.taken = nn.Parameter(torch.zeros(()))
        self.script, self.logit = script, logit

    def steps(self, data, batch_size, order, generator):
        return [Step(("audio",), data.indices("train"))]

    def loss(self, data, step):
        assert (data.split[step.indices] == 0).all()
        return -self.taken

    def logits(self, data, indices):
        assert (data.split[indices] != 2).all(), "the test split was read"
        right = torch.arange(len(indices)) < self.script[round(self.taken.item())]
        labels = torch.where(right, data.labels[indices], (data.labels[indices] + 1) % 4)
        logit = self.logit if isinstance(self.logit, float) else self.logit[round(self.taken.item())]
        logits = nn.functional.one_hot(labels, 4) * logit
        return Logits(logits.unsqueeze(0), torch.ones(1, len(indices), dtype=torch.bool))


def test_validation_chooses_the_epoch_and_the_model_ends_with_its_weights(tmp_path):
    data = make_data(missing=False)
    model = Scripted([0, 3, 8, 5, 8, 2])
    history = run(model, torch.optim.SGD(model.parameters(), lr=1.0), data, epochs=5, out=tmp_path)
    assert [r["validation"]["fusions"]["entropy"]["accuracy"] for r in history] == [0.3, 0.8, 0.5, 0.8, 0.2]
    assert [r["best"] for r in history] == [True, True, False, False, False]  # the earlier of equals
    assert model.taken.item() == 2
    saved = checkpoint.load(tmp_path / "last.pt")
    assert (saved["model"]["taken"], saved["best"]["model"]["taken"], saved["best"]["epoch"]) == (5, 2, 2)


def test_equal_accuracy_is_decided_by_the_loss():
    data = make_data(missing=False)
    model = Scripted([0, 8, 8, 8], logit=[0.0, 9.0, 1.0, 5.0])
    run(model, torch.optim.SGD(model.parameters(), lr=1.0), data, epochs=3)
    assert model.taken.item() == 2


# --- checkpoints ---


@pytest.mark.parametrize("method", ["mla", "alternating", "concat"])
@pytest.mark.parametrize("step", [2, 14])  # in the first epoch, where there is no checkpoint; in a later one
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, method, step):
    data = make_data()

    def scheduled():
        model, optimizer = make(method)
        return model, optimizer, StepLR(optimizer, 2, 0.5)

    model, optimizer, scheduler = scheduled()
    history = run(model, optimizer, data, 6, order="random", scheduler=scheduler, out=tmp_path / "whole")
    whole = checkpoint.load(tmp_path / "whole" / "last.pt")

    interrupted, broken, schedule = scheduled()
    interrupt_at(broken, step)
    with pytest.raises(Interrupted):
        run(interrupted, broken, data, 6, order="random", scheduler=schedule, out=tmp_path / "parts")
    torch.rand(5)  # the state of the global generator does not matter
    again, fresh, schedule = scheduled()
    resumed = run(again, fresh, data, 6, order="random", scheduler=schedule, out=tmp_path / "parts", resume=True)
    parts = checkpoint.load(tmp_path / "parts" / "last.pt")

    assert whole["epoch"] == 6
    assert same(whole, parts)
    assert same(history, resumed)
    assert same(model.state_dict(), again.state_dict())
    assert same(optimizer.state_dict(), fresh.state_dict())
    assert metrics(tmp_path / "parts") == history
    assert history[-1]["lr"] == [0.0125]


def test_a_shorter_run_can_be_made_longer(tmp_path):
    data, (model, optimizer) = make_data(), make()
    history = run(model, optimizer, data, 5, out=tmp_path / "whole")
    run(*make(), data, 2, out=tmp_path / "parts")
    assert same(run(*make(), data, 5, out=tmp_path / "parts", resume=True), history)
    assert same(checkpoint.load(tmp_path / "whole" / "last.pt"), checkpoint.load(tmp_path / "parts" / "last.pt"))


def test_resuming_a_finished_run_trains_nothing(tmp_path):
    data, (model, optimizer) = make_data(), make()
    history = run(model, optimizer, data, 3, out=tmp_path)
    again, fresh = make()
    fresh.step = None
    assert run(again, fresh, data, 3, out=tmp_path, resume=True) == history
    assert same(again.state_dict(), model.state_dict())


def test_resuming_without_a_checkpoint_starts_anew(tmp_path):
    data = make_data()
    model, optimizer = make()
    run(model, optimizer, data, 2)
    again, fresh = make()
    run(again, fresh, data, 2, out=tmp_path / "new" / "run", resume=True)
    assert same(again.state_dict(), model.state_dict())


def test_a_new_run_does_not_leave_the_old_one_to_resume(tmp_path):
    data = make_data()
    run(*make(), data, 3, out=tmp_path)
    model, optimizer = make(lr=0.01)
    interrupt_at(optimizer, 1)
    with pytest.raises(Interrupted):
        run(model, optimizer, data, 3, out=tmp_path)
    assert not (tmp_path / "last.pt").exists()
    assert metrics(tmp_path) == []


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    data, (model, optimizer) = make_data(), make()
    whole = run(*make(), data, 4)
    saves, save = 0, torch.save

    def failing(content, file):
        nonlocal saves
        saves += 1
        if saves == 3:
            file.write(b"half a checkpoint")
            raise OSError("No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="No space left"):
        run(model, optimizer, data, 4, out=tmp_path)
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "metrics.jsonl"]
    monkeypatch.undo()
    assert same(run(*make(), data, 4, out=tmp_path, resume=True), whole)


def test_metrics_are_whole_after_a_kill_between_checkpoint_and_metrics(tmp_path, monkeypatch):
    data = make_data()
    write, writes = checkpoint.write_text, 0

    def killed(path, text):
        nonlocal writes
        writes += 1
        if writes == 3:  # made at the start, after epoch 1, after epoch 2
            raise Interrupted
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_text", killed)
    with pytest.raises(Interrupted):
        run(*make(), data, 4, out=tmp_path)
    monkeypatch.undo()
    assert [len(metrics(tmp_path)), checkpoint.load(tmp_path / "last.pt")["epoch"]] == [1, 2]
    history = run(*make(), data, 4, out=tmp_path, resume=True)
    assert metrics(tmp_path) == history
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_changed(tmp_path):
    data = make_data()
    run(*make(), data, 2, out=tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model, optimizer = make()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    cases = {
        "seed": (model, optimizer, data, {"seed": 1}),
        "order": (model, optimizer, data, {"order": "random"}),
        "samples": (model, optimizer, make_data(66), {}),
        "training samples": (model, optimizer, make_data(missing=False), {}),
        "scheduler": (model, optimizer, data, {"scheduler": StepLR(optimizer, 1)}),
        "optimizer": (*make("alternating"), data, {}),
        "model": (*make("concat"), data, {}),
    }
    for name, (m, o, d, options) in cases.items():
        with pytest.raises(ValueError, match=f"resume: expected a run with {name} .*last.pt"):
            run(m, o, d, 3, out=tmp_path, resume=True, **options)
    with pytest.raises(ValueError, match="batch_size 8, got 16"):
        fit(model, optimizer, data, epochs=3, batch_size=8, out=tmp_path, resume=True, progress=False)
    assert same(weights, model.state_dict())
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_damaged_checkpoint_is_named(tmp_path):
    data = make_data()
    run(*make(), data, 1, out=tmp_path)
    path = tmp_path / "last.pt"
    for damaged in (path.read_bytes()[:500], b"", b"no checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.pt: expected a checkpoint of a training run, got"):
            run(*make(), data, 2, out=tmp_path, resume=True)


def test_a_checkpoint_that_cannot_be_opened_is_an_error_of_the_system(tmp_path):
    (tmp_path / "last.pt").mkdir()
    with pytest.raises(OSError, match=r"last\.pt"):
        run(*make(), make_data(), 2, out=tmp_path, resume=True)


def test_a_checkpoint_without_its_optimizer_is_none(tmp_path):
    run(*make(), make_data(), 1, out=tmp_path)
    path = tmp_path / "last.pt"
    content = checkpoint.load(path)
    del content["optimizer"]
    checkpoint.save(path, content)
    with pytest.raises(ValueError, match=r"last\.pt: expected a checkpoint of a training run, got another file"):
        run(*make(), make_data(), 2, out=tmp_path, resume=True)


def with_format(path, number):
    """The checkpoint with another format number; without one for None."""
    content = {**checkpoint.load(path), "format": number}
    if number is None:
        del content["format"]
    checkpoint.save(path, content)


@pytest.mark.parametrize("number", [None, 1])
def test_a_checkpoint_of_format_1_goes_on(tmp_path, number):
    run(*make(), make_data(), 1, out=tmp_path)
    assert checkpoint.load(tmp_path / "last.pt")["format"] == 2
    with_format(tmp_path / "last.pt", number)
    run(*make(), make_data(), 2, out=tmp_path, resume=True)
    content = checkpoint.load(tmp_path / "last.pt")
    assert (content["format"], content["epoch"]) == (2, 2)


@pytest.mark.parametrize("number", [3, 0, "2b"])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, number):
    run(*make(), make_data(), 1, out=tmp_path)
    with_format(tmp_path / "last.pt", number)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=rf"last\.pt: expected a checkpoint of format 1 to 2, got format {number!r}"):
        run(*make(), make_data(), 2, out=tmp_path, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_checkpoint_whose_tensor_became_a_folder_is_damaged(tmp_path):
    """One changed bit in the list of contents: torch.load then gives a tensor of whatever its memory held."""
    run(*make(), make_data(), 1, out=tmp_path)
    path = tmp_path / "last.pt"
    damaged = bytearray(path.read_bytes())
    entry = damaged.rindex(b"PK\x01\x02")  # of the last tensor
    damaged[entry + 38] ^= 0x10
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="in it is damaged"):
        checkpoint.load(path)


def test_other_files_are_no_checkpoints(tmp_path):
    torch.save({"model": {}}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="expected a checkpoint of a training run, got another file"):
        run(*make(), make_data(), 2, out=tmp_path, resume=True)


def test_fit_leaves_the_modes_of_submodules():
    data, (model, optimizer) = make_data(), make()
    model.encoders["audio"].eval()
    modes = [module.training for module in model.modules()]
    run(model, optimizer, data, 1)
    assert [module.training for module in model.modules()] == modes


def test_fit_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    model, optimizer = make()
    torch.manual_seed(5)
    run(model, optimizer, make_data(), 1)
    assert torch.equal(torch.rand(3), expected)


# --- bad input ---


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    data, (model, optimizer) = make_data(), make()
    original, calls = model.loss, 0

    def loss(data, step):
        nonlocal calls
        calls += 1
        return original(data, step) * (math.nan if calls == 9 + 5 else 1.0)

    monkeypatch.setattr(model, "loss", loss)
    with pytest.raises(NonFiniteLossError, match="training loss of image is nan at epoch 2, step 5 of 9"):
        run(model, optimizer, data, 3, out=tmp_path)
    assert issubclass(NonFiniteLossError, RuntimeError)
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1


def test_weights_that_overflow_in_the_last_step_are_not_kept(tmp_path):
    data, (model, optimizer) = make_data(), make("concat")
    count = 0

    def spoil(*_):
        nonlocal count
        count += 1
        if count == 2 * 3:  # the last step of epoch 2
            model.head.bias.data.fill_(math.nan)

    optimizer.register_step_post_hook(spoil)
    with pytest.raises(NonFiniteLossError, match="validation loss is nan after epoch 2"):
        run(model, optimizer, data, 3, out=tmp_path)
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"epochs": 0}, ValueError, "epochs: expected at least 1, got 0"),
        ({"epochs": 2.0}, TypeError, "epochs: expected an integer, got 2.0"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        ({"batch_size": True}, TypeError, "batch_size: expected an integer"),
        ({"order": "weak"}, ValueError, "order: expected one of .*'weak'"),
        ({"seed": -1}, ValueError, "seed: expected 0 <= seed"),
        ({"seed": "a"}, TypeError, "seed: expected an integer"),
        ({"resume": True}, ValueError, "resume: expected `out` too"),
        ({"optimizer": None}, TypeError, "optimizer: expected"),
        ({"model": nn.Linear(2, 2)}, TypeError, "model: expected a MultimodalModel"),
        ({"data": {}}, TypeError, "data: expected MultimodalData"),
        ({"scheduler": 3}, TypeError, "scheduler: expected an LRScheduler"),
    ],
)
def test_bad_arguments(tmp_path, options, error, text):
    model, optimizer = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = {"model": model, "optimizer": optimizer, "data": make_data(), "epochs": 1, "out": tmp_path / "run"}
    if options.get("resume"):
        del arguments["out"]
    with pytest.raises(error, match=text):
        fit(**(arguments | options))
    assert same(before, model.state_dict())
    assert not (tmp_path / "run").exists()


def test_a_scheduler_that_needs_a_metric_is_refused():
    model, optimizer = make()
    with pytest.raises(TypeError, match="needs no metric, got ReduceLROnPlateau"):
        run(model, optimizer, make_data(), scheduler=ReduceLROnPlateau(optimizer))


def test_splits_without_samples_are_refused():
    data, (model, optimizer) = make_data(), make()
    object.__setattr__(data, "split", torch.where(data.split == 1, 0, data.split))
    with pytest.raises(ValueError, match="expected validation samples"):
        run(model, optimizer, data)
    with pytest.raises(ValueError, match="split: expected one with samples, got 'validation'"):
        evaluate(model, data, "validation")
    with pytest.raises(ValueError, match="split: expected one of"):
        evaluate(model, data, "valid")
    data = make_data()
    data.rows["image"][data.split == 0] = -1
    with pytest.raises(ValueError, match="training sample that has modality 'image'"):
        run(model, optimizer, data)


# --- evaluation ---


def test_dropout_is_drawn_from_the_seed():
    """Not from the global generator: two runs that find it in different states agree."""
    states = []
    for noise in range(2):
        model, optimizer = make()
        torch.rand(noise + 1)
        run(model, optimizer, make_data(), epochs=2)
        states.append(model.state_dict())
    assert same(*states)


def test_reset_projection_starts_every_epoch_at_the_identity(monkeypatch):
    model, optimizer = make()
    seen = []
    epoch = training._Training.epoch

    def spy(*arguments):
        seen.append(torch.equal(optimizer.projection(model.head.weight), torch.eye(8)))
        return epoch(*arguments)

    monkeypatch.setattr(training._Training, "epoch", spy)
    run(model, optimizer, make_data(), epochs=2)
    run(model, optimizer, make_data(), epochs=2, reset_projection=True)
    assert seen == [True, False, True, True]
    model, optimizer = make("alternating")
    with pytest.raises(
        TypeError, match="reset_projection: expected a ProjectedSGD or ProjectedAdamW as optimizer, got SGD"
    ):
        run(model, optimizer, make_data(), reset_projection=True)


def test_evaluate_by_hand():
    data, (model, _) = make_data(), make("alternating")
    model.train()
    model.encoders["audio"].eval()
    report = evaluate(model, data, "test", batch_size=3)
    assert model.training and model.head.training and not model.encoders["audio"].training

    model.eval()
    indices = data.indices("test")
    labels = data.labels[indices]
    present = torch.stack([data.present(m)[indices] for m in SHAPES])
    logits = torch.zeros(3, len(indices), 4)
    with torch.no_grad():
        for i, m in enumerate(SHAPES):
            logits[i, present[i]] = model(m, data.inputs(m, indices[present[i]]))
    for i, m in enumerate(SHAPES):
        right = logits[i].argmax(-1)[present[i]] == labels[present[i]]
        assert report.modalities[m].accuracy == pytest.approx(right.float().mean().item())
        assert report.modalities[m].samples == len(right) < len(indices)
    fused, _ = reference.entropy_fusion(logits, present)
    mean = torch.stack([logits[present[:, n], n].mean(0) for n in range(len(indices))])
    for name, expected in {"mean": mean, "entropy": fused}.items():
        assert report.fusions[name] == score(expected, labels)
    assert report.accuracy == report.fusions["entropy"].accuracy
    assert report.loss == pytest.approx(nn.functional.cross_entropy(fused, labels).item(), rel=1e-5)
    assert report == evaluate(model, data)  # whatever the batch size


def test_samples_with_one_modality_are_predicted_by_it_alone():
    data, (model, _) = make_data(missing=False), make()
    data.rows["audio"][5] = data.rows["text"][5] = -1
    prediction = predict(model, data, torch.tensor([4, 5]))
    assert prediction.weights[:, 1].tolist() == [0.0, 1.0, 0.0]
    assert prediction.weights[:, 0].sum() == pytest.approx(1.0)
    alone = model.eval()("image", data.inputs("image", torch.tensor([5])))[0]
    for fusion in ("mean", "entropy"):
        torch.testing.assert_close(prediction.fusions[fusion][1], alone, rtol=1e-6, atol=0)
    assert not prediction.fusions["entropy"].requires_grad


def test_mfeat_with_missing_rows_trains_and_single_modalities_decide_alone(real_data):
    data = load_npz(real_data / "mfeat.npz").with_missing(0.3, seed=0).standardized()
    settings = Settings(epochs=1)
    model, optimizer = build(data, settings)
    fit(model, optimizer, data, epochs=1, progress=False)
    assert evaluate(model, data).accuracy > 0.3
    test = data.indices("test")
    present = torch.stack([data.present(m)[test] for m in data.modalities])
    alone = present.sum(0) == 1
    assert alone.any()
    prediction = predict(model, data, test)
    assert torch.equal(prediction.weights[:, alone], present[:, alone].float())
    only = (prediction.unimodal * present.unsqueeze(-1)).sum(0)
    assert torch.equal(prediction.fusions["entropy"][alone], only[alone])


def test_a_modality_that_no_sample_of_the_split_has_is_left_out():
    data, (model, _) = make_data(missing=False), make()
    data.rows["audio"][data.split == 2] = -1
    report = evaluate(model, data)
    assert set(report.modalities) == {"image", "text"}
    assert report.fusions["entropy"].samples == 10


def test_samples_without_any_of_the_models_modalities_are_left_out():
    data, (model, _) = make_data(missing=False), make()
    subset = SharedHeadModel({"audio": model.encoders["audio"]}, model.head)
    data.rows["audio"][data.indices("test")[:4]] = -1
    report = evaluate(subset, data)
    assert report.fusions["entropy"].samples == report.modalities["audio"].samples == 6


def test_scores_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 5, 40):
        for samples in (1, 3, 50):
            labels = torch.randint(classes, (samples,), generator=generator)
            logits = torch.randn(samples, classes, generator=generator)
            predicted = logits.argmax(-1)
            found = score(logits, labels)
            assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, predicted))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns about classes without predictions
                expected = metrics.f1_score(labels, predicted, average="macro", zero_division=0)
            assert found.macro_f1 == pytest.approx(expected)
            assert found.samples == samples


def test_macro_f1_by_hand():
    # class 0: TP 1, FP 1, FN 1 -> 1/2; class 1: TP 1, FP 1 -> 2/3; class 2: FN 1 -> 0; class 3 does not occur
    assert macro_f1(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 0])) == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert macro_f1(torch.tensor([4, 4]), torch.tensor([4, 4])) == 1.0


def test_progress_is_on_standard_error_and_can_be_switched_off(capsys):
    data = make_data()
    fit(*make(), data, epochs=1, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "epoch 1/1" in shown.err
    fit(*make(), data, epochs=1, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("method", ["mla", "alternating", "concat"])
def test_an_epoch_is_read_at_once(monkeypatch, method):
    """Losses, validation and plasticity in one copy to the host, and before it nothing that waits."""
    data, (model, optimizer) = make_data(), make(method)
    run(model, optimizer, data, 1)  # what is made at the first step is there
    steps = model.steps(data, 16, "given", torch.Generator().manual_seed(0))
    validation = [Step(model.modalities, data.indices("validation"))]
    loader, precision = Loader(data, torch.device("cpu")), Precision(None, torch.device("cpu"))
    batches = iter([[*loader.read(each)] for each in (steps, validation)])
    monkeypatch.setattr(loader, "read", lambda *_, **__: next(batches))  # a DataLoader reads a seed when it starts
    reads, cpu = [], torch.Tensor.cpu

    def read(tensor):
        reads.append(len(tensor))
        return cpu(tensor)

    def only_afterwards(name):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self: original(self) if reads else pytest.fail(name))

    monkeypatch.setattr(torch.Tensor, "cpu", read)
    for name in ("item", "tolist", "__float__"):
        only_afterwards(name)
    with training.tqdm(disable=True) as bar:
        trained = training._Training(model, optimizer, loader, precision, None)
        losses, report, plasticity = trained.epoch(steps, 1, 0, bar)
    monkeypatch.undo()
    rows = len(model.modalities) + len(report.fusions)
    numbers = len(report.fusions) + (method != "concat") + 2 * (method == "mla")  # losses, the fusion, two shares of P
    assert reads == [len(steps) + rows * len(data.indices("validation")) + numbers]
    assert losses.keys() == {"+".join(step.modalities) for step in steps}
    assert report == evaluate(model, data, "validation")
    P = optimizer.projection(model.head.weight) if method == "mla" else None
    if P is None:
        assert plasticity == {}
    else:
        passed = optimizer.plasticity(model.head.weight).item()
        assert plasticity == {
            "plasticity": pytest.approx(float(P.trace()) / len(P)),
            "gradient_passed": pytest.approx(passed),
        }
