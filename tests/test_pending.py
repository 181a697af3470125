"""Updates of P that are deferred: whoever looks at P in the optimizer sees them all."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mla_ext import ProjectedSGD, _library, pending

pytestmark = pytest.mark.skipif(_library.load_error is not None, reason="the ops are not compiled")

STEPS = 2 * pending.ROWS + 3


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(s=12, C=4, **options):
    torch.manual_seed(0)
    head = nn.Linear(s, C)
    optimizer = ProjectedSGD(head.parameters(), **({"lr": 0.02, "momentum": 0.9} | options))
    optimizer.attach(head)
    return head, optimizer


def train(head, optimizer, steps, seed=0, N=8):
    for t in range(steps):
        optimizer.zero_grad()
        head(randn(N, head.in_features, dtype=head.weight.dtype, seed=seed + t)).square().mean().backward()
        optimizer.step()


def expected_after(steps, **options):
    """The same by the reference backend in float64."""
    head, optimizer = make(backend="reference", **options)
    head.double()
    train(head, optimizer, steps)
    return head.weight.detach(), optimizer.projection(head.weight)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.detach().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, pending.ROWS - 1, pending.ROWS, pending.ROWS + 1, STEPS])
def test_the_projection_shows_what_waits(steps):
    head, optimizer = make()
    train(head, optimizer, steps)
    weight, P = expected_after(steps)
    assert_close(optimizer.projection(head.weight), P)
    assert_close(head.weight, weight)


def test_a_state_dict_is_whole_at_any_time():
    head, optimizer = make()
    train(head, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    assert_close(saved["state"][0]["projection"], expected_after(5)[1])
    assert set(saved["state"][0]) == {"projection", "momentum_buffer", "step"}
    other, again = make()
    train(other, again, 3, seed=50)  # its own waiting updates must not survive
    again.load_state_dict(saved)
    other.load_state_dict(head.state_dict())
    train(head, optimizer, 20, seed=5)
    train(other, again, 20, seed=5)
    assert torch.equal(head.weight, other.weight)  # to the bit: saving made the updates here, too
    assert torch.equal(optimizer.projection(head.weight), again.projection(other.weight))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_have_what_waits(clone):
    head, optimizer = make()
    train(head, optimizer, 5)
    copied = clone(optimizer)
    (weight,) = [p for p in copied.param_groups[0]["params"] if p.ndim == 2]
    assert_close(copied.projection(weight), expected_after(5)[1])


def test_options_that_need_p_at_once_find_it():
    head, optimizer = make()
    train(head, optimizer, 5)
    optimizer.param_groups[0]["forget"] = 0.1
    train(head, optimizer, 3, seed=5)
    optimizer.param_groups[0]["forget"] = 0.0
    train(head, optimizer, 3, seed=8)
    twin, truth = make(backend="reference")
    twin.double()
    train(twin, truth, 5)
    truth.param_groups[0]["forget"] = 0.1
    train(twin, truth, 3, seed=5)
    truth.param_groups[0]["forget"] = 0.0
    train(twin, truth, 3, seed=8)
    assert_close(optimizer.projection(head.weight), truth.projection(twin.weight))
    assert_close(head.weight, twin.weight.detach())


def test_reset_and_conversion_in_mid_cycle():
    head, optimizer = make()
    train(head, optimizer, 5)
    optimizer.reset_projection()
    assert torch.equal(optimizer.projection(head.weight), torch.eye(12))
    train(head, optimizer, 5)
    head.double()
    train(head, optimizer, 2, seed=5)
    twin, truth = make(backend="reference")
    twin.double()
    train(twin, truth, 5)
    truth.reset_projection()
    train(twin, truth, 7)
    assert_close(optimizer.projection(head.weight), truth.projection(twin.weight))
