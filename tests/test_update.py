"""project="update" and ProjectedAdamW: what P protects stays, whatever the optimizer does before it adds to W."""

import copy
import functools

import pytest
import torch
from helpers import batch, network, randn, train
from torch import nn

from mla_ext import ProjectedAdamW, ProjectedSGD

pytestmark = pytest.mark.usefixtures("default_device")

SGD_OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
ADAMW_OPTIONS = [
    {},
    {"amsgrad": True, "weight_decay": 0.1},
    {"maximize": True, "betas": (0.5, 0.9), "eps": 1e-3},
    {"foreach": True},
    {"fused": True},
    {"lr": torch.tensor(0.01, device="cpu")},
]


def random_optimizer(seed, weight, alpha, rank):
    """One of the two with options that the seed decides."""
    drawn = torch.rand(4, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist()
    common = {"lr": 0.2 * drawn[0], "weight_decay": drawn[1], "maximize": drawn[2] < 0.5}
    common |= {"alpha": alpha, "alpha_scale": None, "rank": rank}
    if seed % 2:
        return ProjectedAdamW([weight], amsgrad=drawn[3] < 0.5, **common)
    momentum = {"momentum": 0.9, "nesterov": True} if drawn[3] < 0.5 else {"momentum": 0.5, "dampening": drawn[3]}
    return ProjectedSGD([weight], project="update", **common, **momentum)


def movement(optimizer, weight, h, steps=5):
    """How far the steps after h (s,) was absorbed move the answer to it, in units of what they move W and of |h|."""
    for t in range(3):  # momentum that points along h
        weight.grad = randn(*weight.shape, dtype=weight.dtype, seed=t).to(weight) + h
        optimizer.step()
    optimizer.observe(weight, h.unsqueeze(0))
    optimizer.step()
    before = weight.detach().clone()
    for t in range(steps):
        weight.grad = randn(*weight.shape, dtype=weight.dtype, seed=10 + t).to(weight) + h
        optimizer.step()
    change = weight.detach() - before
    return change, (change @ h).norm()


@pytest.mark.parametrize("rank", [None, 4], ids=["dense", "rank"])
@pytest.mark.parametrize("seed", range(8))
def test_an_update_leaves_what_was_absorbed_where_it_was(seed, rank):
    """P h̄ = α / (α + |h̄|²) h̄ after P = I has absorbed h̄, so |ΔW h̄| <= α / (α + |h̄|²) Σγ|X| |h̄|."""
    alpha = 1e-6
    weight = nn.Parameter(randn(3, 6, dtype=torch.float64).to(torch.get_default_device()))
    h = randn(6, dtype=torch.float64, seed=50).to(weight.device)
    optimizer = random_optimizer(seed, weight, alpha, rank)
    change, moved = movement(optimizer, weight, h)
    left = alpha / (alpha + h @ h)
    along = optimizer.projection(weight) @ h
    torch.testing.assert_close(along, left * h, rtol=1e-6, atol=1e-12)
    assert change.norm() > 1e-3
    largest = optimizer.param_groups[0]["lr"] * 5 * 100  # |X| is below 100 here: gradients, decay and momentum of 1
    assert moved <= left * largest * h.norm()
    assert moved < 1e-4 * change.norm() * h.norm()


def test_a_projected_gradient_leaks_through_momentum_and_decay():
    """So that the test above can fail."""
    weight = nn.Parameter(randn(3, 6, dtype=torch.float64).to(torch.get_default_device()))
    h = randn(6, dtype=torch.float64, seed=50).to(weight.device)
    change, moved = movement(ProjectedSGD([weight], alpha=1e-6, alpha_scale=None, **SGD_OPTIONS), weight, h)
    assert moved > 0.1 * change.norm() * h.norm()


@pytest.mark.parametrize("options", ADAMW_OPTIONS)
def test_unattached_parameters_step_as_adamw_to_the_bit(options):
    models, optimizers = [], []
    for cls in (ProjectedAdamW, torch.optim.AdamW):
        model = network()
        optimizer = cls(model[0].parameters(), **({"lr": 0.01} | options))
        train(model, optimizer, 5)
        optimizer.add_param_group({"params": model[2].parameters(), "weight_decay": 0.3})
        train(model, optimizer, 5, first=5)
        models.append(model)
        optimizers.append(optimizer)
    ours, theirs = ([*optimizer.state_dict()["state"].values()] for optimizer in optimizers)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


@pytest.mark.parametrize("options", [*ADAMW_OPTIONS, {"capturable": True}])
def test_a_head_that_was_fed_nothing_steps_as_adamw(options):
    ours, theirs = network(dtype=torch.float64), network(dtype=torch.float64)
    optimizer = ProjectedAdamW([ours[2].weight], **({"lr": 0.01} | options))
    optimizer.attach(ours[2]).remove()
    # A tensor lr is float32, and capturable makes it one.
    tolerance = 1e-6 if "capturable" in options or isinstance(options.get("lr"), torch.Tensor) else 1e-12
    options = {name: value for name, value in options.items() if name != "capturable"}
    plain = torch.optim.AdamW([theirs[2].weight], **({"lr": 0.01} | options))
    for t in range(6):
        for model, each in ((ours, optimizer), (theirs, plain)):
            x, y = batch(t, dtype=torch.float64)
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            each.step()
    torch.testing.assert_close(ours[2].weight, theirs[2].weight, rtol=tolerance, atol=0)
    assert optimizer.state[ours[2].weight]["step"] == 6
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[ours[2].weight][name], plain.state[theirs[2].weight][name])


