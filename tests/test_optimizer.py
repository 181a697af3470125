"""ProjectedSGD: torch.optim.SGD where nothing is attached, the reference where something is."""

import copy
import gc
import io
import weakref

import numpy as np
import pytest
import torch
from helpers import batch, network, train
from torch import nn

from mla_ext import ProjectedSGD, reference
from mla_ext.reference import Hyperparameters

pytestmark = pytest.mark.usefixtures("default_device")

SGD_OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"weight_decay": 0.1, "maximize": True},
]


def assert_same_bits(model, other):
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def attached(options=None, seed=0):
    model = network(seed)
    optimizer = ProjectedSGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | (options or {})))
    handle = optimizer.attach(model[2])
    return model, optimizer, handle


@pytest.mark.parametrize("options", SGD_OPTIONS)
def test_unattached_parameters_step_as_sgd_to_the_bit(options):
    ours, theirs = network(), network()
    optimizers, schedulers = [], []
    for model, cls in ((ours, ProjectedSGD), (theirs, torch.optim.SGD)):
        optimizer = cls(model[0].parameters(), lr=0.1, **options)
        optimizers.append(optimizer)
        schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5))
        train(model, optimizer, 10, schedulers[-1])
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01, "weight_decay": 0.3})
        train(model, optimizer, 30, first=10)
    assert_same_bits(ours, theirs)
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CosineAnnealingLR", "ReduceLROnPlateau"])
def test_schedulers_reach_it_as_they_reach_sgd(scheduler):
    models = []
    for cls in (ProjectedSGD, torch.optim.SGD):
        model = network()
        optimizer = cls(model.parameters(), lr=0.1, momentum=0.9)
        if scheduler == "OneCycleLR":
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20)
        elif scheduler == "CosineAnnealingLR":
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        else:
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
            schedule = type("Step", (), {"step": lambda self, plateau=plateau: plateau.step(1.0)})()
        train(model, optimizer, 19, schedule)
        models.append(model)
    assert_same_bits(*models)


