"""The plain step against torch.optim.SGD, bit for bit."""

import itertools
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import needs_kernels
from torch import nn

from mla_ext import ProjectedSGD, _library, plain
from mla_ext.backends import cpu
from mla_ext.reference import Hyperparameters
from mla_ext.step import PlainStep

SHAPES = [(1,), (7,), (), (15,), (16,), (17,), (3, 0), (33,), (513,), (3, 5, 7), (4097,), (70001,)]
HEAVY = {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}
OPTIONS = [
    {"momentum": momentum, "dampening": dampening, "weight_decay": decay, "nesterov": nesterov, "maximize": maximize}
    for momentum, dampening, decay, nesterov, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.01), (False, True), (False, True)
    )
    if not (nesterov and (momentum == 0 or dampening != 0))
]


def randn(*shape, dtype=torch.float32):
    """Not of the default device: the kernel is for CPUs."""
    return torch.randn(shape, dtype=dtype, device="cpu")


class Ours:
    """The optimizer that plain_step is a part of, with the defaults of torch.optim.SGD."""

    def __init__(self, params, **options):
        self.params, self.state = params, defaultdict(dict)
        self.group = torch.optim.SGD([nn.Parameter(torch.zeros(1))], **options).defaults | {"capturable": False}

    @torch.no_grad()
    def step(self, **scaler):
        params = [param for param in self.params if param.grad is not None]
        plain.plain_step(self.state, self.group, params, **scaler)


class Twins:
    """The same parameters in plain_step and in torch.optim.SGD."""

    def __init__(self, tensors, lr=0.1, **options):
        self.ours, self.theirs = ([nn.Parameter(tensor.clone()) for tensor in tensors] for _ in range(2))
        self.optimizer = Ours(self.ours, lr=lr, **options)
        self.sgd = torch.optim.SGD(self.theirs, lr=lr, **options)

    def step(self, grads):
        for ours, theirs, grad in zip(self.ours, self.theirs, grads, strict=True):
            ours.grad = theirs.grad = grad
        self.optimizer.step()
        self.sgd.step()

    def check(self):
        for ours, theirs in zip(self.ours, self.theirs, strict=True):
            assert_same_bits(ours, theirs)
            mine, its = (
                s[p].get("momentum_buffer") for s, p in ((self.optimizer.state, ours), (self.sgd.state, theirs))
            )
            assert (mine is None) == (its is None)
            if its is not None:
                assert type(mine) is type(its) and mine.requires_grad == its.requires_grad
                assert_same_bits(mine, its)


def assert_same_bits(a, b):
    """All NaN are one."""
    assert a.dtype == b.dtype and a.shape == b.shape and a.layout == b.layout
    assert a.is_sparse or a.stride() == b.stride()
    a, b = a.detach().to_dense(), b.detach().to_dense()
    if a.dtype in (torch.float32, torch.float64):
        assert torch.equal(a.isnan(), b.isnan())
        bits = torch.int32 if a.dtype == torch.float32 else torch.int64
        a, b = (x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).view(bits) for x in (a, b))
    assert torch.equal(a, b)


@pytest.fixture
def only_kernel(monkeypatch):
    """PyTorch's own step fails."""

    def no(*args, **kwargs):
        raise AssertionError("torch.optim.SGD's own step was called")

    monkeypatch.setattr(plain, "sgd", no)


@pytest.fixture
def calls(monkeypatch):
    """How PyTorch's own step was called."""
    seen = []
    original = plain.sgd

    def record(*args, **kwargs):
        seen.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(plain, "sgd", record)
    return seen


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twenty_steps_with_every_option(only_kernel, threads, dtype):
    torch.manual_seed(0)
    start = [randn(*shape, dtype=dtype) for shape in SHAPES]
    grads = [[randn(*shape, dtype=dtype) for shape in SHAPES] for _ in range(20)]
    for options in OPTIONS:
        twins = Twins(start, **options)
        for each in grads:
            twins.step(each)
        twins.check()


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_a_parameter_alone(only_kernel, shape):
    for dtype, options in itertools.product((torch.float32, torch.float64), OPTIONS[::3]):
        twins = Twins([randn(*shape, dtype=dtype)], **options)
        for _ in range(3):
            twins.step([randn(*shape, dtype=dtype)])
        twins.check()


