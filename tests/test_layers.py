"""Heads that are convolutions, or modules of several layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mla_ext import ProjectedAdamW, ProjectedSGD, reference
from mla_ext.layers import patch_mean
from mla_ext.reference import Hyperparameters

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 3},
    {"kernel_size": 1, "padding_mode": "replicate", "bias": False},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_the_patches_are_those_that_the_convolution_multiplies(options):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, **options).double()
    images = torch.randn(4, 3, 9, 8, dtype=torch.float64)
    mean, count = patch_mean(layer, images)
    answers = layer(images)
    assert count == answers.numel() // 5
    bias = torch.zeros(5, dtype=torch.float64) if layer.bias is None else layer.bias
    torch.testing.assert_close(layer.weight.flatten(1) @ mean + bias, answers.mean(dim=(0, 2, 3)))


def test_the_mean_of_unfolded_images():
    images = torch.randn(4, 3, 9, 8)
    mean, _ = patch_mean(nn.Conv2d(3, 5, (3, 2), stride=2, padding=1), images)
    unfolded = F.unfold(images.double(), (3, 2), stride=2, padding=1)
    torch.testing.assert_close(mean.double(), unfolded.mean(dim=(0, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("project", ["gradient", "update"])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_convolution_steps_as_the_linear_layer_of_its_patches(memory_format, project, rank):
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 5, 3, padding=1).to(memory_format=memory_format)
    linear = nn.Linear(27, 5)
    linear.load_state_dict({"weight": conv.weight.detach().flatten(1), "bias": conv.bias.detach()})
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "project": project, "rank": rank}
    ours, theirs = (ProjectedSGD(layer.parameters(), heads=[layer], **options) for layer in (conv, linear))
    for _ in range(6):
        images, target = torch.randn(4, 3, 6, 6), torch.randn(4, 5, 6, 6)
        for layer, optimizer in ((conv, ours), (linear, theirs)):
            optimizer.zero_grad()
            rows = F.unfold(images, 3, padding=1).transpose(1, 2)
            answers = layer(images) if layer is conv else layer(rows).transpose(1, 2).reshape(4, 5, 6, 6)
            F.mse_loss(answers, target).backward()
            optimizer.step()
    assert ours.projection(conv.weight).shape == (27, 27)
    torch.testing.assert_close(ours.projection(conv.weight), theirs.projection(linear.weight), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(conv.bias, linear.bias, rtol=1e-4, atol=1e-5)
    assert ours.plasticity(conv.weight) == pytest.approx(theirs.plasticity(linear.weight).item(), rel=1e-3)


def test_a_step_of_a_convolution_by_hand_is_the_reference():
    weight = nn.Parameter(torch.randn(4, 2, 3, 3, dtype=torch.float64))
    patches, grad = torch.randn(10, 18, dtype=torch.float64), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    optimizer = ProjectedSGD([weight], lr=0.1, alpha_scale=None, absorb="before")
    optimizer.observe(weight, patches)
    weight.grad = grad
    hyper = Hyperparameters(lr=0.1, absorb="before")
    eye, start = torch.eye(18, dtype=torch.float64), weight.detach().clone().flatten(1)
    expected, _, P = reference.head_step(start, grad.flatten(1), None, eye, patches.mean(0), torch.zeros(()), hyper)
    optimizer.step()
    torch.testing.assert_close(weight.detach().flatten(1), expected)
    torch.testing.assert_close(optimizer.projection(weight), P)


@pytest.mark.parametrize("make", [ProjectedSGD, ProjectedAdamW])
def test_a_network_is_attached_whole_and_its_state_comes_back(make):
    torch.manual_seed(2)

    def network():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

    def train(model, optimizer, steps):
        for t in range(steps):
            generator = torch.Generator().manual_seed(t)
            optimizer.zero_grad()
            model(torch.randn(8, 1, 6, 6, generator=generator)).square().sum().backward()
            optimizer.step()

    model = network()
    optimizer = make(model.parameters(), lr=0.01)
    optimizer.attach(model)
    train(model, optimizer, 3)
    other = network()
    other.load_state_dict(model.state_dict())
    resumed = make(other.parameters(), lr=0.01)
    resumed.attach(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for layers in ((model, optimizer), (other, resumed)):
        train(*layers, 2)
    for layer, its in ((model[0], other[0]), (model[3], other[3])):
        assert torch.equal(layer.weight, its.weight)
        P = optimizer.projection(layer.weight)
        assert torch.equal(P, resumed.projection(its.weight)) and not torch.equal(P, torch.eye(len(P)))


def test_groups_are_refused_before_anything_is_attached():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=2))
    optimizer = ProjectedSGD(model.parameters())
    for head in (model, model[1]):
        with pytest.raises(ValueError, match=r"head: expected a convolution with groups=1, got groups=2"):
            optimizer.attach(head)
    assert not optimizer._attached


def test_features_by_hand_have_the_size_of_a_patch():
    layer = nn.Conv2d(3, 5, 3)
    with pytest.raises(ValueError, match=r"features: expected .*27"):
        ProjectedSGD(layer.parameters()).observe(layer.weight, torch.ones(2, 3))


def test_a_state_of_another_kernel_size_is_refused():
    layer, other = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 2)
    optimizers = [ProjectedSGD(its.parameters(), heads=[its]) for its in (layer, other)]
    layer(torch.randn(1, 2, 5, 5)).sum().backward()
    optimizers[0].step()
    with pytest.raises(ValueError, match="state_dict: expected a projection"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


def test_a_forward_that_works_without_the_hook_works_with_it():
    layer = nn.Conv2d(2, 3, 3)
    optimizer = ProjectedSGD(layer.parameters(), heads=[layer])
    assert layer(torch.randn(2, 5, 5)).shape == (3, 3, 3)  # an image without a batch
    assert layer(torch.randn(0, 2, 5, 5)).shape == (0, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 2, 5, 5)).sum().backward()
    optimizer.step()
    assert optimizer.projection(layer.weight).isfinite().all()
