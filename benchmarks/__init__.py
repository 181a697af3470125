"""What measures the package: `python -m benchmarks.NAME` in a checkout takes the mla_ext that is installed."""

import sys
from pathlib import Path

CHECKOUT = str(Path(__file__).resolve().parents[1])
if sys.path[0] in ("", CHECKOUT):  # where `python -m` looks first, and would find the mla_ext that nothing is built in
    sys.path.append(sys.path.pop(0))
RESULTS = Path(__file__).parent / "results"  # where all benchmarks write