@pytest.mark.parametrize("options", [*SGD_OPTIONS, {"absorb": "before"}, {"forget": 0.1}, {"normalize": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_attached_head_steps_as_the_reference(options, dtype):
    model = network(dtype=dtype)
    shadow = copy.deepcopy(model)
    optimizer = ProjectedSGD(model.parameters(), lr=0.1, alpha=0.05, alpha_scale=None, **options)
    optimizer.attach(model[2])
    sgd_names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
    plain = torch.optim.SGD(
        [*shadow[0].parameters(), shadow[2].bias], lr=0.1, **{k: v for k, v in options.items() if k in sgd_names}
    )
    hyper = Hyperparameters(lr=0.1, alpha=0.05, **options)
    P, buffer = torch.eye(8, dtype=dtype), torch.zeros(3, 8, dtype=dtype) if hyper.momentum else None
    for t in range(12):
        x, y = batch(t, dtype=dtype)
        for m, o in ((model, optimizer), (shadow, plain)):
            m.zero_grad()
            nn.functional.cross_entropy(m(x), y).backward()
            if m is shadow:
                mean = reference.feature_mean(shadow[1](shadow[0](x)).detach())
                weight, buffer, P = reference.head_step(
                    shadow[2].weight.detach(), shadow[2].weight.grad, buffer, P, mean, torch.tensor(t), hyper
                )
            o.step()
        shadow[2].weight.data.copy_(weight)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(optimizer.projection(model[2].weight), P, **tolerance)
    for a, b in zip(model.parameters(), shadow.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_groups_have_their_own_alpha_and_two_heads_their_own_projection():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 3), nn.Linear(6, 2)
    groups = [{"params": first.parameters(), "alpha": 10.0}, {"params": second.parameters(), "lr": 0.0}]
    optimizer = ProjectedSGD(groups, lr=0.1, alpha=0.01, alpha_scale=None)
    optimizer.attach(first)
    optimizer.attach(second)
    kept = second.weight.detach().clone()
    x4, x6 = torch.rand(5, 4), torch.rand(5, 6)
    (first(x4).sum() + second(x6).sum()).backward()
    optimizer.step()
    for head, x, alpha in ((first, x4, 10.0), (second, x6, 0.01)):
        expected = reference.rls_update(torch.eye(x.shape[1]), reference.feature_mean(x), alpha)
        torch.testing.assert_close(optimizer.projection(head.weight), expected)
    assert torch.equal(second.weight, kept)


def test_alpha_and_forget_follow_their_param_group():
    model, optimizer, _ = attached({"alpha": 0.5, "alpha_scale": None})
    optimizer.param_groups[0]["alpha"] = 0.001
    optimizer.param_groups[0]["forget"] = 0.25
    x, _ = batch(0)
    train(model, optimizer, 1)
    mean = reference.feature_mean(network()[1](network()[0](x)).detach())
    torch.testing.assert_close(
        optimizer.projection(model[2].weight), reference.rls_update(torch.eye(8), mean, 0.001, 0.25)
    )


def test_observe_by_hand_equals_attach():
    model, optimizer, _ = attached()
    other = network()
    by_hand = ProjectedSGD(other.parameters(), lr=0.1, momentum=0.9)
    for t in range(5):
        x, y = batch(t)
        for m, o in ((model, optimizer), (other, by_hand)):
            o.zero_grad()
            features = m[1](m[0](x))
            if o is by_hand:
                o.observe(m[2].weight, features)
            nn.functional.cross_entropy(m[2](features), y).backward()
            o.step()
    assert_same_bits(model, other)


def test_micro_batches_count_by_their_rows():
    whole, optimizer, _ = attached()
    parts, other, _ = attached()
    x, y = batch(0, n=10)
    nn.functional.cross_entropy(whole(x), y).backward()
    for rows in (slice(0, 3), slice(3, 4), slice(4, 10)):
        (nn.functional.cross_entropy(parts(x[rows]), y[rows], reduction="sum") / 10).backward()
    optimizer.step()
    other.step()
    torch.testing.assert_close(optimizer.projection(whole[2].weight), other.projection(parts[2].weight))


def test_only_training_passes_with_gradients_are_recorded():
    model, optimizer, handle = attached()
    x, _ = batch(0)
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    model.train()
    model(x[:0])  # an empty batch has no mean
    assert not optimizer._observed
    model(x)
    assert optimizer._observed
    optimizer._observed.clear()
    handle.remove()
    model(x)
    assert not optimizer._observed


def test_features_are_never_used_twice():
    model, optimizer, handle = attached()
    train(model, optimizer, 1)
    P = optimizer.projection(model[2].weight)
    handle.remove()
    train(model, optimizer, 3)
    assert torch.equal(P, optimizer.projection(model[2].weight))


def test_inputs_with_more_dimensions_and_keywords_are_recorded():
    head = nn.Linear(4, 2)
    optimizer = ProjectedSGD(head.parameters(), lr=0.1, alpha_scale=None)
    optimizer.attach(head)
    x = torch.rand(2, 3, 4)
    head(input=x).sum().backward()
    optimizer.step()
    expected = reference.rls_update(torch.eye(4), reference.feature_mean(x.reshape(6, 4)))
    torch.testing.assert_close(optimizer.projection(head.weight), expected)


def test_a_parameter_without_gradient_does_not_move():
    model, optimizer, _ = attached({"weight_decay": 0.1})
    train(model, optimizer, 2)
    optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict()), optimizer.projection(model[2].weight)
    model(batch(0)[0])
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert torch.equal(before[1], optimizer.projection(model[2].weight))


def test_reset_projection():
    model, optimizer, _ = attached()
    train(model, optimizer, 2)
    assert not torch.equal(optimizer.projection(model[2].weight), torch.eye(8))
    optimizer.reset_projection()
    assert torch.equal(optimizer.projection(model[2].weight), torch.eye(8))


def test_closure_hooks_and_zero_grad():
    model, optimizer, _ = attached()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    x, y = batch(0)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        calls.append("closure")
        return loss

    assert optimizer.step(closure).item() == pytest.approx(nn.functional.cross_entropy(network()(x), y).item())
    assert calls == ["before", "closure", "after"]
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_dict_continues_to_the_bit(dtype):
    def make():
        model = network(dtype=dtype)
        optimizer = ProjectedSGD(model.parameters(), lr=0.1, momentum=0.9, alpha=0.01)
        optimizer.attach(model[2])
        return model, optimizer

    def run(model, optimizer, first, steps):
        for t in range(first, first + steps):
            x, y = batch(t, dtype=dtype)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    straight, optimizer = make()
    run(straight, optimizer, 0, 5)
    file = io.BytesIO()
    torch.save([straight.state_dict(), optimizer.state_dict()], file)
    run(straight, optimizer, 5, 5)

    resumed, other = make()
    file.seek(0)
    model_state, optimizer_state = torch.load(file, weights_only=True)
    resumed.load_state_dict(model_state)
    other.load_state_dict(optimizer_state)
    accumulate = reference.accumulate_dtype(dtype)
    state = other.state[resumed[2].weight]
    assert state["base"].dtype == state["momentum_buffer"].dtype == accumulate
    run(resumed, other, 5, 5)
    assert_same_bits(straight, resumed)
    assert torch.equal(optimizer.projection(straight[2].weight), other.projection(resumed[2].weight))


def test_a_checkpoint_of_sgd_loads_with_p_at_the_identity():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, sgd, 3)
    ours, optimizer, _ = attached()
    ours.load_state_dict(model.state_dict())
    train(ours, optimizer, 2)
    ours.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="starts from the identity"):
        optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
    assert torch.equal(optimizer.projection(ours[2].weight), torch.eye(8))
    train(model, sgd, 1, first=3)
    train(ours, optimizer, 1, first=3)  # P = I: the same step
    for a, b in zip(model.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_attaching_in_mid_run_keeps_the_momentum():
    model, plain = network(), network()
    optimizer = ProjectedSGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    train(model, optimizer, 3)
    optimizer.attach(model[2])
    train(model, optimizer, 1, first=3)
    train(plain, sgd, 4)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_deep_copy_of_model_and_optimizer_trains_on_alone():
    model, optimizer, _ = attached()
    train(model, optimizer, 2)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    kept = copy.deepcopy(model.state_dict())
    train(twin, its_optimizer, 3, first=2)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    train(model, optimizer, 3, first=2)
    assert_same_bits(model, twin)
    assert torch.equal(optimizer.projection(model[2].weight), its_optimizer.projection(twin[2].weight))


def test_an_optimizer_that_is_gone_is_freed():
    model, optimizer, handle = attached()
    train(model, optimizer, 2)
    reference_to_it = weakref.ref(optimizer)
    handle.remove()
    del optimizer, handle
    gc.collect()
    assert reference_to_it() is None


def test_a_failed_step_changes_nothing_and_forgets_the_features():
    model, optimizer, _ = attached()
    train(model, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    x, y = batch(7)
    nn.functional.cross_entropy(model(x), y).backward()
    good = model[2].weight.grad
    model[2].weight.grad = None
    model[2].weight.grad = good.to_sparse()
    with pytest.raises(TypeError, match=r"grad: expected a dense \(3, 8\) tensor"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = float("nan")
    model[2].weight.grad = good
    with pytest.raises(ValueError, match="lr: expected a finite number"):
        optimizer.step()
    after = model.state_dict(), optimizer.state_dict()["state"]
    for old, new in zip(before[0].values(), after[0].values(), strict=True):
        assert torch.equal(old, new)
    for index, state in before[1].items():
        assert all(torch.equal(value, after[1][index][name]) for name, value in state.items())
    assert not optimizer._observed


@pytest.mark.parametrize("overflow_at", [0, 3])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}])
def test_grad_scaler_skips_an_overflow_without_a_trace(overflow_at, options):
    """Against the same run without the step that overflowed; P must not have seen its features either."""
    model = network()
    optimizer = ProjectedSGD(model.parameters(), lr=0.1, **options)
    optimizer.attach(model[2])
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0, growth_interval=1000)
    other = network()
    its_optimizer = ProjectedSGD(other.parameters(), lr=0.1, **options)
    its_optimizer.attach(other[2])
    for t in range(6):
        x, y = batch(t)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (torch.inf if t == overflow_at else 1)).backward()
        if t == 4:  # gradients that the user unscales and clips
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        before = copy.deepcopy((model.state_dict(), optimizer.projection(model[2].weight)))
        scaler.step(optimizer)
        scaler.update()
        if t == overflow_at:
            assert scaler.get_scale() == 512
            assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
            assert torch.equal(before[1], optimizer.projection(model[2].weight))
            continue
        its_optimizer.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        if t == 4:
            nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        its_optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(optimizer.projection(model[2].weight), its_optimizer.projection(other[2].weight))


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_grad_scaler_with_parameters_that_take_turns(dampening):
    """Encoders that meet their first gradient at different steps, as in alternation."""
    models, scaler = [], torch.amp.GradScaler(torch.get_default_device().type, init_scale=64.0)
    for scaled in (True, False):
        torch.manual_seed(0)
        encoders, head = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4)]), nn.Linear(4, 3)
        model = nn.ModuleList([encoders, head])
        optimizer = ProjectedSGD(model.parameters(), lr=0.1, momentum=0.9, dampening=dampening)
        optimizer.attach(head)
        for t in range(6):
            x, y = batch(t)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(head(encoders[t % 2](x).relu()), y)
            if scaled:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_capturable_keeps_lr_and_alpha_in_place():
    """What a captured graph would read: the same tensors, written by schedulers and by load_state_dict."""
    model, optimizer, _ = attached({"capturable": True})
    plain_model, plain, _ = attached()
    group = optimizer.param_groups[0]
    lr, alpha = group["lr"], group["alpha"]
    assert isinstance(lr, torch.Tensor) and isinstance(alpha, torch.Tensor)
    for m, o in ((model, optimizer), (plain_model, plain)):
        train(m, o, 6, torch.optim.lr_scheduler.StepLR(o, 2, 0.5))
    assert group["lr"] is lr and lr == pytest.approx(0.0125)
    for a, b in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    optimizer.load_state_dict(copy.deepcopy(attached({"capturable": True, "lr": 0.3})[1].state_dict()))
    assert group is not optimizer.param_groups[0] and optimizer.param_groups[0]["lr"] is lr
    assert lr == pytest.approx(0.3) and optimizer.param_groups[0]["alpha"] is alpha


