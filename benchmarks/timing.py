"""Interleaved timing: every candidate takes its turn in each round, so that a disturbance meets all of them."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: the median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def time_interleaved(candidates: Mapping[str, Callable[[], None]], seconds: float, device: str) -> dict[str, Timing]:
    """Time the candidates in turns for about `seconds` in all, at least 7 rounds after 2 that do not count."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    end, rounds = 0.0, 0
    while rounds < 9 or time.perf_counter() < end:
        for name, call in candidates.items():
            samples[name].append(_time_once(call, device))
        rounds += 1
        if rounds == 2:
            end = time.perf_counter() + seconds
    result = {}
    for name, values in samples.items():
        p20, *_, p80 = statistics.quantiles(values[2:], n=5)
        result[name] = Timing(statistics.median(values[2:]), p20, p80)
    return result


def _time_once(call: Callable[[], None], device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def machine(device: str) -> str:
    """One line on what was measured, for the head of a table."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
