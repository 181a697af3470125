"""The projection P of one head's weight, as data: a matrix or a multiple of the identity, minus rows of updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import rank_compress

__all__ = ["Projection"]


@dataclass(slots=True)
class Projection:
    """P = B − KᵀK, or P = βI − KᵀK where there is no B (the rank form).

    base: B (s, s), or None. beta: β, 0-d, only where there is no B. rows: K (R, s), of which the first `count` are in
    use; None where every update goes into B at once. count: 0-d int64 on the device of the weight. nu: ν, 0-d, the mean
    of ‖h̄‖² so far, 0 before the first; None: α alone is in d. The other tensors are float32 (float64 for float64
    weights). A full K is folded into B, or compressed to its R/2 strongest directions.
    """

    base: Tensor | None = None
    beta: Tensor | None = None
    rows: Tensor | None = None
    count: Tensor | None = None
    nu: Tensor | None = None

    @staticmethod
    def identity(s: int, rank: int | None, deferred: int, dtype: torch.dtype, device: torch.device) -> Projection:
        """P = I: in the rank form with `rank` rows, or dense with room for `deferred` updates."""
        if rank is None:
            made = Projection(base=torch.empty(s, s, dtype=dtype, device=device))
        else:
            made = Projection(beta=torch.empty((), dtype=dtype, device=device))
        rows = deferred if rank is None else rank
        if rows:
            made.rows = torch.zeros(rows, s, dtype=dtype, device=device)
            made.count = torch.zeros((), dtype=torch.int64, device=device)
        made.reset_()
        return made

    def reset_(self) -> None:
        """Back to the identity that has seen nothing, in place."""
        if self.base is not None:
            self.base.zero_().diagonal().fill_(1)
        if self.beta is not None:
            self.beta.fill_(1)
        for number in (self.count, self.nu):
            if number is not None:
                number.zero_()

    def used_rows(self) -> Tensor:
        """K (R, s) with zeros where no row is in use: no host waits for the count."""
        assert self.rows is not None and self.count is not None
        used = torch.arange(len(self.rows), device=self.rows.device) < self.count
        return self.rows.where(used.unsqueeze(1), 0)

    @property
    def size(self) -> int:
        """s."""
        part = self.rows if self.base is None else self.base
        assert part is not None
        return part.shape[1]

    def trace(self) -> Tensor:
        """The sum of P's eigenvalues, 0-d."""
        removed: Tensor | int = 0 if self.rows is None else self.used_rows().square().sum()
        if self.base is not None:
            return self.base.trace() - removed
        assert self.beta is not None
        return self.beta * self.size - removed

    def dense(self) -> Tensor:
        """P (s, s), symmetric to the last bit: a new tensor."""
        if self.base is not None and self.rows is None:
            return self.base.clone()
        K = self.used_rows()
        removed = K.t() @ K
        removed = (removed + removed.t()) / 2
        if self.base is not None:
            return self.base - removed
        assert self.beta is not None
        return self.beta * torch.eye(K.shape[1], dtype=K.dtype, device=K.device) - removed

    def product(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """X P (C, s) by matrix products of PyTorch, as precise as the user lets them be. P has no deferred rows."""
        if self.base is not None:
            return torch.mm(X.to(self.base.dtype), self.base, out=out)
        K = self.used_rows()
        X = X.to(K.dtype)
        assert self.beta is not None
        return torch.addmm(self.beta * X, X @ K.t(), K, alpha=-1, out=out)

    def with_rank(self, rank: int | None) -> Projection:
        """This P as a matrix (None), or in the rank form with `rank` rows; the strongest directions stay exact."""
        if rank is None:
            return self if self.base is not None else Projection(base=self.dense(), nu=self.nu)
        if self.rows is not None and self.beta is not None and len(self.rows) == rank:
            return self
        if self.beta is None:
            p, directions = torch.linalg.eigh(self.dense().double())
            beta = p[-1]  # then no eigenvalue beta - p of K^T K is negative
            K = ((beta - p).sqrt() * directions).t()
        else:
            beta, K = self.beta.double(), self.used_rows().double()
        if len(K) >= rank:
            beta, K = rank_compress(beta, K, rank // 2)
        like = self.base if self.base is not None else self.beta
        assert like is not None
        rows = like.new_zeros(rank, K.shape[1])
        rows[: len(K)] = K
        return Projection(None, beta.to(like), rows, torch.tensor(len(K), device=rows.device), self.nu)

    def copy_to(self, dtype: torch.dtype, device: torch.device) -> Projection:
        """The same P in tensors of its own; the count stays an integer."""
        parts = (self.base, self.beta, self.rows, self.nu)
        base, beta, rows, nu = (None if t is None else t.to(device, dtype, copy=True) for t in parts)
        return Projection(base, beta, rows, None if self.count is None else self.count.to(device, copy=True), nu)
