"""attach(head, bias=True): the bias rides with the weight, as a feature that is always 1."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mla_ext import ProjectedAdamW, ProjectedSGD

SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
KINDS = {
    "sgd": (ProjectedSGD, SGD),
    "update": (ProjectedSGD, SGD | {"project": "update"}),
    "before": (ProjectedSGD, SGD | {"absorb": "before", "rank": 4}),
    "adamw": (ProjectedAdamW, {"weight_decay": 0.1, "amsgrad": True}),
}


@pytest.fixture(params=KINDS)
def make(request):
    kind, options = KINDS[request.param]
    return lambda params, **more: kind(params, **{"lr": 0.05} | options | more)


def batches(first, last):
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64) + 1
        yield x, torch.randn(8, 3, generator=generator, dtype=torch.float64)


def train(head, optimizer, first, last):
    for x, y in batches(first, last):
        optimizer.zero_grad()
        F.mse_loss(head(x), y).backward()
        optimizer.step()


def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 3, dtype=torch.float64)


def attached(make, head, **options):
    optimizer = make(head.parameters(), **options)
    optimizer.attach(head, bias=True)
    return optimizer


def test_it_steps_as_a_weight_with_a_feature_more(make):
    head = linear()
    other = nn.Parameter(torch.cat([head.weight, head.bias.unsqueeze(1)], 1).detach())
    ours, theirs = attached(make, head), make([other])
    for x, y in batches(0, 9):
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        F.mse_loss(head(x), y).backward()
        ours.step()
        features = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        F.mse_loss(features @ other.T, y).backward()
        theirs.observe(other, features)
        theirs.step()
        assert ours.plasticity(head.weight) == pytest.approx(theirs.plasticity(other).item())
    torch.testing.assert_close(head.weight, other[:, :-1])
    torch.testing.assert_close(head.bias, other[:, -1])
    assert ours.projection(head.weight).shape == (7, 7)
    torch.testing.assert_close(ours.projection(head.weight), theirs.projection(other))


def test_what_was_absorbed_keeps_its_answer_bias_included():
    """Without it the bias moves every answer."""
    moved = []
    for bias in (False, True):
        head = linear()
        optimizer = ProjectedSGD(head.parameters(), lr=0.1, alpha=1e-6)
        handle = optimizer.attach(head, bias)
        x = torch.ones(1, 6, dtype=torch.float64)
        before = head(x).detach()
        (head(x).sum() * 0).backward()
        optimizer.step()  # absorbs x
        handle.remove()
        for _ in range(5):
            optimizer.zero_grad()
            head(2 * x + torch.arange(6)).sum().backward()
            optimizer.step()
        moved.append((head(x).detach() - before).norm().item())
    assert moved[0] > 0.1 and moved[1] < 1e-4


def test_state_dict_deepcopy_and_resumption(make):
    head = linear()
    optimizer = attached(make, head)
    train(head, optimizer, 0, 4)
    copied_head, copied = copy.deepcopy((head, optimizer))
    resumed_head = linear()
    resumed_head.load_state_dict(head.state_dict())
    resumed = attached(make, resumed_head)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(head, optimizer, 4, 8)
    for its, other in ((copied_head, copied), (resumed_head, resumed)):
        train(its, other, 4, 8)
        assert torch.equal(its.weight, head.weight) and torch.equal(its.bias, head.bias)
        assert torch.equal(other.projection(its.weight), optimizer.projection(head.weight))


def test_moments_of_before_go_on(make):
    """The two were plain parameters first. Features that are all zero protect nothing, so nothing else may change."""
    head, other = linear(), linear()
    ours, theirs = make(head.parameters()), make(other.parameters())
    train(head, ours, 0, 3)
    train(other, theirs, 0, 3)
    ours.attach(head, bias=True).remove()
    train(head, ours, 3, 5)
    train(other, theirs, 3, 5)
    torch.testing.assert_close(head.weight, other.weight)
    torch.testing.assert_close(head.bias, other.bias)


def test_an_overflow_changes_nothing(make):
    head = linear().float()
    optimizer = attached(make, head)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, torch.inf, 1.0):
        before = copy.deepcopy([head.weight, head.bias, optimizer.projection(head.weight)])
        optimizer.zero_grad()
        x = torch.ones(2, 6)
        scaler.scale((head(x) * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        now = [head.weight, head.bias, optimizer.projection(head.weight)]
        assert all(map(torch.equal, before, now)) == (factor == torch.inf)


def test_refusals():
    head = linear()
    with pytest.raises(ValueError, match="bias: expected a head with a bias, got a Linear without one"):
        bare = nn.Linear(6, 3, bias=False)
        ProjectedSGD(bare.parameters()).attach(bare, bias=True)
    with pytest.raises(ValueError, match="bias: expected a parameter of this optimizer"):
        ProjectedSGD([head.weight]).attach(head, bias=True)
    optimizer = ProjectedSGD(head.parameters(), heads=[head])
    train(head, optimizer, 0, 1)
    with pytest.raises(ValueError, match="bias: expected a weight that was not attached without this bias"):
        optimizer.attach(head, bias=True)
    with pytest.raises(ValueError, match="state_dict: expected a projection"):
        attached(ProjectedSGD, linear()).load_state_dict(optimizer.state_dict())


def test_a_frozen_bias_stays(make):
    head = linear()
    head.bias.requires_grad_(False)
    weight, bias = head.weight.detach().clone(), head.bias.clone()
    train(head, attached(make, head), 0, 3)
    assert torch.equal(head.bias, bias) and not torch.equal(head.weight, weight)


def test_a_convolution_and_its_bias():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 2)
    optimizer = attached(ProjectedSGD, conv, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        conv(torch.randn(2, 2, 4, 4)).square().sum().backward()
        optimizer.step()
    P = optimizer.projection(conv.weight)
    assert P.shape == (9, 9) and (P - torch.eye(9)).norm() > 0.1
