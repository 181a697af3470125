"""Reports of other people's optimizers, tried on ours: state and lifetime. Numbered as the reports were.

The rule: whatever a user or a framework does to optimizer.state, to hooks, to loading or to the lifetime of objects,
P is right or the error is clear.
"""

import collections
import contextlib
import copy
import gc
import io
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from attached import assert_same_bits, attached, backward, bits, network, train
from test_distributed import run
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from mla_ext import ProjectedSGD

WIDTHS = [8, 300]  # P dense, and in the form for wide heads


def take_out_one_by_one(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state.pop(param, None)


EMPTIED = {
    "cleared": lambda optimizer: optimizer.state.clear(),  # 1: as avalanche's strategies do (avalanche#725)
    "replaced": lambda optimizer: setattr(optimizer, "state", collections.defaultdict(dict)),  # of the kind of 1
    "taken out": take_out_one_by_one,  # of the kind of 1
}


@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("empty", EMPTIED.values(), ids=EMPTIED)
def test_state_that_is_emptied_starts_anew(empty, features):
    model, optimizer = attached(features=features, momentum=0.9)
    train(model, optimizer, 4)
    empty(optimizer)
    optimizer.state_dict()
    fresh, other = attached(features=features, momentum=0.9)
    fresh.load_state_dict(model.state_dict())
    train(model, optimizer, 3, first=4)
    train(fresh, other, 3, first=4)
    assert_same_bits(bits(model, optimizer), bits(fresh, other))


@pytest.mark.parametrize("features", WIDTHS)
def test_state_that_is_put_back_is_what_it_was(features):
    """Of the kind of 1: a user keeps the state, tries some steps and takes them back."""
    model, optimizer = attached(features=features, momentum=0.9)
    train(model, optimizer, 4)
    weights = copy.deepcopy(model.state_dict())
    state = {param: copy.deepcopy(kept) for param, kept in optimizer.state.items()}
    results = []
    for _ in range(2):
        train(model, optimizer, 3, first=4)
        results.append(bits(model, optimizer))
        model.load_state_dict(weights)
        optimizer.state.update({param: copy.deepcopy(kept) for param, kept in state.items()})
    assert_same_bits(*results)


def test_what_was_observed_outlives_an_emptied_state_by_no_step():
    """Of the kind of 1: the state is cleared between the forward pass and the step."""
    model, optimizer = attached()
    train(model, optimizer, 2)
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.state.clear()
    optimizer.step()
    P = optimizer.projection(model[2].weight)
    assert torch.linalg.matrix_rank(P - torch.eye(8)) <= 1  # at most the batch that was observed


# --- 2: loading


def two_heads(names, momentum):
    """An optimizer with two heads of the same shape, in the order of `names`."""
    torch.manual_seed(0)
    heads = nn.ModuleDict({name: nn.Linear(6, 4) for name in ("first", "second")})
    named = dict(heads.named_parameters())
    order = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    optimizer = ProjectedSGD([(name, named[name]) for name in order], lr=0.1, momentum=momentum)
    for head in heads.values():
        optimizer.attach(head)
    return heads, optimizer


def train_two(heads, optimizer, first):
    for seed in range(first, first + 3):
        optimizer.zero_grad()
        for head, scale in zip(heads.values(), (1.0, 2.0), strict=True):
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
            head(scale * x + 1).square().mean().backward()
        optimizer.step()


def by_name(optimizer, state_dict):
    """A load_state_dict pre-hook that matches the parameters by their names."""
    (saved,), (group,) = state_dict["param_groups"], optimizer.param_groups
    index_of = dict(zip(saved["param_names"], saved["params"], strict=True))
    moved = {
        new: state_dict["state"][index_of[name]]
        for new, name in enumerate(group["param_names"])
        if index_of[name] in state_dict["state"]
    }
    return {"state": moved, "param_groups": [saved | {"param_names": group["param_names"]}]}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_loading_by_name(momentum):
    """2: PyTorch documents pre-hooks for this; here two heads change places."""
    heads, optimizer = two_heads(("first", "second"), momentum)
    train_two(heads, optimizer, 0)
    others, other = two_heads(("second", "first"), momentum)
    other.register_load_state_dict_pre_hook(by_name)
    others.load_state_dict(heads.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((heads, optimizer), (others, other)):
        train_two(*pair, 3)
    for head, its in zip(heads.values(), others.values(), strict=True):
        assert torch.equal(head.weight, its.weight)
        assert torch.equal(optimizer.projection(head.weight), other.projection(its.weight))


def test_hooks_after_loading_see_the_state_as_it_is_kept():
    """Of the kind of 2: under half-precision weights a post-hook sees P in float32, and what it writes stays."""
    model, optimizer = attached(momentum=0.9)
    model.bfloat16()
    train(model, optimizer, 3)
    expected, seen = optimizer.projection(model[2].weight), []

    def post_hook(loaded):
        seen.append(loaded.projection(model[2].weight))
        loaded.reset_projection()

    state = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_post_hook(post_hook)
    optimizer.load_state_dict(state)
    assert_same_bits(seen, [expected])
    assert torch.equal(optimizer.projection(model[2].weight), torch.eye(8))


def test_a_pre_hook_that_spoils_the_state_is_caught_before_anything_is_loaded():
    """Of the kind of 2: what counts is the state that the hooks leave."""
    model, optimizer = attached(momentum=0.9)
    train(model, optimizer, 3)
    state, before = optimizer.state_dict(), bits(model, optimizer)

    def cut(loaded, state_dict):
        head = {name: value[:2, :2] if value.dim() == 2 else value for name, value in state_dict["state"][2].items()}
        return state_dict | {"state": state_dict["state"] | {2: head}}

    handle = optimizer.register_load_state_dict_pre_hook(cut)
    with pytest.raises(ValueError, match="state_dict: expected"):
        optimizer.load_state_dict(state)
    assert_same_bits(before, bits(model, optimizer))
    handle.remove()
    optimizer.load_state_dict(state)
    assert_same_bits(before, bits(model, optimizer))


# --- 3: torch.distributed.checkpoint


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*:UserWarning:torch")
@pytest.mark.parametrize("into", ["itself", "attached before", "attached after"])
@pytest.mark.parametrize("written", [False, True], ids=["in memory", "written"])
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_distributed_checkpoint(momentum, flatten, written, into, tmp_path):
    """3 (pytorch#133415): no step comes before loading."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = attached(momentum=momentum)
    train(model, optimizer, 3)
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    if written:
        dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    train(model, optimizer, 3, first=3)
    expected = bits(model, optimizer)

    if into != "itself":
        model = network()
        optimizer = ProjectedSGD(model.parameters(), lr=0.02, momentum=momentum)
    if into == "attached before":
        optimizer.attach(model[2])
    model.load_state_dict(weights)
    if written:
        state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        saved = state["optimizer"]
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    # torch asks an optimizer without P for what it has, and leaves P behind: then attaching says so.
    lost = into == "attached after" and (flatten or written)
    if into == "attached after":
        with pytest.warns(UserWarning, match="starts from the identity") if lost else contextlib.nullcontext():
            optimizer.attach(model[2])
    train(model, optimizer, 3, first=3)
    if lost:
        assert torch.equal(bits(model, optimizer)[-1], bits(model, optimizer)[-1].T)
    else:
        assert_same_bits(bits(model, optimizer), expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_asking_for_a_distributed_checkpoint_changes_nothing(momentum):
    """Of the kind of 3: torch makes the state by a step with zero gradients and lr 0."""
    asked, not_asked = attached(momentum=momentum), attached(momentum=momentum)
    get_optimizer_state_dict(*asked)
    train(*asked, 3)
    train(*not_asked, 3)
    assert_same_bits(bits(*asked), bits(*not_asked))


def test_a_distributed_checkpoint_of_sgd_is_loaded_with_a_word():
    """Of the kind of 3: every momentum arrives, and the missing P is said."""
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    train(model, sgd, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, sgd))
    ours, optimizer = attached(momentum=0.9)
    ours.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="starts from the identity"):
        set_optimizer_state_dict(ours, optimizer, saved)
    train(model, sgd, 1, first=3)
    train(ours, optimizer, 1, first=3)  # P = I: the same step
    for a, b in zip(model.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# --- 4: lifetime


def test_a_deleted_optimizer_is_gone_and_its_hook_is_harmless():
    """4: the hook in the head must not keep the optimizer."""
    model, optimizer = attached()
    train(model, optimizer, 2)
    it = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert it() is None
    backward(model, 2)
    again = ProjectedSGD(model.parameters(), lr=0.02)
    again.attach(model[2])
    train(model, again, 2)
    fresh, other = attached()
    assert len(bits(fresh, other)) == len(bits(model, again))


def test_a_handle_may_outlive_the_optimizer():
    """Of the kind of 4."""
    model = network()
    optimizer = ProjectedSGD(model.parameters(), lr=0.02)
    handle = optimizer.attach(model[2])
    del optimizer
    gc.collect()
    handle.remove()
    assert not model[2]._forward_hooks
    backward(model, 0)


def test_a_saved_model_carries_no_projection():
    """4: torch.save(model), whole."""
    model, optimizer = attached(features=300)
    train(model, optimizer, 2)
    saved, plain = io.BytesIO(), io.BytesIO()
    torch.save(model, saved)
    torch.save(network(features=300), plain)
    assert saved.tell() < plain.tell() + 10_000  # P alone takes 360,000
    alone = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    del optimizer
    backward(alone, 0)
    other = ProjectedSGD(alone.parameters(), lr=0.1)
    other.attach(alone[2])
    train(alone, other, 1)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("together", [True, False])
def test_copies_with_a_process_group(process_group, together):
    """4: copy.deepcopy(head) met the group, which cannot be copied. A copy of both shares it."""
    model, optimizer = attached(process_group=process_group)
    train(model, optimizer, 2)
    if together:
        copied, other = copy.deepcopy((model, optimizer))
        for pair in ((model, optimizer), (copied, other)):
            train(*pair, 2, first=2)
        assert_same_bits(bits(model, optimizer), bits(copied, other))
    else:
        copied = copy.deepcopy(model)
        before = bits(model, optimizer)
        backward(copied, 5)
        copy.deepcopy(model[2])
        train(model, optimizer, 1, first=2)  # what the copy was fed is nothing to this optimizer
        again, third = attached(process_group=process_group)
        train(again, third, 3)
        assert_same_bits(bits(model, optimizer), bits(again, third))
        assert not all(torch.equal(a, b) for a, b in zip(before, bits(model, optimizer), strict=True))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("model_first", [True, False])
def test_a_copy_of_model_and_optimizer_is_attached_to_itself(how, model_first):
    """Of the kind of 4: in either order, the copied head feeds the copied optimizer, without the first one."""
    model, optimizer = attached(momentum=0.9)
    train(model, optimizer, 2)
    if model_first:
        copied, other = how((model, optimizer))
    else:
        other, copied = how((optimizer, model))
    train(model, optimizer, 2, first=2)
    expected = bits(model, optimizer)
    del optimizer
    gc.collect()
    train(copied, other, 2, first=2)
    assert_same_bits(bits(copied, other), expected)


# --- 5: looking changes nothing


LOOKS = {
    "state_dict": lambda model, optimizer: optimizer.state_dict(),  # 5
    "projection": lambda model, optimizer: optimizer.projection(model[2].weight),  # of the kind of 5
    "deepcopy": lambda model, optimizer: copy.deepcopy(optimizer),  # of the kind of 5
    "pickle": lambda model, optimizer: pickle.dumps((model, optimizer)),
    "dcp": get_optimizer_state_dict,
    "repr": lambda model, optimizer: repr(optimizer),
}


@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_saving_changes_no_later_bits(look, features):
    seen, unseen = attached(features=features, momentum=0.9), attached(features=features, momentum=0.9)
    for step in range(24):  # more than an update of P may be put off
        train(*seen, 1, first=step)
        if step % 3 == 1:
            look(*seen)
    train(*unseen, 24)
    assert_same_bits(bits(*seen), bits(*unseen))


@pytest.mark.parametrize("features", WIDTHS)
def test_a_run_that_is_loaded_ends_on_the_bits_of_one_that_was_not_interrupted(features):
    """Of the kind of 5: the file holds P as the run holds it."""
    straight, optimizer = attached(features=features, momentum=0.9)
    train(straight, optimizer, 7)
    file = io.BytesIO()
    torch.save([straight.state_dict(), optimizer.state_dict()], file)
    train(straight, optimizer, 20, first=7)
    resumed, other = attached(features=features, momentum=0.9)
    weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    train(resumed, other, 20, first=7)
    assert_same_bits(bits(straight, optimizer), bits(resumed, other))


# --- 6: an attached weight that is trained without its head


def in_another_module(model):
    """6: as converters and quantisation wrappers do."""
    other = nn.Linear(8, 3)
    other.weight, other.bias = model[2].weight, model[2].bias
    return nn.Sequential(model[0], model[1], other)


def in_a_function(model):
    """Of the kind of 6."""
    return lambda x: nn.functional.linear(model[1](model[0](x)), model[2].weight, model[2].bias)


def in_evaluation_mode(model):
    """Of the kind of 6: gradients flow, and nothing is recorded."""
    model[2].eval()
    return model


@pytest.mark.parametrize("way_round", [in_another_module, in_a_function, in_evaluation_mode])
def test_gradients_without_features_are_said_once(way_round):
    model, optimizer = attached()
    forward = way_round(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(4):
            optimizer.zero_grad()
            backward(forward, seed)
            optimizer.step()
    assert len([w for w in caught if "and no features" in str(w.message)]) == 1
    assert torch.equal(optimizer.projection(model[2].weight), torch.eye(8))


def test_a_head_that_is_fed_is_not_complained_of():
    """The other side of 6: also not when a step has no gradient, or when its handle was removed on purpose."""
    model = network()
    optimizer = ProjectedSGD(model.parameters(), lr=0.02)
    handle = optimizer.attach(model[2])
    train(model, optimizer, 2)
    optimizer.zero_grad()
    optimizer.step()
    handle.remove()
    train(model, optimizer, 2)


# --- 7: ZeroRedundancyOptimizer


def zero(rank, world):
    model, results = network(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own
        from torch.distributed.optim import ZeroRedundancyOptimizer

        try:
            optimizer = ZeroRedundancyOptimizer(model.parameters(), ProjectedSGD, lr=0.1)
            attach_where_owned(optimizer.optim, model)
            train(model, optimizer, 1)
        except (RuntimeError, ValueError) as error:
            results.append(str(error))
        optimizer = ZeroRedundancyOptimizer(model.parameters(), partial(ProjectedSGD, process_group="local"), lr=0.02)
        is_owner = attach_where_owned(optimizer.optim, model)
        train(model, optimizer, 3)
    P = optimizer.optim.projection(model[2].weight) if is_owner else None
    return results, [p.detach() for p in model.parameters()], P


def attach_where_owned(optimizer, model):
    is_owner = any(p is model[2].weight for group in optimizer.param_groups for p in group["params"])
    if is_owner:
        optimizer.attach(model[2])
    return is_owner


def test_zero_redundancy_is_refused_where_it_would_hang(tmp_path):
    """7: the rank that owns the head would wait for ranks that never come. With "local" it works."""
    results = run(zero, 2, tmp_path)
    for errors, weights, _ in results:
        assert len(errors) == 1 and "process_group: expected 'local'" in errors[0]
        assert_same_bits(weights, results[0][1])
    model, optimizer = attached()
    train(model, optimizer, 3)
    (owned,) = [P for *_, P in results if P is not None]
    assert_same_bits([*results[0][1], owned], bits(model, optimizer))


# --- 7a: state of other types


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "convert",
    [
        lambda value: value.item(),  # 7a: PyTorch's own test loads step as a number
        lambda value: value.reshape(1),  # of the kind of 7a
        lambda value: value.double(),  # of the kind of 7a
    ],
    ids=["number", "one element", "float64"],
)
def test_scalars_of_the_state_may_be_numbers(convert, momentum):
    model, optimizer = attached(momentum=momentum)
    train(model, optimizer, 3)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    for of_parameter in state["state"].values():
        for name, value in of_parameter.items():
            if isinstance(value, torch.Tensor) and value.dim() == 0:
                of_parameter[name] = convert(value)
    train(model, optimizer, 3, first=3)
    resumed, other = attached(momentum=momentum)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    train(resumed, other, 3, first=3)
    assert_same_bits(bits(resumed, other), bits(model, optimizer))


@pytest.mark.parametrize("name", ["projection", "momentum_buffer"])
@pytest.mark.parametrize("value", ["P", 3.5, [1.0], torch.ones(3)], ids=["text", "number", "list", "vector"])
def test_state_that_is_none_is_refused_before_anything_is_loaded(name, value):
    """Of the kind of 7a."""
    model, optimizer = attached(momentum=0.9)
    train(model, optimizer, 3)
    before, state = bits(model, optimizer), copy.deepcopy(optimizer.state_dict())
    state["state"][2][name] = value
    with pytest.raises((TypeError, ValueError), match=f"state_dict: .*{name}"):
        optimizer.load_state_dict(state)
    assert_same_bits(before, bits(model, optimizer))
    train(model, optimizer, 1, first=3)


# --- 7b: a step that fails changes nothing


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("overflow", [False, True])
def test_scale_and_overflow_of_one_element(shape, overflow):
    """7b: torch's fused SGD takes shape (1,)."""
    model, optimizer = attached(momentum=0.9)
    plain, other = attached(momentum=0.9)
    for m, o in ((model, optimizer), (plain, other)):
        train(m, o, 1)
        o.zero_grad()
        backward(m, 1)
    before = bits(model, optimizer)
    for p in model.parameters():
        p.grad *= 8
    optimizer.grad_scale, optimizer.found_inf = torch.full(shape, 8.0), torch.full(shape, float(overflow))
    optimizer.step()
    other.step()
    for ours, theirs in zip(bits(model, optimizer), before if overflow else bits(plain, other), strict=True):
        torch.testing.assert_close(ours, theirs, **({"rtol": 0, "atol": 0} if overflow else {}))


def spoil_scale(model, optimizer):
    optimizer.grad_scale, optimizer.found_inf = torch.ones(2), torch.zeros(())


def spoil_overflow(model, optimizer):
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros((), dtype=torch.int64)


def spoil_projection(model, optimizer):
    optimizer.state[model[2].weight]["base"] = torch.eye(3)


def spoil_momentum(model, optimizer):
    optimizer.state[model[2].weight]["momentum_buffer"] = torch.zeros(2, 2)


def spoil_momentum_of_a_plain_parameter(model, optimizer):
    optimizer.state[model[2].bias]["momentum_buffer"] = torch.zeros(7)


def spoil_grad_of_a_plain_parameter(model, optimizer):
    model[2].bias.grad = torch.ones(3).to_sparse()
    optimizer.param_groups[0]["weight_decay"] = 0.1  # which SGD refuses with sparse gradients


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_scale,  # 7b
        spoil_overflow,  # of the kind of 7b, as are the rest
        spoil_projection,
        spoil_momentum,
        spoil_momentum_of_a_plain_parameter,
        spoil_grad_of_a_plain_parameter,
    ],
)
def test_a_step_that_fails_changes_nothing_wherever_it_fails(spoil):
    model, optimizer = attached(momentum=0.9)
    train(model, optimizer, 3)
    optimizer.zero_grad()
    backward(model, 3)
    spoil(model, optimizer)
    states = [p.detach() for p in model.parameters()]
    states += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    before = copy.deepcopy(states)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.step()
    assert_same_bits(states, before)


