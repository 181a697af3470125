"""The sections of docs/kernels.md: each is written and checked by the test that measures it."""

from __future__ import annotations

import os
import re
from pathlib import Path

TABLES = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def section(title: str) -> str:
    """From the heading of that title to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n.*?(?=^#+ |\Z)", TABLES.read_text(), re.M | re.S)
    return found[0].rstrip("\n") + "\n" if found else ""


def update(title: str, text: str) -> None:
    """Puts `text`, which starts with the heading, in the place of the section, where MLA_EXT_UPDATE is set."""
    if not os.environ.get("MLA_EXT_UPDATE"):
        return
    old, whole = section(title), TABLES.read_text()
    whole = whole.replace(old, text) if old else f"{whole}\n{text}"
    temporary = TABLES.with_suffix(".tmp")
    temporary.write_text(whole)
    os.replace(temporary, TABLES)
