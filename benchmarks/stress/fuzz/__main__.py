"""Fuzzing, by `make fuzz`: of everything or of what is named.

`python benchmarks/stress/fuzz --seconds 600`, or in less time.

Each target gets an equal share of the time. A find stops the command and says which input it was; a seed repeats a run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import programs
import public
import torch

BUILDS = programs.ROOT / "build" / "fuzz"


def native(name: str, compiler: programs.Compiler | None) -> Callable[[float, int], str]:
    """A target built with sanitizers: cpu and cuda under ASan and UBSan, threads (the CPU kernels) under TSan."""

    def target(seconds: float, seed: int) -> str:
        can_guide = compiler is not None and name != "threads" and (name != "cuda" or compiler.knows_half())
        chosen = compiler if can_guide else programs.RANDOM
        directory = BUILDS / name
        if name == "cuda":
            program = programs.build_cuda(directory, chosen, programs.ADDRESS)
        else:
            program = programs.build_cpu(directory, chosen, programs.THREAD if name == "threads" else programs.ADDRESS)
        return (programs.run_guided if chosen.guides else programs.run_program)(program, seed, seconds)

    return target


def python(name: str) -> Callable[[float, int], str]:
    def target(seconds: float, seed: int) -> str:
        counts: Counter[str] = Counter()
        end, number = time.perf_counter() + seconds, seed
        with tempfile.TemporaryDirectory() as folder:
            while time.perf_counter() < end:
                counts[public.run_one(name, number, Path(folder))] += 1
                number += 1
        return f"{number - seed} inputs, {counts['refused']} refused, {counts['returned']} taken"

    return target


def state_machine(seconds: float, seed: int) -> str:
    """Sequences of 40 calls, in rounds of 50, drawn anew each time."""
    end, rounds = time.perf_counter() + seconds, 0
    environment = {**os.environ, "MLA_EXT_STATE_MACHINES": "50"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_state_machine.py"]
    while rounds == 0 or time.perf_counter() < end:
        done = subprocess.run(command, cwd=programs.ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(done.stdout[-6000:])
        rounds += 1
    return f"{50 * rounds} sequences of up to 40 calls"


def main() -> None:
    compiler = programs.coverage_guided()
    targets = {name: native(name, compiler) for name in ("cpu", "cuda", "threads")}
    targets |= {name: python(name) for name in public.TARGETS} | {"state machine": state_machine}
    parser = argparse.ArgumentParser(prog="python benchmarks/stress/fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one of: {', '.join(targets)} (default: all)")
    parser.add_argument("--seconds", type=float, default=600, help="in total, builds not counted")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="(default: the time)")
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - targets.keys()
    if unknown:
        parser.error(f"expected {', '.join(targets)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    chosen = arguments.targets or list(targets)
    print(f"seed {arguments.seed}, {compiler.name if compiler else 'no clang++ with libFuzzer: random inputs'}")
    for name in chosen:
        result = targets[name](arguments.seconds / len(chosen), arguments.seed)
        print(f"{name}: {result}", flush=True)


if __name__ == "__main__":
    main()
