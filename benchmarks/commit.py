"""Which sources a result was made with. Without torch, so that every script can say it."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc", "mla_ext", "CMakeLists.txt", "setup.py")


def commit() -> str | None:
    """The short hash of the checkout's commit, with "+" if the package differs from it; None outside git."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)

    head = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = head and git("diff", "--quiet", "HEAD", "--", *SOURCES).returncode
    return f"{head}{'+' if changed else ''}" or None
