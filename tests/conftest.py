"""Fixtures of more than one test file."""

import contextlib
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import harness

from mla_ext import _library

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for benchmarks/, after the mla_ext that is installed

if os.environ.get("MLA_EXT_EMULATED"):  # the dry run of benchmarks/gpu_check.sh
    import emulated

    from mla_ext import backends

    backends.BACKENDS["emulated"] = emulated.Emulated()

with warnings.catch_warnings():  # without the kernels, one of the tests would hear of it
    warnings.simplefilter("ignore")
    for device_type in ("cpu", "cuda"):
        _library.say_once(device_type)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of avdigits.npz, wikipedia.npz and mfeat.npz."""
    named = os.environ.get("MLA_EXT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "avdigits.npz").is_file():
        pytest.skip(f"no real data in {folder}; set MLA_EXT_DATA to the folder of avdigits.npz")
    return folder


@pytest.fixture(params=DEVICES)
def default_device(request) -> str:
    """Each device in turn, as the one that new tensors and modules are made on."""
    with contextlib.nullcontext() if request.param == "cpu" else torch.device(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    """Threads cost more than they save on tiny networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def fast(tmp_path_factory) -> Path:
    """The CUDA kernels' sources on the emulated device."""
    return harness.build(tmp_path_factory.mktemp("fast"), harness.FAST)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory) -> Path:
    return harness.build(tmp_path_factory.mktemp("sanitized"), harness.SANITIZED)


@pytest.fixture(scope="session")
def recorder(tmp_path_factory) -> Path:
    return harness.build_recorder(tmp_path_factory.mktemp("recorder"))
