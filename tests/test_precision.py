"""Device, mixed precision, clipping, another loss and compiled encoders, through `fit`."""

import copy

import pytest
import torch
from conftest import DEVICES
from helpers import needs_gpu
from test_batches import on_disk
from test_training import Interrupted, interrupt_at, make, make_data, run, same
from torch import nn
from torch.optim.lr_scheduler import StepLR
from tqdm import tqdm

from mla_ext.multimodal import checkpoint, precision
from mla_ext.multimodal.batches import Loader
from mla_ext.multimodal.evaluate import evaluate, predict
from mla_ext.multimodal.fit import _Training, fit
from mla_ext.multimodal.precision import Precision, choose_device
from mla_ext.optimizer import ProjectedSGD

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ["mla", "alternating", "concat"]


def losses(history):
    return [value for record in history for value in record["training_loss"].values()]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", DEVICES)
def test_mixed_precision_trains_as_full_precision_but_for_rounding(device, method, amp):
    data = make_data()
    seen = []
    model, optimizer = make(method)
    for encoder in model.encoders.values():
        encoder.register_forward_hook(lambda module, _, out: seen.append(out.dtype))
    history = run(model, optimizer, data, 3, device=device, amp=amp)
    assert set(seen) == {precision.AMP[amp]}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {device}
    whole, other = make(method)
    expected = run(whole, other, data, 3, device=device)
    assert losses(history) != losses(expected)
    assert losses(history) == pytest.approx(losses(expected), rel=0.05)
    if method == "mla":
        P = optimizer.projection(model.head.weight)
        assert (P.dtype, P.device.type) == (torch.float32, device)
        torch.testing.assert_close(P, other.projection(whole.head.weight), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_whose_scaled_gradient_overflows_is_skipped(monkeypatch, device, method):
    """The first scale, 65536, is too large for losses of 1e30: nothing moves until it has come down."""
    model, optimizer = make(method)
    before = copy.deepcopy(model.state_dict())
    run(model, optimizer, make_data(), 1, device=device, amp="fp16", loss=lambda y, t: 1e35 * y.square().mean())
    assert same({n: v.cpu() for n, v in model.state_dict().items()}, before)
    if method == "mla":
        assert torch.equal(optimizer.projection(model.head.weight).cpu(), torch.eye(8))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("device", DEVICES)
def test_an_interrupted_run_in_mixed_precision_resumes_to_the_same_bits(tmp_path, device, amp):
    """With all that has a state: the scale, the schedule, workers that read files; clipping too."""
    data = on_disk(make_data(), tmp_path)

    def start(out, epochs=5, resume=False, stop=None):
        model, optimizer = make()
        if stop is not None:
            interrupt_at(optimizer, stop)
        options = {"amp": amp, "workers": 2, "clip_grad_norm": 0.5, "device": device}
        schedule = StepLR(optimizer, 2, 0.5)
        history = run(model, optimizer, data, epochs, scheduler=schedule, out=out, resume=resume, **options)
        return history, model.state_dict(), optimizer.state_dict()

    whole = start(tmp_path / "whole")
    with pytest.raises(Interrupted):
        start(tmp_path / "parts", stop=21)
    assert checkpoint.load(tmp_path / "parts" / "last.pt")["epoch"] == 2
    assert same(start(tmp_path / "parts", resume=True), whole)
    scaler = checkpoint.load(tmp_path / "parts" / "last.pt")["scaler"]
    assert ("scale" in scaler) == (amp == "fp16")
    with pytest.raises(ValueError, match=rf"resume: expected a run with amp None, got '{amp}'"):
        run(*make(), data, 6, out=tmp_path / "parts", resume=True, clip_grad_norm=0.5)


def test_the_scale_grows_on_across_a_resumption(tmp_path, monkeypatch):
    """What it was and how long ago it grew are part of the run: a scale that began anew would be another."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: real(device, 4.0, growth_interval=7, enabled=enabled)
    )
    data = make_data()
    run(*make(), data, 3, out=tmp_path / "whole", amp="fp16")
    run(*make(), data, 1, out=tmp_path / "parts", amp="fp16")
    run(*make(), data, 3, out=tmp_path / "parts", amp="fp16", resume=True)
    whole, parts = (checkpoint.load(tmp_path / name / "last.pt")["scaler"] for name in ("whole", "parts"))
    assert whole == parts and (whole["scale"], whole["_growth_tracker"]) == (4.0 * 2**3, 27 - 21)


@pytest.mark.parametrize("device", DEVICES)
def test_evaluation_in_mixed_precision(device):
    data, (model, _) = make_data(), make()
    model.to(device)
    indices = data.indices("test")
    exact, rounded = predict(model, data, indices), predict(model, data, indices, amp="bf16")
    assert rounded.unimodal.dtype == torch.float32
    assert not torch.equal(exact.unimodal, rounded.unimodal)
    torch.testing.assert_close(exact.unimodal, rounded.unimodal, rtol=0.05, atol=0.05)
    assert evaluate(model, data, amp="bf16").loss == pytest.approx(evaluate(model, data).loss, rel=0.05)


def test_evaluation_reads_from_the_device_once(monkeypatch):
    data, (model, _) = make_data(), make()
    copies = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or to_host(self))
    evaluate(model, data, batch_size=3)
    assert len(copies) == 1


@needs_gpu
@pytest.mark.parametrize("method", ["mla", "concat"])
def test_an_epoch_on_a_gpu_waits_for_it_once(monkeypatch, method):
    data, (model, optimizer) = make_data(), make(method)
    run(model, optimizer, data, 1, device="cuda")  # what is made at the first step is there
    steps, reads = model.steps(data, 16, "given", torch.Generator().manual_seed(0)), []

    def counted(name):
        original = getattr(torch.Tensor, name)

        def read(tensor):
            if not tensor.is_cuda:
                return original(tensor)
            reads.append(name)
            torch.cuda.set_sync_debug_mode("default")
            try:
                return original(tensor)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        monkeypatch.setattr(torch.Tensor, name, read)

    counted("tolist"), counted("cpu")
    precision = Precision("bf16", torch.device("cuda"))
    with Loader(data, torch.device("cuda")) as loader, tqdm(disable=True) as bar:
        torch.cuda.set_sync_debug_mode("error")
        try:
            _Training(model, optimizer, loader, precision, 1.0).epoch(steps, 1, 0, bar)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert reads == ["cpu"]


# --- clipping, loss, compile


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp", [None, "fp16"])
def test_gradients_are_clipped_before_the_projection(device, amp):
    model, optimizer = make()
    norms = []

    def note(*_):
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item())

    optimizer.register_step_pre_hook(note)
    run(model, optimizer, make_data(), 1, clip_grad_norm=0.25, device=device, amp=amp)
    assert max(norms) == pytest.approx(0.25, rel=1e-3)
    free, plain = make()
    norms.clear()
    plain.register_step_pre_hook(lambda *_: None)
    assert run(free, plain, make_data(), 1) != run(*make(), make_data(), 1, clip_grad_norm=0.25)


@pytest.mark.parametrize("method", METHODS)
def test_another_loss(method):
    data = make_data()
    smooth = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]), label_smoothing=0.1)
    (model, optimizer), (expected, other) = make(method), make(method)
    before = set(model.state_dict())
    history = run(model, optimizer, data, 2, loss=smooth)
    expected.criterion = smooth
    assert same(history, run(expected, other, data, 2)) and same(model.state_dict(), expected.state_dict())
    assert set(model.state_dict()) == before  # the weights of the loss are not the model's
    assert model.criterion is nn.functional.cross_entropy
    assert not same(history, run(*make(method), data, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its own files
def test_compiled_encoders_train_the_same_but_for_rounding():
    data, (model, optimizer), (eager, other) = make_data(missing=False), make(), make()
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda module: calls.append(module))
        run(model, optimizer, data, 1, compile=True)
    assert calls == [*model.encoders.values()]
    (model, optimizer) = make()
    for module in (*model.modules(), *eager.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled, it draws other numbers
    names = set(model.state_dict())
    history = run(model, optimizer, data, 2, compile=True)
    assert losses(history) == pytest.approx(losses(run(eager, other, data, 2)), rel=1e-3)
    assert set(model.state_dict()) == names


# --- the device


@pytest.mark.parametrize("device", DEVICES)
def test_model_and_optimizer_move_and_stay(device):
    """Also an optimizer that has stepped elsewhere."""
    data, (model, optimizer) = make_data(), make()
    run(model, optimizer, data, 1)
    run(model, optimizer, data, 1, device=device)
    devices = {p.device.type for p in model.parameters()} | {
        value.device.type
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.ndim > 0
    }
    assert devices == {device}
    assert evaluate(model, data).accuracy > 0


def test_auto_takes_what_works(monkeypatch):
    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert str(choose_device("auto")) == expected
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def fails(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nfor this GPU")

    monkeypatch.setattr(torch, "ones", fails)
    with pytest.warns(UserWarning, match=r"^the GPU does not work, training on the CPU: CUDA error: no kernel"):
        assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: expected one that works here, got 'cuda:1': CUDA error: no kernel"):
        choose_device("cuda:1")


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_refused(name):
    model, optimizer = make()
    with pytest.raises(ValueError, match=f"device: expected one that works here, got '{name}'"):
        run(model, optimizer, make_data(), device=name)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"amp": "fp8"}, ValueError, "amp: expected None, 'bf16' or 'fp16', got 'fp8'"),
        ({"clip_grad_norm": 0.0}, ValueError, "clip_grad_norm: expected a number above 0, got 0.0"),
        ({"clip_grad_norm": float("nan")}, ValueError, "clip_grad_norm: expected a number above 0, got nan"),
        ({"clip_grad_norm": "1"}, TypeError, "clip_grad_norm: expected a number, got '1'"),
        ({"loss": 3}, TypeError, "loss: expected a function of logits and labels, got int"),
    ],
)
def test_bad_arguments_change_nothing(tmp_path, options, error, text):
    model, optimizer = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        fit(model, optimizer, make_data(), epochs=1, out=tmp_path / "run", progress=False, **options)
    assert same(before, model.state_dict()) and not (tmp_path / "run").exists()
    if "amp" in options:
        with pytest.raises(error, match=text):
            evaluate(model, make_data(), amp=options["amp"])


def test_full_precision_scales_and_casts_nothing():
    plain = Precision(None, torch.device("cpu"))
    assert plain.scaler.state_dict() == {}
    with plain.autocast():
        assert not torch.is_autocast_enabled("cpu")
    assert isinstance(make()[1], ProjectedSGD)