@needs_kernels
def test_both_dtypes_in_one_group(only_kernel, threads):
    dtypes = [torch.float32, torch.float64] * len(SHAPES)
    shapes = SHAPES + SHAPES[::-1]
    twins = Twins([randn(*s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)], **HEAVY)
    for _ in range(4):
        twins.step([randn(*s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)])
    twins.check()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_at_the_edges(only_kernel, dtype):
    info = torch.finfo(dtype)
    special = [
        0.0,
        -0.0,
        1.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        info.tiny,
        -info.tiny / 8,
        info.max,
        info.smallest_normal,
    ]
    pairs = torch.tensor(list(itertools.product(special, special)), dtype=dtype, device="cpu")
    weights, grads = pairs.t().contiguous()
    for options in OPTIONS:
        twins = Twins([weights, weights[:5]], **options)
        for scale in (1, 2**-20, -3):
            twins.step([grads * scale, grads[:5]])
        twins.check()


@needs_kernels
@pytest.mark.parametrize("number", [1, 0, -0.0, 1e-50, torch.inf, -1e-3])
def test_unusual_hyperparameters(only_kernel, number):
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        twins = Twins([randn(40), randn(40, dtype=torch.float64)], **HEAVY)
        twins.optimizer.group[name] = twins.sgd.param_groups[0][name] = number
        for _ in range(3):
            twins.step([randn(40), randn(40, dtype=torch.float64)])
        twins.check()


@needs_kernels
def test_a_rate_beyond_float32():
    twins = Twins([randn(40)], lr=1e300)
    with pytest.raises(RuntimeError, match="overflow"):
        twins.step([randn(40)])
    assert_same_bits(*twins.ours, *twins.theirs)
    twins = Twins([randn(40, dtype=torch.float64)], lr=1e300)
    twins.step([randn(40, dtype=torch.float64)])
    twins.check()


@needs_kernels
def test_it_is_split_over_threads_anywhere(only_kernel, threads):
    """Tensors that begin, end and are cut where no vector does."""
    twins = Twins([randn(n) for n in (5, 40001, 3, 40003, 1, 70000)], **HEAVY)
    for _ in range(3):
        twins.step([randn(p.numel()) for p in twins.ours])
    twins.check()


