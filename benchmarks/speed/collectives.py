"""What a slow network costs a training step: with SGD, with ours, and with the feature mean's all-reduce begun early.

    python -m benchmarks.speed.collectives     # writes benchmarks/results/collectives.md and .csv

Gloo processes on this machine under DistributedDataParallel. Every all-reduce ends no sooner than a delay after its
start. Forward and backward pass of the encoder are sleeps, so busy cores disturb little.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from mla_ext import ProjectedSGD, gather, observation
from mla_ext.multimodal import checkpoint

from .. import RESULTS
from ..machine import machine

S, C, ROWS = 64, 10, 16
FORWARD, BACKWARD = 0.005, 0.015  # seconds of the encoder
WARMUP, STEPS = 3, 20
DELAYS = (0.0, 0.01, 0.03)
WORLDS = (2, 4)
WAYS = ("SGD", "ours: in step()", "prototype: begun in the hook")


class Encoder(torch.autograd.Function):
    """The identity, and the time that an encoder takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(FORWARD)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        time.sleep(BACKWARD)
        return grad


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.head = nn.Linear(S, S), nn.Linear(S, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Encoder.apply(self.before(x)))


class Slow:
    """An all-reduce that has begun, and ends no sooner than `delay` after that."""

    def __init__(self, tensor: Tensor, delay: float) -> None:
        self.end = time.perf_counter() + delay
        self.work = dist.distributed_c10d._get_default_group().allreduce([tensor])

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.end - time.perf_counter()))


def slow_all_reduce(delay: float) -> Any:
    return lambda tensor, group=None: Slow(tensor, delay).wait()


def slow_gradients(delay: float, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's reduction of one bucket; all gradients here are in one, which is full when the backward pass ends."""
    Slow(bucket.buffer().div_(dist.get_world_size()), delay).wait()
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def begin_in_the_hook(head: nn.Linear, delay: float) -> None:
    """One forward pass for each step, on every rank: the prototype is wrong, or hangs, where that does not hold."""
    begun: list[tuple[Tensor, Slow]] = []

    def begin(module: nn.Module, inputs: tuple[Tensor]) -> None:
        features = inputs[0].detach()
        sums = torch.cat([features.sum(dim=0), features.new_tensor([len(features)])])
        begun.append((sums, Slow(sums, delay)))

    def join(*_: Any) -> list[Tensor]:
        sums, reduction = begun.pop()
        reduction.wait()
        return [sums[:-1] / sums[-1]]

    head.register_forward_pre_hook(begin)
    gather.average_over_ranks = join


def measure(rank: int, world: int, way: str, delay: float, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = Network()
    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(delay, slow_gradients)
    if way == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = ProjectedSGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.attach(model.head)
        if way == "ours: in step()":
            observation.dist.all_reduce = slow_all_reduce(delay)
        else:
            begin_in_the_hook(model.head, delay)
    x, y = torch.randn(ROWS, S) + rank, torch.arange(ROWS) % C
    seconds = []
    for _ in range(WARMUP + STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy(parallel(x), y).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        torch.save((seconds[WARMUP:], model.head.weight.detach()), Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(world: int, way: str, delay: float) -> tuple[float, Tensor]:
    """The median time of a step in ms, and the head's weight after all of them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (world, way, delay, folder), nprocs=world)
        seconds, weight = torch.load(Path(folder) / "result.pt")
    return 1e3 * statistics.median(seconds), weight


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    lines = ["| processes | delay, ms | " + " | ".join(WAYS) + " |", "|" + "---|" * (2 + len(WAYS))]
    rows = ["processes,delay_ms," + ",".join(f'"{way}"' for way in WAYS)]
    for world, delay in itertools.product(WORLDS, DELAYS):
        times, weights = zip(*(run(world, way, delay) for way in WAYS), strict=True)
        torch.testing.assert_close(weights[1], weights[2])  # the prototype trains the same head
        numbers = [str(world), f"{1e3 * delay:g}", *(f"{ms:.1f}" for ms in times)]
        lines.append("| " + " | ".join(numbers) + " |")
        rows.append(",".join(numbers))
        print(lines[-1], flush=True)
    about = [
        "# What a slow network costs a step",
        "",
        f"{machine('cpu')} (`python -m benchmarks.speed.collectives`)",
        "",
        f"Milliseconds of a whole step under DistributedDataParallel over gloo, median of {STEPS}; s = {S}, C = {C}. "
        f"The encoder sleeps {1e3 * FORWARD:g} ms forward and {1e3 * BACKWARD:g} ms backward. Every all-reduce ends no "
        "sooner than the delay after its start. The gradients are one bucket, full when the backward pass ends.",
        "",
    ]
    checkpoint.write_text(RESULTS / "collectives.md", "\n".join([*about, *lines]) + "\n")
    checkpoint.write_text(RESULTS / "collectives.csv", "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
