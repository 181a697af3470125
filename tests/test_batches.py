"""Training on data that is read as it is needed, here and in workers: the bits of a run on data in memory."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DEVICES
from test_recordings import Items, map_to
from test_training import SHAPES, Interrupted, interrupt_at, make, make_data, metrics, run, same

from mla_ext.multimodal import checkpoint
from mla_ext.multimodal.batches import Loader
from mla_ext.multimodal.evaluate import evaluate, predict
from mla_ext.multimodal.model import Step
from mla_ext.multimodal.recordings import RecordingError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than there are cores
]
CPU = torch.device("cpu")


def on_disk(data, tmp_path):
    return replace(data, features={m: map_to(tmp_path / f"{m}.npy", x.numpy()) for m, x in data.features.items()})


def one_by_one(data, change=lambda i, x: x):
    return replace(data, features={m: Items(x, change) for m, x in data.features.items()})


def trained(data, method="mla", **options):
    model, optimizer = make(method)
    history = run(model, optimizer, data, **options)
    return history, model.state_dict(), optimizer.state_dict(), evaluate(model, data).as_dict()


# --- the same bits


@pytest.mark.parametrize("method", ["mla", "concat"])
def test_a_run_is_the_same_wherever_its_data_lie(tmp_path, method):
    data = make_data()
    expected = trained(data, method, order="random")
    assert same(trained(on_disk(data, tmp_path), method, order="random"), expected)
    assert same(trained(one_by_one(data), method, order="random"), expected)
    assert same(trained(on_disk(data, tmp_path), method, order="random", workers=2), expected)
    assert same(trained(one_by_one(data), method, order="random", workers=3), expected)
    assert same(trained(data, method, order="random", workers=1), expected)


def test_standardized_data_train_the_same(tmp_path):
    data = make_data()
    assert same(trained(on_disk(data, tmp_path).standardized(), workers=2), trained(data.standardized()))


def noisy(i, x):
    return x + torch.rand(()) + np.random.rand()


def test_augmentation_does_not_depend_on_workers():
    data = make_data()
    data = replace(data, training_features={"text": Items(data.features["text"], noisy)})
    expected = trained(data)
    assert same(trained(data, workers=2), expected)
    assert not same(trained(replace(data, training_features={})), expected)


def test_augmentation_is_drawn_anew_each_epoch_and_not_for_evaluation():
    seen = []

    class Seen(Items):
        def __getitem__(self, i):
            seen.append((i, torch.rand(()).item()))
            return super().__getitem__(i)

    data = make_data(missing=False)
    training = Seen(data.features["text"])
    data = replace(data, training_features={"text": training})
    seen.clear()
    trained(data, epochs=2)
    indices = data.indices("train", "text").tolist()
    assert sorted(i for i, _ in seen) == sorted(2 * indices)
    assert len({draw for _, draw in seen}) == 2 * len(indices)


@pytest.mark.parametrize("step", [2, 14])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, step):
    data = on_disk(make_data(), tmp_path)
    augmented = {"audio": Items(make_data().features["audio"], noisy)}
    data = replace(data, training_features=augmented)
    history = run(*make(), data, 4, out=tmp_path / "whole")
    model, optimizer = make()
    interrupt_at(optimizer, step)
    with pytest.raises(Interrupted):
        run(model, optimizer, data, 4, out=tmp_path / "parts", workers=2)
    assert same(run(*make(), data, 4, out=tmp_path / "parts", workers=1, resume=True), history)
    whole, parts = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert same(whole, parts)


# --- what is read


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_reads_its_own_modality_and_each_sample_once(device, workers):
    data, (model, _) = one_by_one(make_data()), make()
    loader = Loader(data, torch.device(device), workers)
    steps = model.steps(data, 16, "given", torch.Generator().manual_seed(0))
    for items in data.features.values():
        items.asked.clear()
    for _ in range(2):  # a loader is used for every epoch
        for step, at_hand in zip(steps, loader.read(steps), strict=True):
            (modality,) = step.modalities
            x = at_hand.inputs(modality, step.indices)
            assert (x.device.type, x.dtype) == (device, torch.float32)
            assert torch.equal(x.cpu(), make_data().inputs(modality, step.indices))
            assert len(at_hand) == len(data) and at_hand.modalities == data.modalities
    if workers == 0:
        for m, items in data.features.items():
            assert sorted(items.asked) == sorted(2 * data.indices("train", m).tolist())


def test_what_is_not_at_hand_is_read():
    data = make_data()
    step = Step(("image",), torch.tensor([3, 4, 5]))
    (at_hand,) = Loader(data, CPU).read([step])
    for modality, indices in (("image", [5, 4]), ("image", [3, 4, 5]), ("text", [3, 4]), ("image", [])):
        indices = torch.tensor(indices, dtype=torch.int64)
        assert torch.equal(at_hand.inputs(modality, indices), data.inputs(modality, indices))
    with pytest.raises(ValueError, match="lack it, the first is sample 0"):
        at_hand.inputs("audio", torch.tensor([0]))


def test_a_step_that_lacks_a_modality_is_read():
    data = make_data()
    (at_hand,) = Loader(data, CPU).read([Step(tuple(SHAPES), torch.tensor([0]))])
    assert not at_hand.present("audio")[0]
    assert torch.equal(at_hand.inputs("text", torch.tensor([0])), data.inputs("text", torch.tensor([0])))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["mla", "concat"])
def test_prediction_with_workers_is_prediction_without(method, device):
    data, (model, _) = make_data(), make(method)
    model.to(device)
    indices = data.indices("test")
    expected, found = predict(model, data, indices, 4), predict(model, one_by_one(data), indices, 4, workers=2)
    assert same(vars(expected), vars(found))
    assert evaluate(model, data, workers=1) == evaluate(model, data)
    assert expected.unimodal.device.type == device


# --- failure


def broken(i, x):
    if i == 18:
        raise OSError("image file is truncated")
    return x


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_ends_the_run_in_one_line(tmp_path, workers):
    data = one_by_one(make_data())
    run(*make(), data, 1, out=tmp_path)
    spoiled = replace(data, training_features={"text": Items(make_data().features["text"], broken)})
    with pytest.raises(RecordingError) as error:
        run(*make(), spoiled, 2, out=tmp_path, resume=True, workers=workers)
    line = "sample 18, modality 'text' (recording 18): cannot be read: OSError: image file is truncated"
    assert str(error.value) == line
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1
    assert same(run(*make(), data, 2, out=tmp_path, resume=True, workers=workers), run(*make(), data, 2))


def killed(i, x):
    if i == 18 and torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def test_a_worker_that_dies_ends_the_run_in_one_line(tmp_path):
    data = one_by_one(make_data())
    run(*make(), data, 1, out=tmp_path)
    deadly = replace(data, training_features={"text": Items(make_data().features["text"], killed)})
    with pytest.raises(RuntimeError, match=r"^epoch 2: DataLoader worker .*: fewer workers need less memory$") as error:
        run(*make(), deadly, 2, out=tmp_path, resume=True, workers=2)
    assert "\n" not in str(error.value)
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1
    assert same(run(*make(), deadly, 2, out=tmp_path, resume=True), run(*make(), data, 2))


@pytest.mark.parametrize("kind", [ConnectionResetError, ConnectionRefusedError, EOFError, FileNotFoundError])
def test_a_worker_whose_connection_breaks_first_ends_it_in_one_line_too(tmp_path, monkeypatch, kind):
    """What torch raises when it reads from a worker that was killed, but not yet seen to be dead."""
    data = one_by_one(make_data())
    run(*make(), data, 1, out=tmp_path)
    broken = kind("[Errno 0] broken\nby a kill")

    def breaks(*_, **__):
        raise broken

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_try_get_data", breaks)
    message = rf"^epoch 2: DataLoader worker lost its connection \({kind.__name__}\): fewer workers need less memory$"
    with pytest.raises(RuntimeError, match=message) as error:
        run(*make(), data, 2, out=tmp_path, resume=True, workers=2)
    assert error.value.__cause__.__cause__ is broken
    assert same(run(*make(), data, 2, out=tmp_path, resume=True), run(*make(), data, 2))


def test_an_interrupt_in_an_epoch_leaves_the_checkpoint_and_no_workers(tmp_path):
    data = one_by_one(make_data())
    model, optimizer = make()
    count = 0

    def interrupt(*_):
        nonlocal count
        count += 1
        if count == 12:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C does

    optimizer.register_step_post_hook(interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(model, optimizer, data, 3, out=tmp_path, workers=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (checkpoint.load(tmp_path / "last.pt")["epoch"], len(metrics(tmp_path))) == (1, 1)
    assert same(run(*make(), data, 3, out=tmp_path, resume=True), run(*make(), data, 3))


@pytest.mark.parametrize(("workers", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_workers_are_checked(workers, error):
    data, (model, optimizer) = make_data(), make()
    for call in (lambda: run(model, optimizer, data, workers=workers), lambda: evaluate(model, data, workers=workers)):
        with pytest.raises(error, match="workers: expected"):
            call()
