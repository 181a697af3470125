"""The CUDA kernels on the emulated device as a backend for CPU tensors: the dry run of benchmarks/gpu_check.sh.

MLA_EXT_EMULATED names the program; `python tests/cuda_emulation/emulated.py FOLDER` builds three in a folder: fast,
sanitized, and recorded, whose every launch is checked for races.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import harness
import torch
from harness import THREE, Call
from torch import Tensor

from mla_ext.backends import Backend
from mla_ext.reference import accumulate_dtype
from mla_ext.step import HeadStep

PROGRAM = os.environ.get("MLA_EXT_EMULATED")


def call_(operation: int, integers: list[int], reals: list[float], arrays: list[Tensor | None]) -> None:
    """A call of the driver that writes into `arrays`."""
    assert PROGRAM is not None
    flat = [None if array is None else array.detach() for array in arrays]
    call = Call(operation, integers, reals, flat, THREE)
    with tempfile.TemporaryDirectory() as folder:
        (results,), printed = harness.run_in_turn(Path(PROGRAM), [call], Path(folder) / "call")
    wrong = [launch.wrong for launch in map(harness.Launch.parse, printed.splitlines()) if launch.wrong]
    assert not wrong, wrong
    for array, result in zip(flat, results, strict=True):
        if array is not None and result is not None:
            array.copy_(result)


class Emulated(Backend):
    name = "emulated"

    def unusable(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "the emulated device has the CPU's memory"

    def rank(self, s: int) -> int | None:
        return 4 if s > 40 else None

    def feature_mean(self, features: Tensor) -> Tensor:
        N, s = features.shape
        mean = features.new_empty(s, dtype=accumulate_dtype(features.dtype))
        call_(harness.FEATURE_MEAN, [harness.DTYPES[features.dtype], N, s, s], [], [features, mean])
        return mean

    def rls_update_(
        self, projection: Tensor, feature_mean: Tensor, alpha: float | Tensor, forget: float | Tensor, normalize: bool
    ) -> None:
        integers = [harness.DTYPES[projection.dtype], len(projection), normalize]
        call_(harness.RLS_UPDATE, integers, [float(alpha), float(forget)], [projection, feature_mean])

    def head_step_(self, step: HeadStep) -> None:
        h, P, (C, s) = step.hyper, step.projection, step.weight.shape
        room = 0 if P.rows is None else len(P.rows)
        options = [h.nesterov, h.maximize, h.absorb == "before", h.normalize]
        integers = [harness.DTYPES[step.weight.dtype], C, s, 1, *options, 0, room]
        reals = [float(x) for x in (h.lr, h.momentum, h.dampening, h.weight_decay, h.alpha, h.forget)]
        given = P.product(step.grad) if C >= 32 else None  # as the backend does
        read = [step.grad, step.feature_mean, None, None, step.grad_scale, step.found_inf, given]
        written = [step.weight, step.momentum_buffer, P.base, step.step]
        call_(harness.HEAD_STEP, integers, reals, [*written, *read, P.rows, P.beta, P.count, P.nu])

    def entropy_fusion(
        self, logits: Tensor, present: Tensor | None, temperatures: Tensor | None, equal: bool
    ) -> tuple[Tensor, Tensor]:
        M, N, C = logits.shape
        fused = logits.new_empty(N, C)
        weights = logits.new_empty(M, N, dtype=accumulate_dtype(logits.dtype))
        mask = None if present is None else present.to(torch.uint8)
        integers = [harness.DTYPES[logits.dtype], M, N, C, equal]
        call_(harness.ENTROPY_FUSION, integers, [], [logits, mask, fused, weights, temperatures])
        return fused, weights


def main(folder: Path) -> None:
    harness.build(folder / "fast", harness.FAST)
    harness.build(folder / "sanitized", harness.SANITIZED)
    harness.build_recorder(folder / "recorded")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
