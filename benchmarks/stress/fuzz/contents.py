"""A small valid .npz, for whoever mutates one."""

from __future__ import annotations

import numpy as np

__all__ = ["SAMPLES", "contents"]

SAMPLES = 12


def contents() -> dict[str, np.ndarray]:
    """Its arrays: "a" has 5 recordings that samples share or lack, "b" one for each sample."""
    rng = np.random.default_rng(0)
    return {
        "modalities": np.array(["a", "b"]),
        "x_a": rng.standard_normal((5, 2, 3)).astype(np.float16),
        "row_a": np.array([0, 1, 2, 3, 4, 0, 0, -1, 1, -1, 2, 3]),
        "x_b": rng.integers(0, 256, (SAMPLES, 4), dtype=np.uint8),
        "y": np.arange(SAMPLES) % 3,
        "classes": np.array(["x", "y", "z"]),
        "split": np.array([0] * 8 + [1] * 2 + [2] * 2, dtype=np.int8),
    }
