"""Two and three gloo processes against one process on the joined batch."""

import json
import os
import socket
import subprocess
import sys

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import network
from torch import nn

from mla_ext import ProjectedAdamW, ProjectedSGD, _library

ROWS = 6
# FSDP2 of PyTorch 2.8 over gloo adds up the ranks' gradients, with any optimizer; that of 2.13 averages them.
AVERAGED = not _library.is_older(torch.__version__, (2, 10))
SPLITS = {2: [slice(0, 4), slice(4, 6)], 3: [slice(0, 5), slice(5, 5), slice(5, 6)]}  # uneven; one rank with nothing


def batch(t):
    return helpers.batch(t, ROWS, classes=2)


def make(model, head, adamw=False):
    options = {"weight_decay": 0.01, "alpha": 0.01}
    if adamw:  # a large eps, as AdamW makes a step of the rounding of a small gradient
        optimizer = ProjectedAdamW(model.parameters(), lr=0.01, eps=0.1, amsgrad=True, **options)
    else:
        optimizer = ProjectedSGD(model.parameters(), lr=0.1, momentum=0.9, **options)
    optimizer.attach(head)
    return optimizer


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y, reduction="sum") / ROWS


def single_process(classes=3, adamw=False):
    model = network(classes=classes)
    optimizer = make(model, model[2], adamw)
    for t in range(4):
        optimizer.zero_grad()
        loss_of(model, *batch(t)).backward()
        optimizer.step()
    return model.state_dict(), optimizer.projection(model[2].weight)


def run(worker, world, tmp_path):
    """Run worker(rank, world, folder); returns what each rank saved."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_start, (worker, world, tmp_path, port), nprocs=world, start_method="fork")
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _start(rank, worker, world, folder, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        torch.save(worker(rank, world), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def assert_ranks_agree(results, classes=3, adamw=False):
    truth = single_process(classes, adamw)
    for state, P in results:
        assert torch.equal(P, results[0][1])
        torch.testing.assert_close(P, truth[1], rtol=1e-4, atol=1e-5)
        for name, value in truth[0].items():
            assert torch.equal(state[name], results[0][0][name]), name
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def ddp(rank, world, micro_batches=False, adamw=False):
    model = network()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = make(parallel, model[2], adamw)
    for t in range(4):
        x, y = (part[SPLITS[world][rank]] for part in batch(t))
        optimizer.zero_grad()
        # DDP averages over the ranks; the sum over them is what one process would compute.
        if micro_batches and len(x) > 1:
            with parallel.no_sync():
                (world * loss_of(parallel, x[:1], y[:1])).backward()
            x, y = x[1:], y[1:]
        (world * loss_of(parallel, x, y)).backward()
        optimizer.step()
    return model.state_dict(), optimizer.projection(model[2].weight)


def ddp_with_micro_batches(rank, world):
    return ddp(rank, world, micro_batches=True)


def ddp_adamw(rank, world):
    return ddp(rank, world, adamw=True)


def test_ddp_of_adamw_is_the_single_process(tmp_path):
    assert_ranks_agree(run(ddp_adamw, 2, tmp_path), adamw=True)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("worker", [ddp, ddp_with_micro_batches])
def test_ddp_is_the_single_process(world, worker, tmp_path):
    assert_ranks_agree(run(worker, world, tmp_path))


def fsdp(rank, world, classes=3, adamw=False):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network(classes=classes)
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = make(model, model[2], adamw)
    for t in range(4):
        x, y = (part[SPLITS[world][rank]] for part in batch(t))
        optimizer.zero_grad()
        ((world if AVERAGED else 1) * loss_of(model, x, y)).backward()
        optimizer.step()
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    return whole, optimizer.projection(model[2].weight)


def fsdp_with_two_classes(rank, world):
    return fsdp(rank, world, classes=2)


def fsdp_adamw(rank, world):
    return fsdp(rank, world, classes=2, adamw=True)


@pytest.mark.parametrize(("worker", "world", "classes"), [(fsdp, 2, 3), (fsdp, 3, 3), (fsdp_with_two_classes, 3, 2)])
def test_a_sharded_head_is_the_single_process(worker, world, classes, tmp_path):
    """With three ranks and two classes the last rank holds no row of the weight."""
    assert_ranks_agree(run(worker, world, tmp_path), classes)


def test_a_sharded_head_of_adamw_is_the_single_process(tmp_path):
    assert_ranks_agree(run(fsdp_adamw, 3, tmp_path), classes=2, adamw=True)


def local(rank, world):
    model = network()
    optimizer = ProjectedSGD(model.parameters(), lr=0.1, process_group="local")
    optimizer.attach(model[2])
    x, y = (part[SPLITS[world][rank]] for part in batch(0))
    loss_of(model, x, y).backward()
    optimizer.step()
    return model.state_dict(), optimizer.projection(model[2].weight)


def test_local_never_communicates(tmp_path):
    (_, P), (_, other_P) = run(local, 2, tmp_path)
    assert not torch.equal(P, other_P)


def no_features(rank, world):
    model = network()
    optimizer = ProjectedSGD(model.parameters(), lr=0.1)
    optimizer.attach(model[2]).remove()
    loss_of(model, *batch(0)).backward()
    optimizer.step()
    return model.state_dict(), optimizer.projection(model[2].weight)


def test_without_features_on_any_rank_nothing_is_absorbed(tmp_path):
    for _, P in run(no_features, 2, tmp_path):
        assert torch.equal(P, torch.eye(8))


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.rare)])
def test_torchrun_trains_as_one_process(world, tmp_path):
    """Same settings, same data: the ranks' run ends where the single process ends, and resumes."""
    command = ["-m", "mla_ext", "train", "--data", "digits", "--epochs", "2", "--batch-size", "100", "--no-progress"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*start, epochs="2"):
        out = tmp_path / str(len(start))
        arguments = [*start, *command, "--out", str(out), "--resume", "--epochs", epochs]
        subprocess.run(arguments, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    alone = run(sys.executable)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    run(*torchrun, epochs="1")
    together = run(*torchrun)
    assert len(together) == len(alone) == 2
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["training_loss"] == pytest.approx(theirs["training_loss"], rel=1e-3)
        for fusion, score in ours["validation"]["fusions"].items():
            assert score["accuracy"] == pytest.approx(theirs["validation"]["fusions"][fusion]["accuracy"], abs=0.02)
