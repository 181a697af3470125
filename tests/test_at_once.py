"""A step in one call of the compiled library, and what is kept from step to step: the same as a step in many calls."""

import copy
import functools
import gc
import itertools
import threading
import weakref

import pytest
import torch
from helpers import needs_kernels, randn
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from mla_ext import ProjectedSGD, reference
from mla_ext.backends.cpu import Cpu

pytestmark = needs_kernels


@pytest.fixture
def taken(monkeypatch):
    """Of every call, whether it made the step."""
    answers, original = [], Cpu.step_

    def step_(self, plain, heads):
        answers.append(original(self, plain, heads))
        return answers[-1]

    monkeypatch.setattr(Cpu, "step_", step_)
    return answers


@pytest.fixture
def separately(monkeypatch):
    """What makes a function run with every step in calls of its own, and every mean by the op."""

    def decline(run):
        with monkeypatch.context() as patch:
            patch.setattr(Cpu, "step_", lambda self, plain, heads: False)
            patch.setattr(Cpu, "feature_mean_", lambda self, features, mean: 0)
            return run()

    return decline


def run(steps=7, s=6, C=3, dtype=torch.float32, heads=1, change=None, split=False, **options):
    """The parameters, the momentum buffers and P after some steps of an encoder and heads."""
    torch.manual_seed(0)
    encoder, outs = nn.Linear(4, s, dtype=dtype), [nn.Linear(s, C, dtype=dtype) for _ in range(heads)]
    params = [*encoder.parameters(), *(p for head in outs for p in head.parameters())]
    groups = [{"params": params[:1], "lr": 0.3}, {"params": params[1:]}] if split else params
    optimizer = ProjectedSGD(groups, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | options)
    for head in outs:
        optimizer.attach(head)
    for t in range(steps):
        optimizer.zero_grad()
        hidden = encoder(randn(5, 4, dtype=dtype, seed=t)).relu()
        sum(head(hidden).square().mean() for head in outs).backward()
        if change:
            change(t, optimizer, encoder, outs)
        optimizer.step()
    moved = [p.detach() for p in params] + [optimizer.state[p].get("momentum_buffer") for p in params]
    return [t for t in moved if t is not None] + [optimizer.projection(head.weight) for head in outs]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)  # products of PyTorch round as memory is aligned


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 4},
        {"rank": 4, "forget": 0.1, "absorb": "before", "nesterov": True},
        {"rank": None, "s": 40, "absorb": "before"},
        {"normalize": True, "momentum": 0.0},
        {"heads": 2, "rank": 3, "split": True, "maximize": True, "dampening": 0.2},
        {"dtype": torch.float64, "rank": 2},
        {"s": 300, "C": 40},
    ],
    ids=str,
)
def test_it_is_the_step_in_separate_calls(options, taken, separately):
    at_once = run(**options)
    assert taken[-1] and sum(taken) >= 5  # the first step has no momentum yet
    assert_same(at_once, separately(lambda: run(**options)))


def test_it_takes_heads_in_half_precision(taken):
    head = nn.Linear(6, 3, bias=False, dtype=torch.bfloat16)
    optimizer = ProjectedSGD(head.parameters(), lr=0.1)
    optimizer.attach(head)
    for t in range(3):
        head(randn(4, 6, dtype=torch.bfloat16, seed=t)).sum().backward()
        optimizer.step()
    assert taken == [True] * 3