@pytest.mark.parametrize("flags", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_foreach_and_fused_are_those_of_sgd(flags):
    models = []
    for cls in (ProjectedSGD, torch.optim.SGD):
        models.append(network())
        train(models[-1], cls(models[-1].parameters(), lr=0.1, momentum=0.9, **flags), 5)
    assert_same_bits(*models)


@pytest.mark.parametrize("at_first", [0.0, 0.9])  # when the head is attached
def test_momentum_switched_on_and_off_in_mid_run_is_that_of_sgd(at_first):
    """The first step with momentum takes the gradient as it is, undamped, whenever it comes."""
    models = []
    for cls in (ProjectedSGD, torch.optim.SGD):
        models.append(network())
        optimizer = cls(models[-1].parameters(), lr=0.1, momentum=at_first, dampening=0.5)
        if cls is ProjectedSGD:
            optimizer.attach(models[-1][2]).remove()  # P stays the identity
        for t, momentum in enumerate((0.0, 0.0, 0.9, 0.9, 0.0, 0.9)):
            optimizer.param_groups[0]["momentum"] = momentum
            train(models[-1], optimizer, 1, first=t)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_projection_handed_out_is_a_copy_and_the_one_loaded_too():
    model, optimizer, _ = attached()
    train(model, optimizer, 1)
    optimizer.projection(model[2].weight).zero_()
    assert optimizer.projection(model[2].weight).any()
    saved = optimizer.state_dict()
    _, its_optimizer, _ = attached()
    its_optimizer.load_state_dict(saved)
    its_optimizer.reset_projection()
    assert not torch.equal(optimizer.projection(model[2].weight), torch.eye(8))


def test_a_frozen_head_is_not_recorded():
    model, optimizer, _ = attached()
    model[2].requires_grad_(False)
    model(batch(0)[0])
    assert not optimizer._observed


def test_loading_a_state_drops_what_was_observed_before():
    model, optimizer, _ = attached()
    saved = copy.deepcopy(optimizer.state_dict())
    model(batch(0)[0])
    optimizer.load_state_dict(saved)
    assert not optimizer._observed


def test_a_closure_that_raises_leaves_no_features_behind():
    model, optimizer, _ = attached()

    def closure():
        model(batch(0)[0]).sum().backward()
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert not optimizer._observed


@pytest.mark.parametrize("spoil", ["backend", "another group"])
def test_a_step_that_cannot_run_moves_nothing_anywhere(spoil):
    model = network()
    optimizer = ProjectedSGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)
    optimizer.attach(model[2])
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    before = copy.deepcopy(model.state_dict())
    if spoil == "backend":
        optimizer.backend = "cuda" if torch.get_default_device().type == "cpu" else "cpu"  # takes no such tensors
    else:
        optimizer.param_groups[1]["momentum"] = "x"
    with pytest.raises((RuntimeError, TypeError)):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_numpy_scalars_and_roundings_below_zero_are_taken():
    models = []
    for cls in (ProjectedSGD, torch.optim.SGD):
        models.append(network())
        optimizer = cls(models[-1].parameters(), lr=np.float32(0.1), momentum=0.9)
        if cls is ProjectedSGD:
            optimizer.attach(models[-1][2]).remove()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.float32(0.5) ** epoch)
        train(models[-1], optimizer, 4, schedule)
        optimizer.param_groups[0]["lr"] = -1e-18
        train(models[-1], optimizer, 1, first=4)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_one_element_tensor_lr_loads_and_keeps_its_place():
    model = network()
    optimizer = ProjectedSGD(model.parameters(), lr=torch.tensor([0.1]))
    lr = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] is lr


