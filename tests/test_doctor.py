"""`mla-ext doctor` tells a healthy installation from one that computes something wrong."""

import warnings

import pytest
import torch

from mla_ext import _library, backends
from mla_ext.doctor import diagnose
from mla_ext.multimodal import cli


def line(report, name):
    (found,) = (row for row in report.splitlines() if row.startswith(f"  {name}: "))
    return found


def test_a_healthy_installation(capsys):
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    cpu = torch.device("cpu")
    assert "torch is what the kernels were built with:\n" in report
    assert f"torch {torch.__version__}" in report and "All that runs here is right." in report
    assert f"backend='auto' takes {backends.usable(cpu)[0]}\n" in report
    for name, backend in backends.BACKENDS.items():
        reason = backend.unusable(cpu)
        assert (reason or "right, error ") in line(report, name)


@pytest.mark.parametrize("method", ["feature_mean", "head_step_", "entropy_fusion"])
def test_a_backend_that_is_wrong_or_fails(monkeypatch, method):
    cls = type(backends.BACKENDS["reference"])
    original = getattr(cls, method)

    def wrong(self, *arguments):
        result = original(self, *arguments)
        if method == "head_step_":
            arguments[0].weight.mul_(1.001)
        elif method == "feature_mean":
            result *= 1.001
        else:
            result[0].mul_(1.001)
        return result

    monkeypatch.setattr(cls, method, wrong)
    report, healthy = diagnose()
    assert not healthy and "please report it" in report
    assert "WRONG, error " in line(report, "reference") and "e-03" in line(report, "reference")

    def fails(self, *arguments):
        raise OSError("no such kernel")

    monkeypatch.setattr(cls, method, fails)
    report, healthy = diagnose()
    assert not healthy and "FAILED, OSError: no such kernel" in line(report, "reference")


def test_what_the_program_around_it_has_set_changes_nothing(monkeypatch):
    """Another default dtype, and warnings that are errors where there are no kernels."""
    monkeypatch.setattr(backends, "BACKENDS", {"reference": backends.BACKENDS["reference"]})
    monkeypatch.setattr(_library, "load_error", "there are none")
    monkeypatch.setattr(_library, "_said", set())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report, healthy = diagnose()
    finally:
        torch.set_default_dtype(before)
    assert healthy and "backend='auto' takes reference\n" in report


def test_the_exit_status(monkeypatch):
    from mla_ext.multimodal import commands

    monkeypatch.setattr(commands, "diagnose", lambda: ("", False))
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 1
