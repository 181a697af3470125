"""What people do to an optimizer and its model, with a head attached."""

import copy
import gc
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import batch, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.checkpoint import checkpoint

from mla_ext import ProjectedAdamW, ProjectedSGD

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
pytestmark = pytest.mark.usefixtures("default_device")


class Network(nn.Module):
    def __init__(self, recompute=None):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.recompute = recompute  # use_reentrant of activation checkpointing, None for none

    def forward(self, x):
        features = self.encoder(x).relu()
        if self.recompute is None:
            return self.head(features)
        return checkpoint(self.head, features, use_reentrant=self.recompute)


KINDS = {
    "sgd": (ProjectedSGD, {"lr": 0.1, "momentum": 0.9}),
    "update": (ProjectedSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "project": "update"}),
    "adamw": (ProjectedAdamW, {"lr": 0.01, "amsgrad": True}),
}
each = pytest.mark.parametrize("kind", KINDS)


def make(model=None, /, kind="sgd", **options):
    model, (cls, defaults) = model or Network(), KINDS[kind]
    optimizer = cls(model.parameters(), **({"alpha": 0.01} | defaults | options))
    optimizer.attach(model.head)
    return model, optimizer


def assert_same(ours, theirs, exact=True):
    (model, optimizer), (other, its) = ours, theirs
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    torch.testing.assert_close(optimizer.projection(model.head.weight), its.projection(other.head.weight), **tolerance)


@each
def test_pickle(kind):
    ours = make(kind=kind)
    train(*ours, 3)
    theirs = pickle.loads(pickle.dumps(ours))
    train(*ours, 3, first=3)
    train(*theirs, 3, first=3)
    assert_same(ours, theirs)


@each
@pytest.mark.filterwarnings("ignore")  # what torch says of its own checkpoint reader
def test_distributed_checkpoint(tmp_path, kind):
    ours = make(kind=kind)
    train(*ours, 3)
    state = dict(zip(("model", "optimizer"), get_state_dict(*ours), strict=True))
    dcp.save(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    train(*ours, 3, first=3)

    theirs = make(kind=kind)
    train(*theirs, 1)  # the state exists, with other values
    state = dict(zip(("model", "optimizer"), get_state_dict(*theirs), strict=True))
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    set_state_dict(*theirs, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(*theirs, 3, first=3)
    assert_same(ours, theirs)


@each
@pytest.mark.parametrize("start", DEVICES)
@pytest.mark.parametrize("end", DEVICES)
def test_a_checkpoint_moves_between_devices(start, end, kind):
    ours = make(Network().to(start), kind=kind)
    train(*ours, 3)
    theirs = make(Network().to(end), kind=kind)
    theirs[0].load_state_dict(ours[0].state_dict())
    theirs[1].load_state_dict(ours[1].state_dict())
    state = theirs[1].state[theirs[0].head.weight]
    assert {value.device.type for value in state.values()} == {end}
    theirs = copy.deepcopy(theirs)  # load_state_dict shares what it need not convert, in torch as well
    train(*ours, 1, first=3)
    train(*theirs, 1, first=3)
    theirs[0].to(start)
    for a, b in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)


@each
def test_loading_brings_all_state_to_the_parameter(kind):
    """Shown with the meta device, so that it needs no GPU."""
    ours = make(kind=kind)
    train(*ours, 1)
    theirs = make(Network().to("meta"), kind=kind)
    theirs[1].load_state_dict(ours[1].state_dict())
    assert {value.device.type for value in theirs[1].state[theirs[0].head.weight].values()} == {"meta"}


def test_two_optimizers_share_nothing_after_loading():
    ours, theirs = make(dampening=0.5), make(dampening=0.5)
    theirs[1].load_state_dict(ours[1].state_dict())
    train(*ours, 2)
    train(*theirs, 2)
    assert_same(ours, theirs)


def test_a_model_converted_in_mid_run():
    model, optimizer = make()
    train(model, optimizer, 2)
    model.double()
    for param in model.parameters():  # torch.optim.SGD's buffers do not follow their parameters either
        if "base" not in optimizer.state[param]:
            optimizer.state[param]["momentum_buffer"] = optimizer.state[param]["momentum_buffer"].double()
    P = optimizer.projection(model.head.weight)
    x, y = batch(2)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x.double()), y).backward()
    optimizer.step()
    after = optimizer.projection(model.head.weight)
    assert after.dtype == torch.float64 and not torch.equal(after, P.double())