DECLINED = {
    "a tensor lr": {"lr": torch.tensor(0.1)},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "another backend": {"backend": "reference"},
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_it_does_not_take_is_stepped_separately(name, taken):
    assert_same(run(**DECLINED[name]), run())
    assert taken[-1]  # of the second run


@pytest.mark.parametrize("spoil", ["weight", "grad", "momentum", "projection"])
def test_memory_that_is_not_contiguous(spoil, separately):
    def change(t, optimizer, encoder, heads):
        weight = heads[0].weight
        if spoil == "weight":
            weight.data = weight.data.t().contiguous().t()
        elif spoil == "grad":
            weight.grad = weight.grad.t().contiguous().t()
        elif t > 0:
            state, name = optimizer.state[weight], {"momentum": "momentum_buffer", "projection": "rows"}[spoil]
            state[name] = state[name].t().contiguous().t()

    assert_same(run(rank=4, change=change), separately(lambda: run(rank=4)))


def toggled(t, optimizer, encoder, heads):
    if t % 2:
        encoder.weight.grad = None  # as alternating modalities do
    if t % 3 == 1:
        heads[0].weight.grad = None


def scheduled(t, optimizer, encoder, heads):
    for group in optimizer.param_groups:
        group["lr"] = 0.1 / (t + 1)
        group["alpha"] = 0.2 + t


def switched(t, optimizer, encoder, heads):
    for group in optimizer.param_groups:
        group["momentum"] = 0.9 * (t % 3 > 0)


def replaced(t, optimizer, encoder, heads):
    if t == 3:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if t == 5:
        optimizer.state = copy.copy(optimizer.state)


def regrouped(t, optimizer, encoder, heads):
    if t == 3:
        bias = optimizer.param_groups[0]["params"].pop()
        optimizer.add_param_group({"params": [bias], "lr": 0.5})


def cleared(t, optimizer, encoder, heads):
    if t == 3:
        optimizer.state.clear()
    if t == 5:
        optimizer.state[heads[0].weight] = {}


def moved(t, optimizer, encoder, heads):
    if t == 3:
        for module in (encoder, *heads):
            for param in module.parameters():
                param.data = param.data.clone()


@pytest.mark.parametrize("change", [toggled, scheduled, switched, replaced, regrouped, cleared, moved])
def test_what_changes_between_steps_is_noticed(change, separately, taken):
    at_once = run(change=change, steps=9)
    assert any(taken)
    assert_same(at_once, separately(lambda: run(change=change, steps=9)))


def test_a_weight_that_is_attached_in_mid_run_is_a_head_from_then_on():
    head = nn.Linear(6, 3)
    optimizer = ProjectedSGD(head.parameters(), lr=0.1, momentum=0.9)
    for t in range(6):
        optimizer.zero_grad()
        head(randn(4, 6, seed=t)).square().sum().backward()
        optimizer.step()
        if t == 2:
            optimizer.attach(head)
    assert not torch.equal(optimizer.projection(head.weight), torch.eye(6))


def test_a_projection_that_is_put_into_the_state_by_hand_is_used():
    head = nn.Linear(6, 3, bias=False)
    optimizer = ProjectedSGD(head.parameters(), lr=0.1, momentum=0.9)
    for t in range(4):
        before = head.weight.detach().clone()
        optimizer.zero_grad()
        head(randn(4, 6, seed=t)).square().sum().backward()
        if t == 3:
            optimizer.state[head.weight] |= {"base": torch.zeros(6, 6), "momentum_buffer": torch.zeros(3, 6)}
        optimizer.step()
        assert torch.equal(head.weight, before) == (t == 3)


def test_a_failed_check_leaves_all_as_it_was():
    def spoil(t, optimizer, encoder, heads):
        if t == 4:
            before.extend(p.detach().clone() for group in optimizer.param_groups for p in group["params"])
            made.append(optimizer)
            optimizer.state[encoder.weight]["momentum_buffer"] = torch.zeros(1)

    before, made = [], []
    with pytest.raises(ValueError, match="momentum_buffer: expected one for"):
        run(change=spoil)
    assert_same(made[0].param_groups[0]["params"], before)


def test_autograd_knows_that_every_weight_changed():
    head = nn.Linear(6, 3)
    optimizer = ProjectedSGD(head.parameters(), lr=0.1, momentum=0.9)
    optimizer.attach(head)
    versions = []
    for t in range(4):
        head(randn(4, 6, seed=t)).sum().backward()
        optimizer.step()
        versions.append((head.weight._version, head.bias._version))
    assert all(now[i] > then[i] for then, now in itertools.pairwise(versions) for i in range(2))


class Subclass(ProjectedSGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("cls", [ProjectedSGD, Subclass])
def test_hooks_and_the_profiler_see_each_step_once(cls):
    head = nn.Linear(6, 3)
    optimizer = cls(head.parameters(), lr=0.1)
    optimizer.attach(head)
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda *args: seen.append("pre")),
        optimizer.register_step_post_hook(lambda *args: seen.append("post")),
        register_optimizer_step_pre_hook(lambda *args: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *args: seen.append("global post")),
    ]
    head(randn(4, 6)).sum().backward()
    optimizer.step()
    assert sorted(seen) == ["global post", "global pre", "post", "pre"]
    for handle in handles:
        handle.remove()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert [e.key for e in profile.key_averages() if "Optimizer.step" in e.key] == [
        f"Optimizer.step#{cls.__name__}.step"
    ]
    assert len(seen) == 4