@needs_kernels
@pytest.mark.parametrize(
    ("isa", "capability"),
    [("avx512", "avx512"), ("avx512", "default"), ("avx2", "avx2"), ("baseline", "default"), ("baseline", "avx2")],
)
def test_every_instruction_set(isa, capability):
    """Ours and PyTorch's, whose default one has no fused multiply-add."""
    known, here = ("default", "avx2", "avx512"), torch.backends.cpu.get_cpu_capability().lower()
    if here not in known or known.index(capability) > known.index(here):
        pytest.skip(f"PyTorch does not run with {capability} here")
    program = (
        "import pytest, sys, torch, mla_ext\n"
        "print(mla_ext.build_info()['cpu_isa'], torch.backends.cpu.get_cpu_capability())\n"
        "sys.exit(pytest.main(['-q', 'test_plain.py', '-k', 'alone or edges or both_dtypes or unusual']))"
    )
    environment = os.environ | {"MLA_EXT_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    suite = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    if "MLA_EXT_CPU_ISA: expected one that runs on this CPU" in suite.stderr:
        pytest.skip(f"{isa} does not run here")
    assert suite.returncode == 0, suite.stdout + suite.stderr
    assert suite.stdout.startswith(f"{isa} {capability.upper()}\n")
    assert int(re.search(r"(\d+) passed", suite.stdout)[1]) > 20


@needs_kernels
def test_parameters_that_take_turns(only_kernel):
    twins = Twins([randn(9), randn(33), randn(2, 3)], momentum=0.9, dampening=0.5)
    for t in range(7):
        twins.step([randn(9) if t % 2 else None, randn(33) if t > 2 else None, randn(2, 3)])
        twins.check()


@needs_kernels
def test_what_the_user_changes_between_steps(only_kernel):
    """Memory, buffers, state and hyperparameters are read where they are now."""
    twins = Twins([randn(33), randn(4, 5)], **HEAVY)

    def step():
        twins.step([randn(33), randn(4, 5)])
        twins.check()

    step()
    for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
        new = randn(*ours.shape)
        ours.data, theirs.data = new.clone(), new.clone()
    step()
    for params, state in ((twins.ours, twins.optimizer.state), (twins.theirs, twins.sgd.state)):
        state[params[0]]["momentum_buffer"] = torch.ones(33, device="cpu")
        state[params[1]] = {"momentum_buffer": torch.full((4, 5), 2.0, device="cpu")}
    step()
    for params, state in ((twins.ours, twins.optimizer.state), (twins.theirs, twins.sgd.state)):
        del state[params[0]]
        state[params[1]]["momentum_buffer"] = None
    step()
    for group in (twins.optimizer.group, twins.sgd.param_groups[0]):
        group.update(lr=0.03, momentum=0.5, dampening=0.0, nesterov=True, weight_decay=0.0)
    step()
    for group in (twins.optimizer.group, twins.sgd.param_groups[0]):
        group.update(momentum=0.0, nesterov=False, maximize=True)
    step()
    for params in (twins.ours, twins.theirs):
        params.reverse()
    twins.sgd.param_groups[0]["params"].reverse()
    twins.step([randn(4, 5), randn(33)])
    twins.check()


@needs_kernels
def test_memory_that_is_swapped_for_another_dtype():
    twins = Twins([randn(33), randn(7)], momentum=0.9)
    twins.step([randn(33), randn(7)])
    for params, state in ((twins.ours, twins.optimizer.state), (twins.theirs, twins.sgd.state)):
        for param in params:
            param.grad = None
            param.data = param.data.double()
            state[param]["momentum_buffer"] = state[param]["momentum_buffer"].double()
    twins.step([randn(33, dtype=torch.float64), randn(7, dtype=torch.float64)])
    twins.check()


@needs_kernels
def test_a_loaded_state(only_kernel):
    x, y = randn(16, 5), randn(16, 3)

    def train(net, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (net(x) - y).square().sum().backward()
            optimizer.step()

    def make(cls):
        torch.manual_seed(0)
        with torch.device("cpu"):
            net = nn.Linear(5, 3)
        return net, cls(net.parameters(), lr=0.01, momentum=0.9)

    (net, optimizer), (its_net, sgd) = make(ProjectedSGD), make(torch.optim.SGD)
    for n, o in ((net, optimizer), (its_net, sgd)):
        train(n, o, 3)
        saved = o.state_dict()
        train(n, o, 2)
        o.load_state_dict(saved)
        train(n, o, 3)
    for a, b in zip(net.parameters(), its_net.parameters(), strict=True):
        assert_same_bits(a, b)


@needs_kernels
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1, "maximize": True}])
def test_under_grad_scaler(only_kernel, shape, options):
    """As torch.optim.SGD with the gradients that GradScaler.unscale_ leaves; 2048 is a power of two."""
    twins = Twins([randn(1500), randn(7), randn(3, dtype=torch.float64)], **options)
    scale, fine, overflow = (torch.full(shape, value, device="cpu") for value in (2048.0, 0.0, 1.0))

    def step(found_inf):
        for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
            theirs.grad = torch.randn_like(theirs)
            ours.grad = theirs.grad * 2048
        twins.optimizer.step(grad_scale=scale, found_inf=found_inf)

    step(overflow)
    assert not twins.optimizer.state
    twins.check()  # neither has stepped
    for _ in range(2):
        step(fine)
        twins.sgd.step()
        twins.check()
        for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
            assert_same_bits(ours.grad, theirs.grad)
        step(overflow)
        twins.check()
    for ours, theirs in zip(twins.ours, twins.theirs, strict=True):  # unscaled by the user before
        ours.grad = theirs.grad = torch.randn_like(theirs)
    twins.optimizer.step(found_inf=fine)
    twins.sgd.step()
    twins.check()