def test_memory_stays_flat():
    """No step keeps a graph, a mean or a gradient of the one before."""
    model, optimizer = make()

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    train(model, optimizer, 10)
    before = tensors()
    x, y = batch(0)
    for _ in range(10_000):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert tensors() <= before + 2
    assert all(not value.requires_grad for value in optimizer.state[model.head.weight].values())


@each
def test_attaching_twice_changes_nothing(kind):
    once, twice = make(kind=kind), make(kind=kind)
    twice[1].attach(twice[0].head)
    train(*once, 3)
    train(*twice, 3)
    assert_same(once, twice, exact=False)


def test_a_tied_weight_learns_from_all_its_heads():
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    second.weight = first.weight
    optimizer = ProjectedSGD([*first.parameters(), second.bias], lr=0.1)
    optimizer.attach(first)
    optimizer.attach(second)
    x, z = torch.rand(2, 4), torch.rand(6, 4)
    (first(x).sum() + second(z).sum()).backward()
    optimizer.step()
    joined = ProjectedSGD([weight := nn.Parameter(torch.zeros(3, 4))], lr=0.1)
    joined.observe(weight, torch.cat([x, z]))
    weight.grad = torch.zeros(3, 4)
    joined.step()
    torch.testing.assert_close(optimizer.projection(first.weight), joined.projection(weight))


def test_a_parametrised_head_is_refused_with_a_reason():
    head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    optimizer = ProjectedSGD(head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"head.weight: expected a parameter of this optimizer, got .* parametrised"):
        optimizer.attach(head)


@each
def test_a_frozen_head_is_left_alone(kind):
    model, optimizer = make(kind=kind)
    model.head.requires_grad_(False)
    before = copy.deepcopy(model.head.state_dict())
    train(model, optimizer, 3)
    assert all(torch.equal(before[name], value) for name, value in model.head.state_dict().items())
    assert torch.equal(optimizer.projection(model.head.weight), torch.eye(8))


@each
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant, kind):
    plain, recomputed = make(kind=kind), make(Network(recompute=use_reentrant), kind=kind)
    train(*plain, 3)
    train(*recomputed, 3)
    assert_same(plain, recomputed, exact=False)


@each
@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself is not ours
def test_a_head_inside_a_compiled_model(kind):
    plain, compiled = make(kind=kind), make(kind=kind)
    train(*plain, 3)
    train(*compiled, 3, forward=torch.compile(compiled[0], backend="eager"))
    assert_same(plain, compiled, exact=False)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_features_and_float32_weights(dtype, kind):
    model, optimizer = make(kind=kind)
    for t in range(3):
        x, y = batch(t)
        optimizer.zero_grad()
        with torch.autocast(torch.get_default_device().type, dtype):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
    plain = make(kind=kind)
    train(*plain, 3)
    P, expected = (o.projection(m.head.weight) for m, o in ((model, optimizer), plain))
    assert P.dtype == torch.float32
    torch.testing.assert_close(P, expected, rtol=0.05, atol=0.05)


def test_momentum_that_a_scheduler_cycles():
    """With P at the identity (nothing recorded) an attached head follows torch.optim.SGD through OneCycleLR."""
    ours, theirs = Network(), Network()
    optimizer = ProjectedSGD(ours.parameters(), lr=0.1, momentum=0.9)
    optimizer.attach(ours.head).remove()
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for model, each in ((ours, optimizer), (theirs, sgd)):
        schedule = torch.optim.lr_scheduler.OneCycleLR(each, 0.2, total_steps=12)
        for t in range(11):
            train(model, each, 1, first=t)
            schedule.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_sparse_gradients_under_grad_scaler_are_those_of_sgd():
    tables = []
    for cls in (ProjectedSGD, torch.optim.SGD):
        torch.manual_seed(0)
        tables.append(nn.Embedding(5, 3, sparse=True))
        optimizer, scaler = (
            cls(tables[-1].parameters(), lr=0.1),
            torch.amp.GradScaler(torch.get_default_device().type, init_scale=8.0),
        )
        for scale in (1.0, torch.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(scale * tables[-1](torch.tensor([1, 3])).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(tables[0].weight, tables[1].weight)
    assert tables[0].weight.isfinite().all()