@pytest.mark.parametrize(
    "make", [ProjectedAdamW, functools.partial(ProjectedSGD, project="update", momentum=0.9)], ids=["adamw", "sgd"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_overflow_leave_no_trace(make, dtype):
    """A scaled gradient steps as the unscaled one, and after an overflow all is as it was."""
    weights, optimizers = [], []
    for _ in range(2):
        weights.append(nn.Parameter(randn(3, 6, dtype=dtype).to(torch.get_default_device())))
        optimizers.append(make([weights[-1]]))
    number = lambda value: torch.tensor(value, dtype=torch.float32)  # noqa: E731
    for t in range(5):
        grad, h = randn(3, 6, dtype=dtype, seed=t).to(weights[0]), randn(4, 6, dtype=dtype, seed=t).to(weights[0])
        for weight, optimizer in zip(weights, optimizers, strict=True):
            optimizer.observe(weight, h)
            weight.grad = grad.clone()
        weights[1].grad *= 8
        optimizers[1].grad_scale, optimizers[1].found_inf = number(8.0), number(0.0)
        for optimizer in optimizers:
            optimizer.step()
        before = copy.deepcopy((weights[1].data, dict(optimizers[1].state[weights[1]])))
        weights[1].grad.fill_(torch.inf)
        optimizers[1].found_inf = number(1.0)
        optimizers[1].observe(weights[1], h)
        optimizers[1].step()
        after = weights[1].data, optimizers[1].state[weights[1]]
        assert torch.equal(before[0], after[0])
        assert all(torch.equal(value, after[1][name]) for name, value in before[1].items())
    assert torch.equal(*weights)


def test_half_precision_weights_keep_moments_in_float32():
    model = network(dtype=torch.bfloat16)
    optimizer = ProjectedAdamW(model.parameters(), lr=0.01, amsgrad=True, heads=[model[2]])
    for t in range(2):
        x, y = batch(t, dtype=torch.bfloat16)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    other = ProjectedAdamW(copy.deepcopy(model).parameters(), lr=0.01, amsgrad=True)
    other.load_state_dict(optimizer.state_dict())
    state, loaded = optimizer.state[model[2].weight], other.state[other.param_groups[0]["params"][2]]
    assert state["exp_avg"].dtype == state["max_exp_avg_sq"].dtype == torch.float32
    assert all(torch.equal(value, loaded[name]) and value.dtype == loaded[name].dtype for name, value in state.items())


@pytest.mark.parametrize("cls", [ProjectedSGD, ProjectedAdamW])
def test_heads_at_construction_are_attached(cls):
    models = [network(), network()]
    at_once = cls(models[0].parameters(), lr=0.1, heads=[models[0][2]])
    later = cls(models[1].parameters(), lr=0.1)
    later.attach(models[1][2])
    for model, optimizer in zip(models, (at_once, later), strict=True):
        train(model, optimizer, 3)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert not torch.equal(at_once.projection(models[0][2].weight), torch.eye(8))
    with pytest.raises(TypeError, match="head: expected"):
        cls(models[0].parameters(), heads=[nn.ReLU()])


@pytest.mark.parametrize("cls", [ProjectedSGD, ProjectedAdamW])
def test_a_module_of_heads_is_each_of_them(cls):
    models = [network(), network()]
    together = cls(models[0].parameters(), lr=0.1)
    handle = together.attach(models[0])
    apart = cls(models[1].parameters(), lr=0.1, heads=[models[1][0], models[1][2]])
    for model, optimizer in zip(models, (together, apart), strict=True):
        train(model, optimizer, 3)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    for layer, size in ((models[0][0], 5), (models[0][2], 8)):
        assert not torch.equal(together.projection(layer.weight), torch.eye(size))
    handle.remove()
    models[0](batch(0)[0])
    assert not together._observed


@pytest.mark.parametrize("heads", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), 3])
def test_heads_are_several(heads):
    with pytest.raises(TypeError, match=r"heads: expected several modules, as in a list, got"):
        ProjectedSGD(nn.Linear(2, 2).parameters(), heads=heads)


def test_a_module_of_heads_is_attached_whole_or_not_at_all():
    model = network()
    optimizer = ProjectedSGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"head.weight: expected a parameter of this optimizer"):
        optimizer.attach(model)
    with pytest.raises(ValueError, match="weight: expected a weight that was attached"):
        optimizer.projection(model[0].weight)


@pytest.mark.parametrize("rank", [None, 3], ids=["dense", "rank"])
def test_plasticity_is_how_much_of_the_gradient_passes(rank):
    model = network()
    optimizer = ProjectedSGD(model.parameters(), lr=0.1, rank=rank, heads=[model[2]])
    weight = model[2].weight
    weight.grad = torch.ones(3, 8)
    assert optimizer.plasticity(weight) == 1
    train(model, optimizer, 3)
    expected = (weight.grad @ optimizer.projection(weight)).norm() / weight.grad.norm()
    torch.testing.assert_close(optimizer.plasticity(weight), expected)
    assert 0 < expected < 0.99
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="weight: expected one with a gradient"):
        optimizer.plasticity(weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"betas: expected a finite number in \[0, 1\)"),
        ({"betas": 0.9}, "betas: expected two numbers"),
        ({"eps": -1.0}, "eps: expected a finite number >= 0"),
        ({"amsgrad": 1}, "amsgrad: expected True or False"),
        ({"weight_decay": -0.1}, "weight_decay: expected"),
        ({"differentiable": True}, "differentiable: expected False"),
    ],
)
def test_adamw_names_a_bad_argument(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ProjectedAdamW([nn.Parameter(torch.ones(2, 2))], **options)


def test_project_is_checked():
    with pytest.raises(ValueError, match="project: expected 'gradient' or 'update', got 'weights'"):
        ProjectedSGD([nn.Parameter(torch.ones(2, 2))], project="weights")
