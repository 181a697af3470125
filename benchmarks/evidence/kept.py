"""What a compression should keep: the strongest directions, or the newest.

`python -m benchmarks.evidence.kept --data FILE.npz …`.

The library keeps the strongest. The two others exist only here, in place of `reference.rank_compress`. A stream is the
feature means of one training with dense P; it is absorbed in float64, and P is then compared with the dense one. The
accuracies are of whole trainings by the reference. Writes rank_kept.md and rank_kept.csv to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_ext import reference

from .. import RESULTS
from .methods import ALPHA
from .rank import EPOCHS, SAMPLES, RankRun, execute
from .report import Table, difference, percent, write
from .runs import Results, workers

WIDTHS, RANKS = (128, 512), (64, 16)
Compress = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def newest(beta: Tensor, rows: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """`rank_compress` with the span of the `keep` newest rows in place of the strongest directions.

    P's eigenvalues within the span stay, and everything else gets one eigenvalue, so that the trace stays.
    """
    s = rows.shape[1]
    K, b = rows.double(), beta.double()
    span = torch.linalg.qr(K[len(K) - keep :].T).Q.T
    inside = K @ span.T
    values, vectors = torch.linalg.eigh(inside.T @ inside)
    p = (b - values).clamp(min=0)
    trace = s * b - K.square().sum()
    rest = ((trace - p.sum()) / (s - keep)).clamp(min=0)
    factor = (rest - p).clamp(min=0).sqrt()
    return rest.to(beta.dtype), (factor.unsqueeze(1) * (vectors.T @ span)).to(rows.dtype)


def newest_rows(beta: Tensor, rows: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` newest rows as they are; β stays, so what the older ones took from P is given back."""
    return beta, rows[len(rows) - keep :]


VARIANTS: dict[str, Compress] = {
    "the strongest R/2": reference.rank_compress,
    "the newest R/2": newest,
    "the newest R/2, β as it was": newest_rows,
}


@contextlib.contextmanager
def keeping(compress: Compress) -> Iterator[None]:
    """The reference compresses with `compress`."""
    usual = reference.rank_compress
    reference.rank_compress = compress
    try:
        yield
    finally:
        reference.rank_compress = usual


def means_of(run: RankRun) -> Tensor:
    """The feature means (steps, s) of the training, in float64."""
    means: list[Tensor] = []
    execute(run, watch=means.append)
    return torch.stack(means).double()


def absorb(means: Tensor, alpha: float, rank: int | None, compress: Compress) -> Tensor:
    """P (s, s) after the stream: dense, or of R rows."""
    s = means.shape[1]
    if rank is None:
        P = torch.eye(s, dtype=means.dtype)
        for mean in means:
            P = reference.rls_update(P, mean, alpha)
        return P
    beta, rows = torch.ones((), dtype=means.dtype), means.new_zeros(0, s)
    for mean in means:
        beta, rows = reference.rank_update(beta, rows, mean, alpha)
        if len(rows) == rank:
            beta, rows = compress(beta, rows, rank // 2)
    return beta * torch.eye(s, dtype=means.dtype) - rows.T @ rows


def passed(P: Tensor, means: Tensor) -> float:
    """How much of the feature means P lets through: the mean of ‖P h̄‖ / ‖h̄‖."""
    return ((means @ P).norm(dim=1) / means.norm(dim=1)).mean().item()


def stream(source: str, width: int, epochs: int, samples: int) -> Iterator[list[str]]:
    """The rows of the table of streams."""
    means = means_of(RankRun(source, width, ALPHA, None, 0, epochs, samples))
    early, late = means.chunk(2)
    exact = absorb(means, ALPHA, None, newest)
    where = [Path(source).stem, str(width), str(len(means))]
    yield [*where, "dense", "-", "-", f"{passed(exact, early):.4f}", f"{passed(exact, late):.4f}"]
    for rank in RANKS:
        for name, compress in VARIANTS.items():
            P = absorb(means, ALPHA, rank, compress)
            error = (P - exact).norm() / exact.norm()
            yield [*where, name, str(rank), f"{error:.3f}", f"{passed(P, early):.4f}", f"{passed(P, late):.4f}"]


@dataclasses.dataclass(frozen=True)
class KeptRun(RankRun):
    kept: str = next(iter(VARIANTS))


def train(run: KeptRun) -> dict[str, Any]:
    with keeping(VARIANTS[run.kept]):
        return execute(run, backend="reference")


def trainings(
    sources: Sequence[str], results: Results, seeds: int, epochs: int, samples: int, workers: int
) -> Iterator[list[str]]:
    """The rows of the table of accuracies: all data sets and seeds of a width and an R in one."""
    for width in WIDTHS:
        for rank in RANKS:
            runs = {
                name: [
                    KeptRun(source, width, ALPHA, rank, seed, epochs, samples, name)
                    for source in sources
                    for seed in range(seeds)
                ]
                for name in VARIANTS
            }
            every = [run for of in runs.values() for run in of]
            results.complete(every, f"width {width}, R = {rank}", workers, train)
            best, last = (
                {name: [fused(results[run], epoch) for run in of] for name, of in runs.items()}
                for epoch in ("best", "last")
            )
            first = next(iter(VARIANTS))
            for name in VARIANTS:
                against = ["-", "-"] if name == first else [difference(at[name], at[first]) for at in (best, last)]
                yield [str(width), str(rank), name, percent(best[name]), against[0], percent(last[name]), against[1]]


def fused(result: dict[str, Any], epoch: str) -> float | None:
    """Of the test split; None: the run diverged."""
    return None if "diverged" in result else result["test"][epoch]["fused"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits"], help='files, or "digits" for the built-in data')
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the training split, at most")
    parser.add_argument("--workers", type=int, default=workers(), help="runs at a time (default: one a core)")
    parser.add_argument("--runs", type=Path, default=Path("runs/kept.jsonl"), help="where results are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    limits = (arguments.epochs, arguments.samples)
    streams = [row for source in arguments.data for width in WIDTHS for row in stream(source, width, *limits)]
    columns = ["data", "width", "steps", "P keeps", "R", "error of P", "passed, first half", "passed, second half"]
    recorded = Table("Recorded streams", columns, streams)
    rows = trainings(arguments.data, Results(arguments.runs), arguments.seeds, *limits, arguments.workers)
    columns = ["width", "R", "P keeps", "best epoch", "minus the strongest", "last epoch", "minus the strongest"]
    trained = Table("Fused test accuracy, %", columns, [*rows])
    stems = ", ".join(Path(source).stem for source in arguments.data)
    text = f"""alpha {ALPHA:g}. Error of P: the distance from dense P in the Frobenius norm, relative to dense P.
    Passed: the mean of ‖P h̄‖ / ‖h̄‖ over the feature means of the first or the second half of the stream; P should
    let through as little as dense P does. Accuracies: mean ± standard deviation over {stems} and {arguments.seeds}
    seeds, {arguments.epochs} epochs; differences are paired, with 95 % intervals."""
    write(arguments.out / "rank_kept", "The strongest directions or the newest", text, (trained, recorded))


if __name__ == "__main__":
    main()
