"""torch.compile, torch.export and torch.library.opcheck on the compiled ops and on the optimizer that calls them."""

import pytest
import torch
from helpers import batch, needs_kernels, network, randn
from torch import nn
from torch._dynamo.utils import counters

from mla_ext import ProjectedSGD, entropy_fusion

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore"),  # torch's own, about its own
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def graphs():
    return counters["stats"]["unique_graphs"]


def head(dtype, *optional, rows=None, count=None):
    """Arguments of head_step_; `optional` are grad_scale, found_inf and what follows them."""
    C, s = 3, 5
    like = {"dtype": torch.float64 if dtype == torch.float64 else torch.float32}
    weight, grad = randn(2, C, s, dtype=dtype)
    tensors = (weight, grad, torch.zeros(C, s, **like), torch.eye(s, **like), randn(s, **like), torch.zeros(()))
    W, G, M, P, h, step = tensors
    numbers = (0.1, 0.9, 0.0, 0.01, False, False, 0.1, 0.0, True, False)
    return (W, G, M, P, None, rows, count, h, step, *numbers, *(optional or (None, None)))


OPS = torch.ops.mla_ext
SAMPLES = {
    "feature_mean": lambda: (OPS.feature_mean, (randn(4, 5),)),
    "feature_mean_bf16": lambda: (OPS.feature_mean, (randn(4, 5, dtype=torch.bfloat16),)),
    "rls_update_": lambda: (OPS.rls_update_, (torch.eye(5), randn(5), 0.1, 0.0, False)),
    "head_step_": lambda: (OPS.head_step_, head(torch.float32)),
    "head_step_fp16": lambda: (OPS.head_step_, head(torch.float16)),
    "head_step_fp64": lambda: (OPS.head_step_, head(torch.float64)),
    "head_step_tensors": lambda: (
        OPS.head_step_,
        head(torch.float32, torch.ones(()), torch.zeros(()), torch.ones(()), torch.ones(())),
    ),
    "head_step_deferred": lambda: (
        OPS.head_step_,
        head(torch.float32, rows=torch.zeros(4, 5), count=torch.tensor(0)),
    ),
    "settle_": lambda: (OPS.settle_, (torch.eye(5), None, randn(4, 5), torch.tensor(3))),
    "entropy_fusion": lambda: (OPS.entropy_fusion, (randn(2, 3, 4), None)),
    "entropy_fusion_bf16": lambda: (
        OPS.entropy_fusion,
        (randn(2, 3, 4, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bool)),
    ),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample):
    op, arguments = SAMPLES[sample]()
    torch.library.opcheck(op.default, arguments)


def test_every_op_is_checked():
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mla_ext::")}
    assert defined == {SAMPLES[sample]()[0].__name__ for sample in SAMPLES}


class Fusion(nn.Module):
    def forward(self, logits, present):
        return entropy_fusion(logits, present)


def test_entropy_fusion_is_exported_for_any_number_of_samples():
    samples = torch.export.Dim("samples")
    exported = torch.export.export(
        Fusion(),
        (randn(2, 7, 3), torch.ones(2, 7, dtype=torch.bool)),
        dynamic_shapes={"logits": {1: samples}, "present": {1: samples}},
    )
    graphs = [str(module.graph) for module in exported.graph_module.modules() if hasattr(module, "graph")]
    assert "mla_ext.entropy_fusion" in "".join(graphs)
    logits, present = randn(2, 11, 3), randn(2, 11) > 0
    for actual, expected in zip(exported.module()(logits, present), entropy_fusion(logits, present), strict=True):
        assert torch.equal(actual, expected)


def test_entropy_fusion_compiles_without_a_graph_break():
    compiled = torch.compile(entropy_fusion, fullgraph=True, backend="aot_eager")
    logits = randn(2, 7, 3)
    for actual, expected in zip(compiled(logits), entropy_fusion(logits), strict=True):
        assert torch.equal(actual, expected)


def attached(lr, **options):
    model = network()
    optimizer = ProjectedSGD(model.parameters(), lr=lr, **options)
    optimizer.attach(model[2])
    return model, optimizer


def backward(model, x, y):
    nn.functional.cross_entropy(model(x), y).backward()


def assert_same_state(model, optimizer, other_model, other_optimizer):
    optimizer.settle(), other_optimizer.settle()
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        states = [opt.state[p] for opt, p in ((optimizer, a), (other_optimizer, b))]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name])


OPTIONS = {
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "before": {"momentum": 0.9, "nesterov": True, "absorb": "before", "forget": 0.01},
    "plain": {},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_compiled_step_follows_the_scheduler_without_recompiling(options):
    model, optimizer = attached(torch.tensor(0.1), alpha=torch.tensor(0.1), **options)
    shadow, eager = attached(torch.tensor(0.1), alpha=torch.tensor(0.1), **options)
    step = torch.compile(optimizer.step, fullgraph=True, backend="inductor" if "momentum" in options else "aot_eager")
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in (optimizer, eager)]
    compiled_graphs = []
    for t in range(6):
        for net, opt, do_step, scheduler in zip(
            (model, shadow), (optimizer, eager), (step, eager.step), schedulers, strict=True
        ):
            backward(net, *batch(t))
            do_step()
            opt.zero_grad()
            scheduler.step()
            opt.param_groups[0]["alpha"].mul_(0.9)
        assert_same_state(model, optimizer, shadow, eager)
        compiled_graphs.append(graphs())
    # The first step, and one that finds the momentum of the first.
    assert compiled_graphs[1:] == [compiled_graphs[1]] * 5 and compiled_graphs[1] <= 2


def test_a_compiled_training_step_equals_the_eager_one_without_recompiling():
    def train_step(net, opt, x, y):
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    nets, optimizers = zip(*(attached(torch.tensor(0.1), momentum=0.9) for _ in range(2)), strict=True)
    compiled = torch.compile(train_step)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in optimizers]
    seen = []
    for t in range(6):
        losses = [
            do(*arguments, *batch(t)) for do, *arguments in zip((compiled, train_step), nets, optimizers, strict=True)
        ]
        for scheduler in schedulers:
            scheduler.step()
        torch.testing.assert_close(*losses)
        assert_same_state(nets[0], optimizers[0], nets[1], optimizers[1])
        seen.append(graphs())
    assert seen[1:] == [seen[1]] * 5


def test_the_forward_pass_that_records_features_is_one_graph():
    model, optimizer = attached(0.1)
    compiled = torch.compile(lambda x, y: nn.functional.cross_entropy(model(x), y), fullgraph=True)
    for t in range(3):
        x, y = batch(t)
        compiled(x, y).backward()
        (observation,) = optimizer._observed.values()
        torch.testing.assert_close(observation.mean, model[1](model[0](x)).mean(0))
        optimizer.step()
        optimizer.zero_grad()
