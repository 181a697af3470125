"""Every public function refuses what it cannot take: the argument is named, what it was and what was expected.

Nothing is changed by a refused call.
"""

import pytest
import torch
from torch import nn

import mla_ext
from mla_ext import ProjectedSGD, ops
from mla_ext.reference import Hyperparameters

f32, f64 = torch.float32, torch.float64


def ones(*shape, dtype=f32, device="cpu"):
    return torch.ones(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (ones(3), ValueError, r"features: expected shape \(N, s\), got a \(3,\) float32 tensor on cpu"),
        (ones(0, 3), ValueError, r"features: expected at least one element .* got a \(0, 3\)"),
        (ones(3, 0), ValueError, r"features: expected at least one element"),
        (
            ones(2, 3, dtype=torch.int64),
            TypeError,
            r"features: expected a dense \(N, s\) tensor of float32 or .* int64",
        ),
        (ones(2, 3).to_sparse(), TypeError, "features: expected a dense .* sparse_coo"),
        (ones(2, 3, dtype=torch.complex64), TypeError, "features: .* complex64"),
        ([[1.0]], TypeError, r"features: .* got list \[\[1.0\]\]"),
    ],
)
def test_feature_mean(features, error, message):
    with pytest.raises(error, match=message):
        ops.feature_mean(features)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"projection": ones(3, 4)}, ValueError, r"projection: expected a square matrix \(s, s\), got a \(3, 4\)"),
        ({"projection": ones(9)}, ValueError, r"projection: expected shape \(s, s\)"),
        ({"projection": ones(0, 0)}, ValueError, "projection: expected at least one element"),
        ({"projection": ones(3, 3, dtype=torch.float16)}, TypeError, "projection: .* float32 or float64.* float16"),
        ({"feature_mean": ones(4)}, ValueError, r"feature_mean: expected shape \(3,\), got a \(4,\)"),
        ({"feature_mean": ones(3, dtype=f64)}, TypeError, "feature_mean: .* float32, got .* float64"),
        (
            {"feature_mean": ones(3, device="meta")},
            ValueError,
            "feature_mean: expected a tensor on cpu, got .* on meta",
        ),
        ({"feature_mean": None}, TypeError, "feature_mean: .* got NoneType None"),
        ({"alpha": 0.0}, ValueError, "alpha: expected a finite number > 0, got 0.0"),
        ({"alpha": -1}, ValueError, "alpha: expected a finite number > 0, got -1"),
        ({"alpha": float("nan")}, ValueError, "alpha: .* got nan"),
        ({"alpha": "0.1"}, TypeError, "alpha: expected a number > 0, got str '0.1'"),
        ({"alpha": True}, TypeError, "alpha: expected a number"),
        ({"alpha": ones(2)}, TypeError, "alpha: expected a number or a one-element floating tensor"),
        ({"forget": 1.5}, ValueError, r"forget: expected a finite number in \[0, 1\], got 1.5"),
        ({"normalize": 1}, TypeError, "normalize: expected True or False, got int 1"),
        ({"backend": "fast"}, ValueError, "backend: expected 'auto' or one of .*'cpu'.* got 'fast'"),
    ],
)
def test_rls_update(change, error, message):
    arguments = {"projection": torch.eye(3), "feature_mean": ones(3)} | change
    before = arguments["projection"].clone()
    with pytest.raises(error, match=message):
        ops.rls_update_(**arguments)
    assert torch.equal(arguments["projection"], before)