class TestRecording:
    """The mean is written into memory that is kept."""

    def make(self):
        head = nn.Linear(6, 3, bias=False)
        optimizer = ProjectedSGD(head.parameters(), lr=0.0, alpha_scale=None, rank=None)
        optimizer.attach(head)
        return head, optimizer

    def feed(self, head, optimizer, *batches):
        for features in batches:
            head(features).sum().backward()
        optimizer.step()

    def check(self, head, optimizer, batches):
        """Whether P is that of one update for each batch."""
        P = torch.eye(6, dtype=torch.float64)
        for rows in batches:
            P = reference.rls_update(P, rows.double().reshape(-1, 6).mean(0), 0.1)
        torch.testing.assert_close(optimizer.projection(head.weight).double(), P, rtol=1e-5, atol=1e-6)

    def test_means_of_steps_do_not_mix(self):
        head, optimizer = self.make()
        steps = [randn(n, 6, seed=n) for n in (3, 5, 1, 4)]
        for features in steps:
            self.feed(head, optimizer, features)
        self.check(head, optimizer, steps)

    def test_micro_batches_and_inputs_with_more_dimensions(self):
        head, optimizer = self.make()
        steps = [[randn(n, 2, 6, seed=n + i) for i in range(3)] for n in (3, 5, 1, 4)]
        for batches in steps:
            self.feed(head, optimizer, *batches)
        self.check(head, optimizer, map(torch.cat, steps))

    def test_two_heads_that_share_a_weight(self):
        head, optimizer = self.make()
        twin = nn.Linear(6, 3, bias=False)
        twin.weight = head.weight
        optimizer.attach(twin)
        steps = [(randn(4, 6, seed=t), randn(4, 6, seed=9 + t)) for t in range(4)]
        for a, b in steps:
            (head(a).sum() + twin(b).sum()).backward()
            optimizer.step()
        self.check(head, optimizer, map(torch.cat, steps))

    def test_features_that_only_look_like_plain_ones(self):
        head, optimizer = self.make()
        z = torch.complex(randn(4, 6), randn(4, 6, seed=1))
        kinds = [randn(4, 6), z.conj().imag, randn(6, 4).t(), randn(8, 6)[::2], randn(1, 6).expand(4, 6), randn(6)]
        for features in kinds:
            self.feed(head, optimizer, features)
        self.check(head, optimizer, kinds)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, in jvp
    def test_transforms_are_not_recorded(self):
        head, optimizer = self.make()
        self.feed(head, optimizer, randn(4, 6))
        P = optimizer.projection(head.weight)
        with pytest.warns(UserWarning, match="cannot be recorded"):
            torch.func.vmap(head)(randn(4, 6))
        torch.func.jvp(head, (randn(4, 6),), (randn(4, 6),))
        torch.func.grad(lambda x: head(x).sum())(randn(4, 6))
        head.weight.grad = torch.ones(3, 6)
        optimizer.step()
        assert torch.equal(optimizer.projection(head.weight), P)

    def test_a_converted_model(self):
        head, optimizer = self.make()
        for t in range(3):
            self.feed(head, optimizer, randn(4, 6, seed=t))
        head.double()
        head.weight.grad = None
        for t in range(3, 6):
            self.feed(head, optimizer, randn(4, 6, seed=t).double())
        self.check(head, optimizer, [randn(4, 6, seed=t) for t in range(6)])


