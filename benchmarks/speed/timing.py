"""Interleaved timing: every candidate takes its turn in each round, so that a disturbance meets all of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

ROUNDS = 7  # at least, after one that does not count


@dataclass(frozen=True)
class Candidate:
    """`call` makes one step. What it puts off is paid within `steps` of them: only whole cycles of so many count.

    Single steps take turns with the other candidates', so that all meet the same caches. `before` runs ahead of each
    call and is not timed.
    """

    call: Callable[[], object]
    steps: int = 1
    before: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Milliseconds per step, the mean over a cycle: the median and the 20th and 80th percentile of the cycles."""

    median: float
    p20: float
    p80: float


def time_interleaved(
    candidates: Mapping[str, Candidate], seconds: float, device: str
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time the candidates, which are warm, in turns for about `seconds` in all.

    At least ROUNDS rounds, and two cycles of each candidate. One so slow that ROUNDS calls would take longer than
    `seconds` is left out: its name, with the reason, is in the second dictionary.
    """
    skipped = {}
    for name, candidate in candidates.items():
        for _ in range(2):  # twice, lest a disturbance decide
            call = _time_once(candidate, device) / 1e3
            if call * ROUNDS <= seconds:
                break
        else:
            skipped[name] = f"a call takes {call:.2g} s, and {ROUNDS} were to fit in {seconds:g} s"
    samples: dict[str, list[float]] = {name: [] for name in candidates if name not in skipped}
    least = max([ROUNDS, *(2 * candidates[name].steps for name in samples)])
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < end:
        for name, values in samples.items():
            values.append(_time_once(candidates[name], device))
        rounds += 1
    return {name: _summary(values, candidates[name].steps) for name, values in samples.items()}, skipped


def _summary(samples: list[float], steps: int) -> Timing:
    # A cycle begins anywhere: any so many steps in a row hold all that one puts off.
    cycles = range(0, len(samples) - steps + 1, steps)
    values = [statistics.fmean(samples[i : i + steps]) for i in cycles]
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")  # the other one extrapolates
    return Timing(statistics.median(values), p20, p80)


def _time_once(candidate: Candidate, device: str) -> float:
    candidate.before()
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        candidate.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    candidate.call()
    return (time.perf_counter() - begin) * 1e3


def peak_memory(call: Callable[[], object], device: str) -> int:
    """The most bytes that a warm call holds at once beyond what was there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def available_memory(device: str) -> int:
    """Bytes that can be had now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def matmul_rate(device: str, dtype: torch.dtype, n: int = 1024) -> float:
    """FLOP per second of a square product, in the precision that the user's setting gives."""
    a = torch.rand(n, n, dtype=dtype, device=device)
    out = a @ a
    timings, _ = time_interleaved({"product": Candidate(lambda: torch.mm(a, a, out=out))}, 3, device)
    return 2 * n**3 / (timings["product"].p20 * 1e-3)