def head_step_arguments(**change):
    return {
        "weight": ones(2, 3),
        "grad": ones(2, 3),
        "momentum_buffer": ones(2, 3),
        "projection": torch.eye(3),
        "feature_mean": ones(3),
        "step": torch.zeros(()),
        "hyper": Hyperparameters(momentum=0.9),
    } | change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": ones(6)}, ValueError, r"weight: expected shape \(C, s\), got a \(6,\)"),
        ({"weight": ones(2, 0)}, ValueError, "weight: expected at least one element"),
        ({"weight": ones(2, 3, dtype=torch.int32)}, TypeError, "weight: .* int32"),
        ({"grad": ones(3, 2)}, ValueError, r"grad: expected shape \(2, 3\), got a \(3, 2\)"),
        ({"grad": ones(2, 3, dtype=f64)}, TypeError, "grad: .* float32, got .* float64"),
        ({"grad": ones(2, 3).to_sparse()}, TypeError, "grad: expected a dense"),
        ({"grad": ones(2, 3, dtype=torch.complex64)}, TypeError, "grad: .* complex64"),
        ({"grad": ones(2, 3, device="meta")}, ValueError, "grad: expected a tensor on cpu, got .* on meta"),
        ({"grad": None}, TypeError, "grad: .* NoneType"),
        ({"momentum_buffer": None}, ValueError, r"momentum_buffer: expected a \(2, 3\) .* with momentum 0.9, got None"),
        ({"momentum_buffer": ones(3)}, ValueError, "momentum_buffer: expected shape"),
        ({"projection": torch.eye(4)}, ValueError, r"projection: expected shape \(3, 3\), got a \(4, 4\)"),
        ({"projection": torch.eye(3, dtype=f64)}, TypeError, "projection: .* float32, got .* float64"),
        ({"feature_mean": ones(2)}, ValueError, r"feature_mean: expected shape \(3,\)"),
        ({"step": 0}, TypeError, "step: .* got int 0"),
        ({"step": ones(1)}, ValueError, r"step: expected shape \(\)"),
        ({"grad_scale": ones(2)}, ValueError, r"grad_scale: expected shape \(\)"),
        ({"found_inf": 1.0}, TypeError, "found_inf: .* got float 1.0"),
        (
            {"hyper": Hyperparameters(lr=float("inf"), momentum=0.9)},
            ValueError,
            "lr: expected a finite number, got inf",
        ),
        (
            {"weight": ones(1, 3).expand(2, 3)},
            ValueError,
            "weight: expected a tensor of its own elements, got .* expanded",
        ),
        ({"projection": ones(1, 3).expand(3, 3)}, ValueError, "projection: expected a tensor of its own elements"),
        ({"momentum_buffer": ones(1, 3).expand(2, 3)}, ValueError, "momentum_buffer: expected a tensor of its own"),
        ({"backend": "none"}, ValueError, "backend: "),
    ],
)
def test_head_step(change, error, message):
    arguments = head_step_arguments(**change)
    tensors = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=message):
        ops.head_step_(**arguments)
    for name, value in tensors.items():
        if value.device.type == "cpu":
            assert torch.equal(arguments[name].to_dense(), value.to_dense()), name


@pytest.mark.parametrize(
    ("logits", "present", "error", "message"),
    [
        (ones(3, 4), None, ValueError, r"logits: expected shape \(M, N, C\), got a \(3, 4\)"),
        (ones(0, 3, 4), None, ValueError, "logits: expected at least one modality and one class"),
        (ones(2, 3, 0), None, ValueError, "logits: expected at least one modality and one class"),
        (ones(2, 3, 4, dtype=torch.int64), None, TypeError, "logits: .* int64"),
        (ones(2, 3, 4), ones(2, 3), TypeError, "present: .* bool, got .* float32"),
        (ones(2, 3, 4), ones(3, 2, dtype=torch.bool), ValueError, r"present: expected shape \(2, 3\), got a \(3, 2\)"),
        (ones(2, 3, 4), ones(2, 3, dtype=torch.bool, device="meta"), ValueError, "present: expected a tensor on cpu"),
        ("logits", None, TypeError, "logits: .* got str 'logits'"),
    ],
)
def test_entropy_fusion(logits, present, error, message):
    with pytest.raises(error, match=message):
        mla_ext.entropy_fusion(logits, present)


@pytest.mark.parametrize("fusion", [mla_ext.entropy_fusion, mla_ext.calibrated_fusion])
@pytest.mark.parametrize(
    ("temperatures", "error", "message"),
    [
        (ones(3), ValueError, r"temperatures: expected shape \(2,\), got a \(3,\)"),
        (ones(2, 1), ValueError, r"temperatures: expected shape \(2,\)"),
        (ones(2, dtype=torch.int64), TypeError, "temperatures: .* int64"),
        (ones(2, device="meta"), ValueError, "temperatures: expected a tensor on cpu"),
        ([1.0, 1.0], TypeError, "temperatures: .* got list"),
        *(
            (torch.tensor([1.0, T]), ValueError, "temperatures: expected finite numbers > 0, got .1.0, ")
            for T in (0.0, -1.0, float("nan"), float("inf"))
        ),
    ],
)
def test_temperatures(fusion, temperatures, error, message):
    with pytest.raises(error, match=message):
        fusion(ones(2, 3, 4), temperatures=temperatures)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": float("nan")}, ValueError, "lr: expected a finite number >= 0, got nan"),
        ({"lr": -0.1}, ValueError, "lr: .* got -0.1"),
        ({"lr": "fast"}, TypeError, "lr: .* got str 'fast'"),
        ({"lr": 10**400}, ValueError, "lr: expected a finite number >= 0, got 1000"),
        ({"momentum": -0.5}, ValueError, "momentum: "),
        ({"dampening": float("inf")}, ValueError, "dampening: "),
        ({"weight_decay": -1}, ValueError, "weight_decay: "),
        ({"nesterov": True}, ValueError, "nesterov: expected a momentum > 0 and dampening 0 with it"),
        ({"alpha": -0.1}, ValueError, "alpha: expected a finite number > 0, got -0.1"),
        ({"forget": -0.1}, ValueError, "forget: "),
        ({"absorb": "during"}, ValueError, "absorb: expected 'after' or 'before', got 'during'"),
        ({"maximize": "yes"}, TypeError, "maximize: expected True or False, got str 'yes'"),
        ({"capturable": 1}, TypeError, r"capturable: expected one of \(True, False\), got int 1"),
        ({"foreach": "yes"}, TypeError, "foreach: expected one of .* got str 'yes'"),
        ({"foreach": True, "fused": True}, ValueError, "fused: expected False or None with foreach=True, got True"),
        ({"differentiable": True}, ValueError, "differentiable: expected False, .* got True"),
        ({"backend": "gpu"}, ValueError, "backend: expected 'auto' or one of .* got 'gpu'"),
        ({"process_group": "remote"}, ValueError, "process_group: expected .* 'local', got 'remote'"),
        ({"process_group": 5}, ValueError, "process_group: expected .* 'local', got 5"),
    ],
)
def test_projected_sgd(change, error, message):
    with pytest.raises(error, match=message):
        ProjectedSGD(nn.Linear(3, 2).parameters(), **change)