def non_contiguous(tensor):
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


OTHERS = {
    "bfloat16": ([torch.ones(5, dtype=torch.bfloat16)], lambda t: torch.full_like(t, 0.3), {}),
    "float16": ([torch.ones(5, dtype=torch.float16)], lambda t: torch.full_like(t, 0.3), {}),
    "complex": ([torch.ones(5, dtype=torch.complex64)], lambda t: torch.full_like(t, 0.3 + 1j), {}),
    "sparse": ([torch.ones(4, 3)], lambda t: (torch.eye(4, 3) * 0.3).to_sparse(), {"weight_decay": 0.0}),
    "transposed": ([torch.arange(12.0).reshape(3, 4).t()], lambda t: torch.full_like(t, 0.3), {}),
    "strided gradient": ([torch.ones(5, 3)], lambda t: non_contiguous(torch.full_like(t, 0.3)), {}),
    "channels last": (
        [torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last)],
        lambda t: torch.full_like(t, 0.3),
        {},
    ),
    "one of several": ([torch.ones(5), torch.ones(5).bfloat16()], lambda t: torch.full_like(t, 0.3), {}),
    "lr": ([torch.ones(5)], lambda t: torch.full_like(t, 0.3), {"lr": torch.tensor(0.1)}),
    "foreach": ([torch.ones(5), torch.ones(70)], lambda t: torch.full_like(t, 0.3), {"foreach": True}),
    "fused": ([torch.ones(5), torch.ones(70)], lambda t: torch.full_like(t, 0.3), {"fused": True}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_pytorch_itself_steps(calls, name):
    tensors, grad_of, options = OTHERS[name]
    twins = Twins(tensors, **{"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01} | options)
    for _ in range(3):
        twins.step([grad_of(tensor) for tensor in tensors])
        twins.check()
    assert len(calls) == 3
    assert calls[0]["foreach"] == options.get("foreach") and calls[0]["fused"] == options.get("fused")


@pytest.mark.parametrize("name", ["bfloat16", "sparse", "transposed", "fused", "foreach"])
def test_what_pytorch_itself_steps_under_grad_scaler(name):
    tensors, grad_of, options = OTHERS[name]
    twins = Twins(tensors, **{"momentum": 0.9} | options)
    for _ in range(2):
        for found_inf in (1.0, 0.0):
            before = [ours.detach().clone() for ours in twins.ours]
            for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
                ours.grad, theirs.grad = grad_of(theirs.detach()) * 64, grad_of(theirs.detach())
            twins.optimizer.step(grad_scale=torch.tensor(64.0), found_inf=torch.tensor(found_inf))
            if found_inf:
                assert all(torch.equal(a, b) for a, b in zip(before, twins.ours, strict=True))
            else:
                twins.sgd.step()
                twins.check()
                for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
                    assert torch.equal(ours.grad.to_dense(), theirs.grad.to_dense())


def test_buffers_of_which_some_are_new_with_foreach():
    """In half precision its roundings depend on that."""
    twins = Twins([randn(50).bfloat16(), randn(50).bfloat16()], momentum=0.9, dampening=0.5, foreach=True)
    for t in range(4):
        twins.step([randn(50).bfloat16(), randn(50).bfloat16() if t >= 2 else None])
        twins.check()


def test_buffers_of_which_some_are_new_with_fused(calls):
    """Which torch.optim.SGD(fused=True) itself cannot."""
    for fused in (True, None):
        params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(4))]
        optimizer = Ours(params, lr=0.5, momentum=0.5, fused=fused)
        params[0].grad = torch.ones(5)
        optimizer.step()
        params[1].grad = torch.ones(4)
        optimizer.step()
        assert torch.equal(params[0], torch.full((5,), -0.25)) and torch.equal(params[1], torch.full((4,), 0.5))


@needs_kernels
def test_tensors_that_share_memory(calls, threads):
    """One after the other, as torch.optim.SGD steps them."""
    for n in (50, 40000):
        memory = randn(2, n)
        pairs = []
        for _ in range(2):
            whole = memory.clone()
            pairs.append([nn.Parameter(whole.view(-1)[: n + n // 2]), nn.Parameter(whole.view(-1)[n // 2 :])])
        ours, theirs = pairs
        optimizer, sgd = Ours(ours, lr=0.1, weight_decay=0.1), torch.optim.SGD(theirs, lr=0.1, weight_decay=0.1)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = randn(*a.shape)
            b.grad = a.grad.clone()
        optimizer.step()
        sgd.step()
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bits(a, b)
    assert len(calls) == 1


@needs_kernels
def test_subclasses_of_tensors_are_left_to_pytorch(calls):
    class Logged(nn.Parameter):
        pass

    param = Logged(randn(5))
    param.grad = randn(5)
    Ours([param], lr=0.1).step()
    assert len(calls) == 1


@needs_kernels
def test_while_it_is_compiled_pytorch_makes_the_step(calls, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    twins = Twins([randn(5)], momentum=0.9)
    for _ in range(2):
        twins.step([randn(5)])
    twins.check()
    assert len(calls) == 2


@needs_kernels
def test_autograd_knows_that_weights_changed(only_kernel):
    weight = nn.Parameter(randn(5))
    loss = weight.square().sum()
    weight.grad = randn(5)
    Ours([weight], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernels
def test_an_addition_whose_roundings_differ(calls, monkeypatch):
    """Then no build of the kernel has PyTorch's bits."""
    monkeypatch.setattr(cpu, "add_is_fma", lambda: None)
    twins = Twins([randn(5)], momentum=0.9)
    twins.step([randn(5)])
    twins.check()
    assert len(calls) == 1


@needs_kernels
def test_bad_arguments_of_the_kernel():
    kernel = _library.module.step
    weight = torch.ones(3, device="cpu")
    grad, buffer = weight.clone(), weight.clone()
    with pytest.raises(TypeError, match="expected 3 arguments, got 1"):
        kernel([])
    with pytest.raises(TypeError, match="plain: expected a list, got tuple"):
        kernel((), [], True)
    with pytest.raises(TypeError, match="heads: expected a list, got NoneType"):
        kernel([], None, True)
    hyper = Hyperparameters(lr=0.1, momentum=0.9)
    good = PlainStep([weight], [grad], [buffer], False, hyper)
    bad = {
        "params": [[None], [3], ["w"], [weight.double()], [torch.ones(3, device="meta")], [], (weight,), None],
        "grads": [[None], [torch.ones(4)], [torch.ones(3, 1)], [grad.double()], [grad.int()], [], [grad, grad]],
        "momentum_buffers": [[None], [torch.ones(2)], [buffer.half()], [], [buffer, buffer]],
        "first_step": [None, 1],
        "grad_scale": [None, "1"],
        "hyper": [None, *(replace(hyper, lr=lr) for lr in ("0.1", None, torch.tensor(0.1), 10**400))],
    }
    for name, values in bad.items():
        for value in values:
            assert kernel([replace(good, **{name: value})], [], True) is False
            assert kernel([good, replace(good, **{name: value})], [], True) is False
    assert kernel([object()], [], True) is kernel([], [object()], True) is False
    assert all(torch.equal(t, torch.ones(3)) for t in (weight, grad, buffer))
    assert kernel([good], [], True) is True
    assert not torch.equal(weight, torch.ones(3))
