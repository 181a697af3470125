"""What docs/scale.md says of memory and collectives, counted in steps of two gloo processes; and a very large head."""

from pathlib import Path

import pytest
import torch
from test_distributed import run
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode

from mla_ext import ProjectedSGD

WORLD = 2
FLOAT = 4  # bytes


def formulas(s, C, R, world):
    """The rows of the tables in docs/scale.md, in bytes on each rank. R: None for a dense P with all updates in it."""
    head = FLOAT * C * s
    return {
        "P": FLOAT * (s * s if R is None else s * R),
        "momentum, DDP": head,
        "momentum, FSDP2": head // world,
        "feature mean": FLOAT * (s + 1),
        "gradient": head,
    }


def shown(size):
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size} B"


def rows_of_the_page():
    """(s, C, R, ranks) as the page has them."""
    return [(512, 101, None, 8), (512, 101, 64, 8), (2048, 1000, 64, 8), (16, 1_000_000, None, 2)]


@pytest.mark.parametrize(("s", "C", "R", "ranks"), rows_of_the_page())
def test_the_numbers_of_the_page(s, C, R, ranks):
    sizes = map(shown, formulas(s, C, R, ranks).values())
    cells = [f"{s}", f"{C:,}", "dense" if R is None else f"{R}", f"{ranks}", *sizes]
    page = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert "| " + " | ".join(cells) + " |" in page


class Collectives(TorchDispatchMode):
    """Notes the name of every collective and the bytes that this rank puts in."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_")
            given = args[0][0] if name == "allreduce" else args[1]
            self.seen.append((name, given.nbytes))
        return function(*args, **(kwargs or {}))


def step(rank, sharded, R, s=8, C=6):
    """One step; returns the bytes of every collective, by name, and those of the head's state."""
    torch.manual_seed(0)
    head = nn.Linear(s, C, bias=False)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(head, mesh=init_device_mesh("cpu", (WORLD,)))
    else:
        model = nn.parallel.DistributedDataParallel(head)

        model.register_comm_hook(None, allreduce_hook)  # what DDP does by itself, in Python
    optimizer = ProjectedSGD(head.parameters(), lr=0.1, momentum=0.9, rank=R)
    optimizer.attach(head)
    with Collectives() as sent:
        model(torch.randn(3 + rank, s)).square().sum().backward()
        optimizer.step()
    state = optimizer.state[head.weight]
    local = {k: v.to_local() if hasattr(v, "to_local") else v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return sent.seen, {name: tensor.nbytes for name, tensor in local.items()}


def step_with_ddp(rank, world):
    return step(rank, False, None)


def step_with_fsdp(rank, world):
    return step(rank, True, 4)


@pytest.mark.parametrize(("worker", "R"), [(step_with_ddp, None), (step_with_fsdp, 4)])
def test_the_formulas_are_what_a_step_does(worker, R, tmp_path):
    expected = formulas(8, 6, R, WORLD)
    is_ddp = worker is step_with_ddp
    for sent, state in run(worker, WORLD, tmp_path):
        gradient = ("allreduce" if is_ddp else "reduce_scatter_base", expected["gradient"])
        gathered = [] if is_ddp else [("allgather_base", expected["gradient"] // WORLD)]
        assert sent == [*gathered, gradient, ("allreduce", expected["feature mean"])]
        assert state["momentum_buffer"] == expected["momentum, DDP" if is_ddp else "momentum, FSDP2"]
        assert state["base" if R is None else "rows"] == expected["P"]


S, MILLION, STEPS = 16, 1_000_000, 2


def train(head, model, rank, world):
    optimizer = ProjectedSGD(head.parameters(), lr=0.1, momentum=0.9, alpha=0.01)
    optimizer.attach(head)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, y = torch.randn(4, S, generator=generator), torch.randint(MILLION, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rank::world]), y[rank::world]).backward()
        optimizer.step()
    return optimizer.projection(head.weight)


def make_large_head():
    torch.manual_seed(0)
    return nn.Linear(S, MILLION, bias=False)


def a_million_classes(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    head = make_large_head()
    fully_shard(head, mesh=init_device_mesh("cpu", (world,)))
    P = train(head, head, rank, world)
    return head.weight.to_local().detach(), P


def test_a_head_of_a_million_classes_sharded(tmp_path):
    (first, P), (second, other_P) = run(a_million_classes, WORLD, tmp_path)
    head = make_large_head()
    before = head.weight.detach().clone()
    true_P = train(head, head, 0, 1)
    assert torch.equal(P, other_P)
    torch.testing.assert_close(P, true_P, rtol=1e-4, atol=1e-6)
    assert len(first) == len(second) == MILLION // WORLD
    moved, truly = torch.cat([first, second]) - before, head.weight.detach() - before
    assert truly.abs().max() > 1e-3
    torch.testing.assert_close(moved, truly, rtol=1e-3, atol=1e-6)
