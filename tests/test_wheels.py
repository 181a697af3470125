"""Wheels with several CUDA libraries: which one is loaded. And what `make wheels` says of a wheel."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.stress import wheels
from mla_ext import _library, build_info

ROOT = Path(__file__).resolve().parents[1]
BUILT = {"12.4": ["sm_80"], "13.0": ["sm_90", "compute_90"]}


@pytest.fixture
def loaded(monkeypatch):
    """The files that load_cuda loads, in an installation with the libraries BUILT."""
    files = []
    monkeypatch.setattr(_library, "load_error", None)
    monkeypatch.setattr(_library, "facts", {"cuda": BUILT, "cuda_reason": ""})
    monkeypatch.setattr(_library, "check_whole", lambda path: None)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: files.append(path.name))
    return files


def load(monkeypatch, pytorch):
    monkeypatch.setattr(torch.version, "cuda", pytorch)
    monkeypatch.setattr(_library, "cuda", _library.choose_cuda(BUILT, pytorch))
    return _library.load_cuda()


@pytest.mark.parametrize(
    ("pytorch", "file", "version"),
    [
        ("12.8", "_C_cuda12.so", "12.4"),
        ("12.1", "_C_cuda12.so", "12.4"),
        ("13.0", "_C_cuda13.so", "13.0"),
        ("13.2", "_C_cuda13.so", "13.0"),
    ],
)
def test_the_library_of_pytorchs_cuda_is_loaded(loaded, monkeypatch, pytorch, file, version):
    assert load(monkeypatch, pytorch) is None
    assert loaded == [file]
    info = build_info()
    assert (info["cuda"], info["archs"]) == (version, BUILT[version])


@pytest.mark.parametrize(
    ("pytorch", "reason"),
    [
        (None, f"PyTorch {torch.__version__} is a build without CUDA"),
        *((cuda, f"for CUDA 12.4 and 13.0, and this is PyTorch {torch.__version__} for CUDA {cuda}")
          for cuda in ("11.8", "14.0", "1.3", "130.1")),
    ],
)  # fmt: skip
def test_no_library_is_loaded_that_is_of_another_cuda(loaded, monkeypatch, pytorch, reason):
    assert load(monkeypatch, pytorch).endswith(reason)
    assert loaded == []
    info = build_info()
    assert (info["cuda"], info["archs"]) == (None, [])


def test_there_is_a_wheel_for_each_python_of_the_metadata():
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert tuple(re.findall(r"Python :: (3\.\d+)", metadata)) == wheels.PYTHONS


def test_what_the_table_says_of_the_cuda_library():
    facts = {"cuda_load_error": None, "built": {"cuda": "13.0"}}
    here = "cpu (x86_64): backend='auto' takes cpu\n  cuda: no CUDA device is available here\n"
    assert wheels.cuda_in(facts, here) == "13.0: loads, no GPU to run on"
    on_gpu = here + "\ncuda:0 (a GPU): backend='auto' takes cuda\n  cpu: reads CPU memory\n  cuda: right, error 1e-7\n"
    assert wheels.cuda_in(facts, on_gpu) == "13.0: loads, right, error 1e-7"
    assert wheels.cuda_in({"cuda_load_error": "no library"}, on_gpu) == "no library"


@pytest.mark.parametrize(("version", "newer"), [("2.36", True), ("2.28", False), ("2.17", False), ("", False)])
def test_an_old_glibc_needs_no_help(monkeypatch, version, newer):
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc" if version else "", version))
    assert wheels.old_glibc.is_newer() is newer
