"""The Triton kernels: in Triton's interpreter against the reference, and compiled ahead of time for several GPUs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch

import mla_ext
from mla_ext import _library, backends
from mla_ext.checks import has_momentum
from mla_ext.projection import Projection
from mla_ext.reference import Hyperparameters, accumulate_dtype
from mla_ext.step import HeadStep

# Triton 3.9 announces that 3.10 will contract to fma no longer; the kernels are right either way.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

TESTS = Path(__file__).resolve().parent
INSTALLED = Path(mla_ext.__file__).resolve().parents[1]  # the folder that mla_ext is in
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

# KiB of shared memory that a block may have.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}


def run(*command, path=INSTALLED, **environment):
    """Runs Python with the mla_ext in `path`."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(path), str(TESTS)]), **environment}
    return helpers.run(sys.executable, *command, cwd=TESTS, **environment)


# The interpreter takes a millisecond for each operation of each program: small sizes, but of several programs each.
SUITE = "triton and not (513 or 257 or 130 or 1000 or deterministic) and not (test_head_step and 1-1-1)"
RANK_SUITE = (
    "triton and not (90-64 or 150-100 or 7-2-4 or (320 and not before_forget)"
    " or (40-33-4 and not (before_forget or momentum)) or (test_numbers and -33-))"
)
SCALE_SUITE = "triton and not features and not dtype1 and not dtype2"
SPOT_CHECKS = """
import torch
from mla_ext import ops, reference
from mla_ext.reference import Hyperparameters

def check(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

generator = torch.Generator().manual_seed(0)
randn = lambda *shape: torch.randn(*shape, generator=generator)

from mla_ext.triton_kernels import head_step

# The three ways to make Z: sums, tl.dot, torch.mm; and numbers that are read from tensors.
head_step.DOT_FROM = 0
for C, absorb in ((5, "after"), (20, "after"), (20, "before"), (70, "after"), (70, "before")):
    W, G, M, P, h = randn(C, 20), randn(C, 20), randn(C, 20), torch.eye(20), randn(20)
    assert head_step.product_by_mm(C, 20) == (C == 70)
    numbers = {"momentum": 0.9, "absorb": absorb, "forget": 0.1}
    tensors = {"lr": torch.tensor(0.3), "alpha": torch.tensor(0.2, dtype=torch.float64)}
    hyper, step = Hyperparameters(**numbers, **tensors), torch.ones(())
    expected = reference.head_step(W, G, M, P, h, step, Hyperparameters(lr=0.3, alpha=0.2, **numbers))
    ops.head_step_(W, G, M, P, h, step, hyper, backend="triton")
    for actual, wanted in zip((W, M, P), expected):
        check(actual, wanted)
    assert step == 2
    ops.head_step_(W, G, M, P, None, step, hyper, backend="triton")  # nothing to absorb
    W_0, M_0, P_0 = expected
    expected = reference.head_step(W_0, G, M_0, P_0, None, torch.ones(()), Hyperparameters(lr=0.3, **numbers))
    for actual, wanted in zip((W, M, P), expected):
        check(actual, wanted)
    assert step == 3

# Every column tile of the update, of the sums in "before" and of the logits is followed by another.
W, G, P, h = randn(1, 1030), randn(1, 1030), torch.eye(1030), randn(1030)
expected = reference.head_step(W, G, None, P, h, torch.zeros(()), Hyperparameters(absorb="before"))
head_step.UPDATE_ROWS = 256  # fewer programs for the interpreter
ops.head_step_(W, G, None, P, h, torch.zeros(()), Hyperparameters(absorb="before"), backend="triton")
check(W, expected[0]), check(P, expected[2])
assert torch.equal(P, P.T)
logits = 5 * randn(2, 2, 1030)
logits[0, 0, :1024] = -torch.inf
for actual, wanted in zip(ops.entropy_fusion(logits, backend="triton"), reference.entropy_fusion(logits)):
    assert torch.equal(actual.isnan(), wanted.isnan())
    check(actual.nan_to_num(), wanted.nan_to_num())

# A compression in several tiles of everything.
from mla_ext.projection import Projection
from mla_ext.triton_kernels import rank_step
rank_step.PAIRS, rank_step.ANGLES, rank_step.BLOCK_R, rank_step.GRAM_BLOCK = 4, 8, 16, 8
R, s = 19, 70
K, h, W, count = randn(R - 1, s) / s, randn(s), randn(2, s), torch.tensor(R - 1)
rows = torch.cat([K, torch.full((1, s), torch.nan)])
P = Projection(None, torch.ones(()), rows, count)
step = ops.HeadStep(W, randn(2, s), None, P, h, torch.zeros(()), Hyperparameters())
beta, K = reference.rank_compress(*reference.rank_update(torch.ones(()), K, h), R // 2)
rank_step.rank_step_(step)
assert count == R // 2
check(P.beta, beta), check(P.dense(), beta * torch.eye(s) - K.T @ K)

# A mean that cannot be absorbed, here since d is NaN or infinite, leaves P alone and still steps the weights.
for absorb, value in (("after", torch.nan), ("before", torch.nan), ("after", 1e25), ("before", 1e25)):
    W, G, P, h, step = randn(3, 9), randn(3, 9), torch.eye(9), torch.full((9,), value), torch.zeros(())
    expected = W - 0.1 * G
    hyper = Hyperparameters(lr=0.1, absorb=absorb, normalize=True, forget=0.1)
    ops.head_step_(W, G, None, P, h, step, hyper, backend="triton")
    check(W, expected)
    assert torch.equal(P, torch.eye(9))
    assert step == 1
"""


