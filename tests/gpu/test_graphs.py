"""CUDA graphs: only a GPU can show that a captured step does what an eager one does."""

import copy

import pytest
import torch
from helpers import needs_gpu
from torch import nn

from mla_ext import ProjectedSGD

pytestmark = needs_gpu


def make(capturable, rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6)).cuda()
    optimizer = ProjectedSGD(model.parameters(), lr=0.1, momentum=0.9, alpha=0.05, capturable=capturable, rank=rank)
    optimizer.attach(model[2])
    return model, optimizer


@pytest.mark.parametrize("rank", [None, 4], ids=["dense", "several compressions"])
def test_replays_follow_a_scheduler_as_eager_steps_do(rank):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(8, 16, generator=generator).cuda() for _ in range(10)]
    labels = torch.arange(8).cuda() % 6
    static = torch.empty_like(inputs[0])
    model, optimizer = make(capturable=True, rank=rank)

    def train_step(model, optimizer, x):
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            static.copy_(inputs[0])
            train_step(model, optimizer, static)
    torch.cuda.current_stream().wait_stream(stream)
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step(model, optimizer, static)
    allocated = 0
    for t, x in enumerate(inputs):
        static.copy_(x)
        graph.replay()
        schedule.step()
        if t == 0:  # the scheduler keeps tensors of its own from here on
            allocated = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() == allocated

    eager, its_optimizer = make(capturable=False, rank=rank)
    eager.load_state_dict(start[0])
    its_optimizer.load_state_dict(start[1])
    for group in its_optimizer.param_groups:
        group["lr"], group["alpha"], group["capturable"] = 0.1, 0.05, False
        group.pop("initial_lr")
    schedule = torch.optim.lr_scheduler.StepLR(its_optimizer, 2, 0.5)
    for x in inputs:
        train_step(eager, its_optimizer, x)
        schedule.step()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(optimizer.projection(model[2].weight), its_optimizer.projection(eager[2].weight))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capturing_a_step_that_is_not_capturable_is_refused():
    model, optimizer = make(capturable=False, rank=None)
    nn.functional.cross_entropy(model(torch.randn(4, 16).cuda()), torch.arange(4).cuda()).backward()
    with (
        pytest.raises(RuntimeError, match="capturable: expected True in every parameter group"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
