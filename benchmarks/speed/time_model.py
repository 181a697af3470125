"""What a head step should take on a GPU, predicted: no time here is measured.

`python -m benchmarks.speed.time_model` writes the tables of docs/kernels.md. With `--measured FILE.json`, of
`benchmarks.speed.head_step --device cuda`, it prints measured ÷ predicted.

A step takes its launches and the longest of three: bytes of P or K over the bandwidth of the memory that holds it, all
bytes over that of L2, and FLOP over the rate of float32. Bytes are those that threads ask for, as the recorder of
tests/cuda_emulation counts them (tests/test_time_model.py compares). What is published, and what is assumed, is said
at the figures.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from math import ceil
from pathlib import Path

SHAPES = [(512, 6), (2048, 6), (4096, 6), (8192, 6), (768, 101), (2048, 101), (2048, 1000)]
RANK = 64
DOCS = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
TITLE = "What a step should take: a prediction"

# Bytes a second. NVIDIA's data sheets of H100 SXM and H200 SXM.
MEMORY = {"H100": 3.35e12, "H200": 4.8e12}
# FLOP a second in float32 without tensor cores; the same sheets.
FLOAT32 = 66.9e12
L2_SIZE, MULTIPROCESSORS = 50e6, 132
# 5120 bytes a clock (NVIDIA's A100 white paper; none is published for Hopper), at 1.755 GHz; two thirds are assumed.
L2 = 5120 * 1.755e9 * 2 / 3
# A graph of kernels in a line takes 2.5 µs to launch (NVIDIA's blog, "Constant Time Launch for Straight-Line CUDA
# Graphs"). From the end of one to the start of the next 0.5 µs pass (NVIDIA's blog, "Getting Started with CUDA Graphs":
# 3.4 µs each, of which the kernel is 2.9). As much again is assumed for it to fill and drain.
FIRST_LAUNCH, NEXT_LAUNCH = 2.5e-6, 1e-6
# Assumed: sweeps of the Jacobi rotations that compress K, and the time of one of their rounds.
SWEEPS, ROUND = 8, {"cuda": 0.5e-6, "triton": 1e-6}


@dataclass(frozen=True)
class Form:
    """A form of the step: its launches, the bytes of P or K, all bytes, FLOP, and the seconds of its compressions."""

    launches: int
    own: float
    total: float
    flop: float
    compression: float = 0.0

    def seconds(self, gpu: str, s: int) -> float:
        is_cached = 4 * s * s <= L2_SIZE or self.compression > 0  # P, or K which always is
        work = max(self.own / (L2 if is_cached else MEMORY[gpu]), self.total / L2, self.flop / FLOAT32)
        return FIRST_LAUNCH + (self.launches - 1) * NEXT_LAUNCH + work + self.compression


BLAS_FROM = 32  # classes: `head_step_prefers_product_given` in csrc/cuda/head_step.h, and in Triton


def dense_one_launch(s: int, C: int) -> Form | None:
    """CUDA, where each multiprocessor can keep its rows of P on chip. The barrier counts as a launch."""
    rows, by_blas = ceil(s / MULTIPROCESSORS), C >= BLAS_FROM
    if 4 * s * rows > 200e3:
        return None
    blocks = ceil(s / rows)
    own = 4 * s * s * (3 if by_blas else 2)
    inputs = 2 * C * s + 2 * blocks * s if by_blas else blocks * (C + 2) * s
    sums = blocks * (1 + 8 * blocks)
    return Form(3 if by_blas else 2, own, own + 4 * (4 * C * s + inputs + sums), 2 * (C + 2) * s * s)


def dense_two_launches(s: int, C: int, by_blas: bool) -> Form:
    """CUDA and Triton. P is read for each 16 classes, or by BLAS, and then updated."""
    own = 4 * s * s * (2 + (2 if by_blas else ceil(C / 16)))
    blocks, updates = ceil(s / 16), ceil(s / 8)
    inputs = 2 * C * s + blocks * s if by_blas else blocks * (C + 1) * s
    total = own + 4 * (6 * C * s + inputs + updates * s + blocks * (1 + 8 * (updates + C)))
    return Form(3 if by_blas else 2, own, total, 2 * (C + 2) * s * s)


def rank_form(s: int, C: int, backend: str = "cuda", used: int = RANK * 3 // 4) -> Form:
    """`used` rows of K are what a step meets on average. With many classes Triton has torch make Z, in six launches."""
    by_torch = backend == "triton" and C >= BLAS_FROM
    slices, groups, parts = ceil(s / 32), 1 if by_torch else ceil(C / 16), min(8, ceil(s / 128))
    at_once = sum(4 * ceil(min(16, C - c) / 4) for c in range(0, C, 16))  # of G, for each two rows of K
    t = parts * used * (C + 1)
    own = 4 * 2 * groups * used * s
    total = own + 4 * (ceil(used / 2) * (at_once + 1) * s + t + 5 * C * s + 8 * groups * s + slices * t)
    total += 4 * slices * 8 * (32 + 2 * slices)
    total += 8 * 128 * parts * ceil(RANK / 8) + 40 * 256 * slices + 8 * 1024 * min(slices, 16)  # count, β and the like
    compression = SWEEPS * (RANK - 1) * ROUND[backend] / (RANK // 2)
    launches = {"cuda": 4, "triton": 5}[backend] + 6 * by_torch
    return Form(launches, own, total, 4 * (C + 1) * used * s, compression)


def forms(s: int, C: int) -> dict[str, Form | None]:
    return {
        "dense, one launch": dense_one_launch(s, C),
        "dense, two launches": dense_two_launches(s, C, C >= BLAS_FROM),
        f"rank {RANK}, CUDA": rank_form(s, C),
        f"rank {RANK}, Triton": rank_form(s, C, "triton"),
    }


def table() -> str:
    names = list(forms(*SHAPES[0]))
    lines = [
        f"## {TITLE}",
        "",
        "No GPU has run this. benchmarks/speed/time_model.py predicts it from the bytes above, published figures of",
        "the GPUs, and assumptions that it names. Device time in µs on H100 / H200, of steps in a CUDA graph. In the",
        f"rank form, + is the share that each step has in a compression every {RANK // 2} steps.",
        "",
        f"| s, C | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for s, C in SHAPES:
        cells = [f"{s}, {C}"]
        for form in forms(s, C).values():
            if form is None:
                cells.append("–")
                continue
            times = [f"{1e6 * (form.seconds(gpu, s) - form.compression):.1f}" for gpu in MEMORY]
            text = " / ".join(times if times[0] != times[1] else times[:1])
            cells.append(text + (f" + {1e6 * form.compression:.1f}" if form.compression else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def predicted(candidate: str, gpu: str, s: int, C: int) -> float | None:
    """Seconds, of a candidate's name in `benchmarks.speed.head_step`; None for one that is not ours on a GPU."""
    found = re.fullmatch(rf"mla_ext (cuda|triton)(, rank {RANK})?( graphed)?", candidate)
    if not found:
        return None
    if found[2]:
        return rank_form(s, C, found[1]).seconds(gpu, s)
    if found[1] == "triton":
        return dense_two_launches(s, C, C >= BLAS_FROM).seconds(gpu, s)
    return (dense_one_launch(s, C) or dense_two_launches(s, C, C >= BLAS_FROM)).seconds(gpu, s)


