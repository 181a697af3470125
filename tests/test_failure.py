"""What ends a run from outside: one line, the last whole epoch kept, and the run resumes."""

import re

import pytest
import torch
from helpers import needs_gpu
from test_training import interrupt_at, make, make_data, metrics, run, same

from mla_ext.multimodal import checkpoint, cli, commands
from mla_ext.multimodal.failure import explained

pytestmark = pytest.mark.usefixtures("one_thread")

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711\nmore"
FAULTS = {
    "GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has"),
        torch.OutOfMemoryError,
        "epoch 2: the GPU is out of memory: a smaller batch_size needs less, and so does amp",
    ),
    "NumPy": (
        MemoryError("Unable to allocate"),
        MemoryError,
        "epoch 2: out of memory: a smaller batch_size needs less",
    ),
    "CPU": (RuntimeError(ALLOCATOR), MemoryError, "epoch 2: out of memory: a smaller batch_size needs less"),
    "worker": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError,
        "epoch 2: DataLoader worker (pid 7) is killed by signal: Killed: fewer workers need less memory",
    ),
    "rank": (RuntimeError(GLOO), RuntimeError, "epoch 2: another rank stopped: [../third_party/gloo"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_line_and_the_last_epoch_is_kept(tmp_path, name):
    fault, kind, message = FAULTS[name]
    data = make_data()
    model, optimizer = make()
    interrupt_at(optimizer, 14, fault)  # in the second epoch
    with pytest.raises(kind, match=f"^{re.escape(message)}") as error:
        run(model, optimizer, data, 3, out=tmp_path)
    assert "\n" not in str(error.value) and error.value.__cause__ is fault
    assert (checkpoint.load(tmp_path / "last.pt")["epoch"], len(metrics(tmp_path))) == (1, 1)
    assert same(run(*make(), data, 3, out=tmp_path, resume=True), run(*make(), data, 3))


def test_memory_that_runs_out_on_this_machine():
    with pytest.raises(MemoryError, match=r"^here: out of memory"), explained("here"):
        torch.empty(2**50, dtype=torch.uint8)


@needs_gpu
def test_memory_that_runs_out_on_the_gpu():
    with pytest.raises(torch.OutOfMemoryError, match=r"^here: the GPU is out of memory"), explained("here"):
        torch.empty(2**45, dtype=torch.uint8, device="cuda")


class OtherError(RuntimeError):
    pass


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes"), OtherError("gloo"), ValueError("x"), KeyboardInterrupt()]
)
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as found, explained("here"):
        raise error
    assert found.value is error


def test_the_command_line_says_it_in_one_line(capsys, monkeypatch):
    def fails(*_, **__):
        with explained("epoch 3"):
            raise MemoryError

    monkeypatch.setattr(commands, "fit", fails)
    assert cli.main(["train", "--data", "digits", "--epochs", "1", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "mla-ext: error: epoch 3: out of memory: a smaller batch_size needs less, and so does amp\n"
    )