# --- 7c: torch.compile


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own
        yield


@pytest.mark.parametrize("inside", ["constructor", "constructor and attach", "constructor and observe"])
def test_an_optimizer_built_inside_torch_compile(inside, fresh_dynamo):
    """7c: PyTorch's own tests of dynamo build theirs there."""

    def build(model):
        optimizer = ProjectedSGD(model.parameters(), lr=0.02, momentum=0.9)
        if inside == "constructor and attach":
            optimizer.attach(model[2])
        if inside == "constructor and observe":
            optimizer.observe(model[2].weight, torch.ones(2, 8))
        optimizer.step()
        return optimizer

    results = []
    for make in (torch.compile(build, backend="eager"), build):
        model = network()
        backward(model, 0)
        optimizer = make(model)
        optimizer.settle()
        optimizer.state_dict()
        if inside == "constructor":
            optimizer.attach(model[2])
        train(model, optimizer, 3)
        results.append(bits(model, optimizer))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("is_attached", [False, True])
def test_a_number_that_changes_recompiles_no_more_than_sgd(is_attached, fresh_dynamo):
    """7c: lr as a float, with a scheduler. With a head the step has one more graph a value at most."""
    model = network()
    optimizer = ProjectedSGD(model.parameters(), lr=0.02)
    if is_attached:
        optimizer.attach(model[2])
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    for t in range(8):
        backward(model, t)
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        step()
        optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] <= (8 if is_attached else 2)
