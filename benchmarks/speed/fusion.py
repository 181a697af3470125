"""The time of the entropy fusion: ours against plain PyTorch. `python -m benchmarks.speed.fusion [--quick]`.

The floor: the logits read and the fused logits and weights written, all at the bandwidth of a sum over the logits,
measured in the same run.
"""

from __future__ import annotations

import torch

from mla_ext import backends, ops, reference

from .baselines import best_fusion
from .report import OURS, Floor, Row, arguments, write
from .timing import Candidate, available_memory, peak_memory, time_interleaved

GRID = [(N, C, M) for C, M in ((6, 2), (101, 2), (1000, 3)) for N in (512, 4096, 32768)]
QUICK = [(4096, 101, 2), (4096, 1000, 3)]
BASELINES = ["reference", "best", "compiled"]


def measure(N: int, C: int, M: int, device: str, dtype: torch.dtype, seconds: float) -> Row:
    row = Row({"N": N, "C": C, "M": M})
    needed, available = 6 * M * N * C * max(dtype.itemsize, 4), available_memory(device)
    if needed > 0.8 * available:
        row.skipped["all"] = f"needs {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB are free"
        return row
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(M, N, C, generator=generator).to(device, dtype)
    torch._dynamo.reset()  # compiled anew for each size
    compiled = torch.compile(best_fusion, dynamic=False)
    candidates = {
        "reference": Candidate(lambda: reference.entropy_fusion(logits)),
        "best": Candidate(lambda: best_fusion(logits)),
        "compiled": Candidate(lambda: compiled(logits)),
    }
    for name in backends.usable(torch.device(device)):
        if name != "reference":
            candidates[f"{OURS} {name}"] = Candidate(lambda name=name: ops.entropy_fusion(logits, backend=name))
    truth = candidates["reference"].call()
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype.itemsize > 2 else {"rtol": 5e-2, "atol": 5e-2}
    for name, candidate in candidates.items():
        for actual, expected in zip(candidate.call(), truth, strict=True):
            torch.testing.assert_close(actual, expected, check_dtype=False, msg=name, **close)
    row.timings, row.skipped = time_interleaved(candidates | {"sum": Candidate(logits.sum)}, seconds, device)
    if "sum" in row.timings:
        bandwidth = logits.nbytes / (row.timings["sum"].median * 1e-3)
        row.floor = Floor(logits.nbytes + sum(t.nbytes for t in truth), 0, bandwidth, torch.inf)
    row.memory = {name: logits.nbytes + peak_memory(candidate.call, device) for name, candidate in candidates.items()}
    return row


def main() -> None:
    parsed = arguments(__doc__, GRID, QUICK)
    rows = []
    for N, C, M in parsed.sizes:
        rows.append(measure(N, C, M, parsed.device, parsed.dtype, parsed.seconds))
        print(rows[-1].title, rows[-1].skipped or "", flush=True)
    about = """Entropy fusion of logits (M, N, C), all modalities present; median (p20–p80) of interleaved calls.
        The floor: the logits read and the results written at the bandwidth of a sum over the logits; the inverse of
        ours ÷ floor is the share of the read bandwidth that ours reaches."""
    write("fusion", about, rows, BASELINES, parsed)


if __name__ == "__main__":
    main()
