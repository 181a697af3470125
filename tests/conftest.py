"""Fixtures of more than one test file."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of avdigits.npz, wikipedia.npz and mfeat.npz."""
    named = os.environ.get("MLA_EXT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "avdigits.npz").is_file():
        pytest.skip(f"no real data in {folder}; set MLA_EXT_DATA to the folder of avdigits.npz")
    return folder