def test_add_param_group_is_checked_before_it_is_added():
    optimizer = ProjectedSGD(nn.Linear(3, 2).parameters())
    with pytest.raises(ValueError, match="alpha: expected a finite number > 0, got 0"):
        optimizer.add_param_group({"params": nn.Linear(3, 2).parameters(), "alpha": 0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (nn.Conv1d(3, 2, 1), TypeError, "head: expected an nn.Linear or nn.Conv2d, got Conv1d"),
        (nn.Linear(3, 2), ValueError, r"head.weight: expected a parameter of this optimizer, got a \(2, 3\)"),
        (torch.ones(2, 3), TypeError, "head: expected an nn.Linear or nn.Conv2d, got Tensor"),
    ],
)
def test_attach(head, error, message):
    optimizer = ProjectedSGD(nn.Linear(3, 2).parameters())
    with pytest.raises(error, match=message):
        optimizer.attach(head)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (ones(4, 2), ValueError, r"features: expected shape \(N, 3\), got a \(4, 2\)"),
        (ones(3), ValueError, r"features: expected shape \(N, 3\)"),
        (ones(0, 3), ValueError, "features: expected at least one element"),
        (ones(4, 3, device="meta"), ValueError, "features: expected a tensor on cpu"),
        (ones(4, 3, dtype=torch.int64), TypeError, "features: .* int64"),
    ],
)
def test_observe(features, error, message):
    head = nn.Linear(3, 2)
    optimizer = ProjectedSGD(head.parameters())
    with pytest.raises(error, match=message):
        optimizer.observe(head.weight, features)
    assert not optimizer._observed and not optimizer.state


def test_weights_that_cannot_be_projected():
    head = nn.Linear(3, 2)
    optimizer = ProjectedSGD(head.parameters())
    with pytest.raises(ValueError, match=r"weight: expected shape \(C, s\), got a \(2,\)"):
        optimizer.observe(head.bias, ones(4, 3))
    with pytest.raises(ValueError, match="weight: expected a parameter of this optimizer"):
        optimizer.observe(nn.Parameter(ones(2, 3)), ones(4, 3))
    with pytest.raises(ValueError, match="weight: expected a weight that was attached or observed"):
        optimizer.projection(head.weight)
    with pytest.raises(ValueError, match="weight: expected a weight that was attached or observed, got str"):
        optimizer.projection("head")
    complex_head = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"head.weight: .* complex64"):
        ProjectedSGD(complex_head.parameters()).attach(complex_head)


def test_the_raw_ops_check_what_they_touch():
    step = torch.ops.mla_ext.head_step_
    rest = (0.1, 0.0, 0.0, 0.0, False, False, 0.1, 0.0, False, False, None, None)
    with pytest.raises(RuntimeError, match="base: the shape does not fit"):
        step(ones(2, 3), ones(2, 3), None, torch.eye(4), *4 * (None,), torch.zeros(()), *rest)
    with pytest.raises(RuntimeError, match="grad: the shape does not fit"):
        step(ones(2, 3), ones(3, 2), None, torch.eye(3), *4 * (None,), torch.zeros(()), *rest)
    with pytest.raises(RuntimeError, match="weight: expected a contiguous tensor"):
        step(ones(3, 2).T, ones(2, 3), None, torch.eye(3), *4 * (None,), torch.zeros(()), *rest)
    with pytest.raises(RuntimeError, match="present: the dtype does not fit"):
        torch.ops.mla_ext.entropy_fusion(ones(2, 3, 4), ones(2, 3))
    with pytest.raises(RuntimeError, match="features: expected a non-empty"):
        torch.ops.mla_ext.feature_mean(ones(0, 3))
