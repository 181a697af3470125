"""What a table was measured on."""

from __future__ import annotations

import datetime
import os
import platform

import torch

import mla_ext

from .commit import commit


def machine(device: str) -> str:
    """One line for the head of a table: processor, threads, load, versions, commit, date."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    facts = [
        name,
        f"{torch.get_num_threads()} threads",
        f"load {os.getloadavg()[0]:.1f}",
        f"PyTorch {torch.__version__}",
        f"Python {platform.python_version()}",
        f"mla_ext {mla_ext.__version__} ({commit() or 'no commit'})",
        str(datetime.date.today()),
    ]
    return ", ".join(facts)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