def test_a_projection_of_another_width_is_refused_before_anything_is_loaded():
    _, optimizer, _ = attached()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][2] = {"projection": torch.eye(6)}
    saved["param_groups"][0]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"state_dict: expected a projection for a \(3, 8\) .* got a \(6, 6\)"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_foreach_with_buffers_that_are_partly_new_is_that_of_sgd():
    results = []
    for cls in (ProjectedSGD, torch.optim.SGD):
        torch.manual_seed(0)
        a, b = (nn.Parameter(torch.randn(50).bfloat16()) for _ in range(2))
        optimizer = cls([a, b], lr=0.1, momentum=0.9, dampening=0.5, foreach=True)
        for t in range(4):
            a.grad = torch.randn(50).bfloat16()
            b.grad = torch.randn(50).bfloat16() if t >= 2 else None
            optimizer.step()
        results.append((a, b))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_tensor_lr_and_weight_decay_are_those_of_numbers():
    models = []
    for convert in (float, lambda value: torch.tensor(value, dtype=torch.float64)):
        model, optimizer, _ = attached({"lr": convert(0.1), "weight_decay": convert(0.01)})
        train(model, optimizer, 4)
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_backend_that_is_set_between_steps_serves_the_next_step():
    head = torch.nn.Linear(16, 4)
    optimizer = ProjectedSGD(head.parameters(), lr=0.1)
    optimizer.attach(head)
    for _ in range(2):  # the second step is not checked anew
        head(torch.ones(3, 16)).sum().backward()
        optimizer.step()
    head(torch.ones(3, 16)).sum().backward()
    optimizer.backend = "none of ours"
    with pytest.raises(ValueError, match="backend"):
        optimizer.step()
