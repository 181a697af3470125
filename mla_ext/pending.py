"""Updates of P that wait: P = B − Σ u uᵀ, so that P is written once in many steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A row costs each step as much as a row of P does; writing P, once for all rows, costs about 2 s rows. Of 8, 16, 32 and
# 64 rows, 16 and 32 do best from s = 256 to 4096 (benchmarks/NOTES.md).
ROWS = 16


@dataclass(frozen=True)
class Pending:
    """rows (ROWS, s), of which the first `count`, 0-d int64 on the CPU, are vectors u that P still lacks."""

    rows: Tensor
    count: Tensor

    @staticmethod
    def beside(projection: Tensor) -> Pending:
        """Nothing pending, for a projection (s, s)."""
        return Pending(projection.new_empty(ROWS, len(projection)), torch.zeros((), dtype=torch.int64))