# Each of the tests below shows a fault that is still there.


def test_a_gradient_with_the_negative_bit_keeps_its_sign():
    """Autograd itself makes such gradients, of a parameter with one element that is an imaginary part."""
    moved = []
    for cls in (torch.optim.SGD, ProjectedSGD):
        param = nn.Parameter(torch.ones(1))
        optimizer = cls([param], lr=0.5)
        z, w = torch.complex(torch.ones(1), param), torch.complex(torch.tensor([2.0]), torch.tensor([3.0]))
        (z.conj() * w).imag.sum().backward()
        assert param.grad.is_neg()
        optimizer.step()
        moved.append(param.detach())
    assert torch.equal(*moved)


def test_features_with_the_negative_bit_keep_their_sign():
    head = nn.Linear(6, 3, bias=False)
    optimizer = ProjectedSGD(head.parameters(), lr=0.0, rank=None)
    optimizer.attach(head)
    for t in range(2):
        features = randn(4, 6, seed=t)
        head(torch._neg_view(features) if t else features)
    rows = torch.cat([randn(4, 6, seed=0), -randn(4, 6, seed=1)])
    torch.testing.assert_close(optimizer._observed[head.weight].mean, rows.mean(0))
    optimizer._observed.clear()
    head(torch._neg_view(features))
    torch.testing.assert_close(optimizer._observed[head.weight].mean, -features.mean(0))


def test_hooks_are_called_under_a_step_that_is_wrapped_by_functools():
    class Wrapped(ProjectedSGD):
        @functools.wraps(ProjectedSGD.step)  # copies the mark `hooked` too, as it does for torch.optim.SGD's
        def step(self, closure=None):
            return super().step(closure)

    param, seen = nn.Parameter(torch.ones(3)), []
    optimizer = Wrapped([param], lr=0.1)
    optimizer.register_step_post_hook(lambda *args: seen.append("post"))
    param.grad = torch.ones(3)
    optimizer.step()
    assert seen


def test_forwards_of_two_threads_are_both_recorded():
    head = nn.Linear(512, 4, bias=False)
    optimizer = ProjectedSGD(head.parameters(), lr=0.0)
    optimizer.attach(head)
    for _ in range(5):
        head(randn(2, 512)).sum().backward()
        optimizer.step()
        threads = [threading.Thread(target=head, args=(torch.full((8000, 512), x),)) for x in (1.0, 3.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert optimizer._observed[head.weight].count == 16000
        optimizer._observed.clear()


def test_a_gradient_of_zeros_without_memory():
    weight = nn.Parameter(torch.ones(3))
    optimizer = ProjectedSGD([weight], lr=0.1, momentum=0.9)
    for grad in (torch.ones(3), torch._efficientzerotensor((3,))):
        weight.grad = grad
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1 - 0.1 - 0.09))


def test_nothing_of_what_is_gone_is_kept():
    head = nn.Linear(6, 3)
    optimizer = ProjectedSGD(head.parameters(), lr=0.1)
    optimizer.attach(head)
    for t in range(3):
        head(randn(4, 6, seed=t)).sum().backward()
        optimizer.step()
    rows = weakref.ref(optimizer.state[head.weight]["base"])
    grad = weakref.ref(head.weight.grad)
    optimizer.zero_grad()
    optimizer.state.clear()
    head.weight.requires_grad_(False)
    head.bias.grad = torch.ones(3)
    optimizer.step()
    gc.collect()
    assert rows() is None and grad() is None


def test_a_dispatch_mode_sees_the_operations():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    head, seen = nn.Linear(6, 3), []
    optimizer = ProjectedSGD(head.parameters(), lr=0.1)
    head(randn(4, 6)).sum().backward()
    with Seen():
        optimizer.step()
    assert seen