def test_the_parity_suite_in_the_interpreter():
    result = run(
        *("-m", "pytest", "-q", "-p", "triton_interpreter", "test_ops.py", "-k", SUITE),
        TRITON_INTERPRET="1",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 100


def test_the_rank_form_in_the_interpreter():
    result = run(
        *("-m", "pytest", "-q", "-p", "triton_interpreter", "test_rank_backends.py", "-k", RANK_SUITE),
        TRITON_INTERPRET="1",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 25


def test_a_scaled_alpha_in_the_interpreter():
    result = run(
        *("-m", "pytest", "-q", "-p", "triton_interpreter", "test_alpha_scale.py", "-k", SCALE_SUITE),
        TRITON_INTERPRET="1",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 10


def test_what_the_parity_suite_is_too_small_for():
    result = run("-W", "ignore", "-c", SPOT_CHECKS, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


WITHOUT_LIBRARY = """
import torch, mla_ext
from mla_ext import backends, reference
assert mla_ext.build_info()["backends"] == ["triton", "reference"], mla_ext.build_info()
torch.manual_seed(0)
head = torch.nn.Linear(5, 3)
optimizer = mla_ext.ProjectedSGD(head.parameters(), lr=0.1, alpha_scale=None)
optimizer.attach(head)
x = torch.randn(4, 5)
head(x).square().sum().backward()
expected = head.weight.detach() - 0.1 * head.weight.grad
optimizer.step()
torch.testing.assert_close(head.weight.detach(), expected)
torch.testing.assert_close(optimizer.projection(head.weight), reference.rls_update(torch.eye(5), x.mean(0)))
heads = [torch.nn.Linear(12, 3) for _ in "ab"]
heads[1].load_state_dict(heads[0].state_dict())
kinds = [{}, {"backend": "reference"}]
options = {"lr": 0.1, "momentum": 0.9, "rank": 4}
optimizers = [mla_ext.ProjectedSGD(h.parameters(), **options, **kind) for h, kind in zip(heads, kinds)]
for head, optimizer in zip(heads, optimizers):
    optimizer.attach(head)
for t in range(5):
    x = torch.randn(4, 12)
    for head, optimizer in zip(heads, optimizers):
        optimizer.zero_grad()
        head(x).square().sum().backward()
        optimizer.step()
torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=1e-4, atol=1e-5)
P, expected = (optimizer.projection(head.weight) for head, optimizer in zip(heads, optimizers))
torch.testing.assert_close(P, expected, rtol=1e-4, atol=1e-5)
logits = torch.randn(2, 3, 4)
torch.testing.assert_close(mla_ext.entropy_fusion(logits), reference.entropy_fusion(logits))
"""


def test_an_installation_without_compiled_libraries_runs_on_triton(tmp_path):
    shutil.copytree(
        INSTALLED / "mla_ext", tmp_path / "mla_ext", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    )
    result = run("-W", "ignore", "-c", WITHOUT_LIBRARY, path=tmp_path, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


def test_importing_the_package_does_not_load_triton():
    result = run("-c", "import mla_ext, sys; mla_ext.build_info(); assert 'triton' not in sys.modules")
    assert result.returncode == 0, result.stderr


class Driver:
    """Stands in for the driver of a GPU that is not here."""

    def __init__(self, target=None, device_type="cuda"):
        self.target, self.device_type = target, device_type

    def get_active_torch_device(self):
        return torch.device(self.device_type, 0)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self  # kernels are cached by device

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def fresh():
    backends.triton._unusable.cache_clear()
    yield
    backends.triton._unusable.cache_clear()


def test_without_the_cuda_library_a_gpu_runs_on_triton(monkeypatch, fresh):
    monkeypatch.setattr(_library, "cuda_load_error", "mla_ext was built without CUDA")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    assert backends.choose("auto", CUDA) is backends.BACKENDS["triton"]
    assert backends.choose("triton", CUDA) is backends.BACKENDS["triton"]


def test_another_kind_of_gpu_is_told_apart(monkeypatch, fresh):
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(device_type="xpu"))
    with pytest.raises(RuntimeError, match="Triton compiles for xpu tensors here"):
        backends.choose("triton", CUDA)


def test_an_older_triton_is_not_taken(monkeypatch, fresh):
    """Its language lacks what the kernels use."""
    monkeypatch.setattr(_library, "cuda_load_error", "the compiled kernels need PyTorch >= 2.10")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert backends.BACKENDS["triton"].unusable(CUDA).startswith("Triton >= 3.6 is needed")
    assert backends.choose("auto", CUDA) is backends.BACKENDS["reference"]


def test_reasons_why_it_cannot_run(monkeypatch, fresh):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        backends.choose("triton", CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in backends.BACKENDS["triton"].unusable(CUDA)
    monkeypatch.setattr(_library, "cuda_load_error", "mla_ext was built without CUDA")
    assert backends.choose("auto", CUDA) is backends.BACKENDS["reference"]


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """Sets the target that launches compile for, without running; returns the list that collects (name, kernel)."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    launches = []
    launch = triton.runtime.jit.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel.fn.__name__, launch(kernel, *args, grid=grid, warmup=True, **kwargs)))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile_only)

    def choose(target):
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(target))
        monkeypatch.setattr(torch.version, "cuda", "13.0" if target.backend == "cuda" else None)
        return launches

    yield choose
    torch.set_float32_matmul_precision("highest")


def head_step(C, s, dtype, hyper, scaled=False):
    from mla_ext import triton_kernels

    like = {"dtype": accumulate_dtype(dtype)}
    weight, grad = torch.zeros(2, C, s, dtype=dtype)
    momentum_buffer = torch.zeros(C, s, **like) if has_momentum(hyper.momentum) else None
    scale, overflow = (torch.ones(()), torch.zeros(())) if scaled else (None, None)
    tensors = (weight, grad, momentum_buffer, torch.eye(s, **like), torch.zeros(s, **like), torch.zeros(()))
    triton_kernels.head_step_(*tensors, hyper, scale, overflow, torch.zeros((), **like) if scaled else None)


def rank_step(C, s, R, dtype, hyper, scaled=False):
    from mla_ext import triton_kernels

    like = {"dtype": accumulate_dtype(dtype)}
    weight, grad = torch.zeros(2, C, s, dtype=dtype)
    momentum_buffer = torch.zeros(C, s, **like) if has_momentum(hyper.momentum) else None
    scaling = (torch.ones(()), torch.zeros(())) if scaled else (None, None)
    P = Projection.identity(s, R, 0, like["dtype"], CPU)
    P.nu = torch.zeros((), **like) if scaled else None
    triton_kernels.rank_step_(
        HeadStep(weight, grad, momentum_buffer, P, torch.zeros(s, **like), torch.zeros(()), hyper, *scaling)
    )


def entropy_fusion(M, N, C, dtype=torch.float32):
    from mla_ext import triton_kernels

    triton_kernels.entropy_fusion(torch.zeros(M, N, C, dtype=dtype), torch.ones(M, N, dtype=torch.bool))


def feature_mean(N, s, dtype=torch.float32):
    from mla_ext import triton_kernels

    triton_kernels.feature_mean(torch.zeros(N, s, dtype=dtype))


def spilled_bytes(kernel, folder):
    """Of registers that went to memory: AMD's assembly tells, and a cubin by its stack, else unused."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])[1])
    tool = Path(triton.knobs.nvidia.ptxas.path).with_name("cuobjdump")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()))


@pytest.mark.parametrize("name", TARGETS)
def test_every_kernel_compiles_and_fits(name, compile_for, tmp_path):
    target, shared_kib = TARGETS[name]
    launches = compile_for(target)
    head_step(6, 512, torch.float32, Hyperparameters(momentum=0.9, lr=torch.zeros(()), alpha=torch.zeros(())), True)
    head_step(100, 513, torch.bfloat16, Hyperparameters(absorb="before", normalize=True, forget=0.1))
    feature_mean(64, 512, torch.float16)
    entropy_fusion(3, 5, 100)
    rank_step(6, 4096, 64, torch.float32, Hyperparameters(momentum=0.9, lr=torch.zeros(())), True)
    head_step(20, 2048, torch.float32, Hyperparameters(momentum=0.9))
    if name in ("sm_90", "gfx942"):
        head_step(100, 512, torch.float64, Hyperparameters(absorb="before"))
        head_step(8, 2048, torch.float64, Hyperparameters())
        head_step(20, 2048, torch.float64, Hyperparameters())
        rank_step(20, 4096, 64, torch.float64, Hyperparameters(absorb="before", forget=0.1))
        entropy_fusion(2, 5, 1000, torch.float64)
    expected = ["product", "finish", "product", "norm", "finish", "feature_mean", "entropy_fusion"]
    expected += ["rows_product", "rank_finish", "absorb", "count_rows", "rotate"]
    assert [kernel.removesuffix("_kernel") for kernel, _ in launches][: len(expected)] == expected
    for kernel, compiled in launches:
        assert compiled.metadata.shared <= shared_kib * 1024, kernel
        assert spilled_bytes(compiled, tmp_path) == 0, kernel


def test_only_the_product_follows_the_precision_setting(compile_for):
    launches = compile_for(GPUTarget("cuda", 80, 32))
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        head_step(20, 2048, torch.float32, Hyperparameters())
        (_, product), (_, finish) = launches[-2:]
        assert ("tf32" in product.asm["ptx"]) == (precision == "high")
        assert "tf32" not in finish.asm["ptx"]
    # k stays full precision beside it: multiplied and added in float32.
    assert re.search(r"fma\.rn\.f32|mul\.f32", product.asm["ptx"])


def test_new_numbers_and_batch_sizes_compile_nothing(compile_for):
    launches = compile_for(GPUTarget("cuda", 90, 32))
    for number in (0.1, 0.2, 1.0):
        head_step(6, 64, torch.float32, Hyperparameters(lr=number, alpha=number, momentum=number, forget=number))
        rank_step(6, 64, 8, torch.float32, Hyperparameters(lr=number, alpha=number, momentum=number, forget=number))
    for number in (0.1, 0.2):
        tensor = torch.tensor(number)
        head_step(6, 64, torch.float32, Hyperparameters(lr=tensor, alpha=tensor))
        rank_step(6, 64, 8, torch.float32, Hyperparameters(lr=tensor, alpha=tensor))
    for N in (1, 16, 17, 1024):
        feature_mean(N, 64)
        entropy_fusion(3, N, 10)
    hashes = {name: {compiled.hash for kernel, compiled in launches if kernel == name} for name, _ in launches}
    # Numbers, or pointers to them; the latter also lack a momentum buffer.
    assert {name: len(found) for name, found in hashes.items()} == {
        "product_kernel": 2,
        "finish_kernel": 2,
        "feature_mean_kernel": 1,
        "entropy_fusion_kernel": 1,
        "rows_product_kernel": 1,
        "rank_finish_kernel": 2,
        "absorb_kernel": 2,
        "count_rows_kernel": 2,
        "rotate_kernel": 1,
    }


@pytest.mark.parametrize(("absorb", "C"), [("after", 6), ("before", 40)])
def test_nobody_waits_for_a_number_on_the_device(absorb, C, compile_for, monkeypatch):
    launches = compile_for(GPUTarget("cuda", 90, 32))
    names = ("lr", "momentum", "dampening", "weight_decay", "alpha", "forget")
    hyper = Hyperparameters(absorb=absorb, **{name: torch.tensor(0.5) for name in names})
    found = []
    for name in ("item", "__float__", "__int__", "__bool__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor: found.append(tensor) or 0.0)
    head_step(C, 64, torch.float32, hyper)
    rank_step(C, 64, 8, torch.float32, hyper)
    assert not found
    # The launches of the rank form are the same in each step: what only some steps need, returns at once in others.
    names = ["product", "finish", "rows_product", "rank_finish", "absorb", "count_rows", "rotate"]
    assert [name.removesuffix("_kernel") for name, _ in launches] == names


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("forget", [0.0, 0.1])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("absorb", ["after", "before"])
def test_a_step_is_two_launches_and_one_more_to_normalize(absorb, normalize, forget, momentum, compile_for):
    launches = compile_for(GPUTarget("cuda", 90, 32))
    hyper = Hyperparameters(absorb=absorb, normalize=normalize, forget=forget, momentum=momentum)
    head_step(6, 64, torch.float32, hyper)
    names = ["product_kernel", *(["norm_kernel"] if normalize else []), "finish_kernel"]
    assert [name for name, _ in launches] == names


def test_the_table_of_accuracies_has_every_operation_and_dtype():
    from benchmarks.stress import parity_table

    page = (TESTS.parent / "docs" / "dev" / "parity.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert rows[0][2:] == ["cpu", "triton", "reference"]
    wanted = [[name, str(dtype)[6:]] for name, (_, dtypes) in parity_table.OPERATIONS.items() for dtype in dtypes]
    assert [row[:2] for row in rows[1:]] == wanted
    operation, _ = parity_table.OPERATIONS["head_step"]
    assert float(parity_table.measure(operation, torch.float32, "cpu")) <= 2
    assert float(parity_table.measure(operation, torch.float32, "reference")) == 1