def compare(measured: dict) -> str:
    """The table of measured ÷ predicted. What is not graphed also has the host's time in it."""
    gpu = "H200" if "H200" in measured["about"] else "H100"
    lines = [
        f"| s, C | candidate | measured, µs | predicted for {gpu}, µs | measured ÷ predicted |",
        "|---|---|---:|---:|---:|",
    ]
    for row in measured["rows"]:
        s, C = row["sizes"]["s"], row["sizes"]["C"]
        for name, timing in row["timings"].items():
            if (seconds := predicted(name, gpu, s, C)) is not None:
                microseconds = 1e3 * timing["median"]
                cells = [f"{s}, {C}", name, f"{microseconds:.1f}", f"{1e6 * seconds:.1f}"]
                lines.append(f"| {' | '.join([*cells, f'{1e-6 * microseconds / seconds:.2f}'])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, metavar="FILE.json")
    measured = parser.parse_args().measured
    if measured:
        print(compare(json.loads(measured.read_text())), end="")
        return
    text = DOCS.read_text()
    old = re.search(rf"^## {TITLE}\n.*?(?=^## |\Z)", text, re.M | re.S)
    DOCS.write_text(text.replace(old[0].rstrip("\n") + "\n", table()) if old else f"{text}\n{table()}")


if __name__ == "__main__":
    main()
