"""Does the projection help, and when? Alternation alone against MLA.

`python -m benchmarks.evidence.projection --data FILE.npz`.

Each seed trains with every method under the same settings, the defaults of `mla-ext train`. Fused test accuracy is
reported twice: for the epoch that is best on the validation split, and for the last epoch, as without a validation
split. Writes a Markdown table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mla_ext
from mla_ext.multimodal import checkpoint
from mla_ext.multimodal.recipe import Settings, build

from .. import RESULTS
from ..machine import machine

METHODS: dict[str, dict[str, Any]] = {"concat": {}, "alternating": {}, "mla": {}}
METHODS |= {f"mla, alpha {alpha}": {"alpha": alpha} for alpha in (0.01, 0.001)}
METHODS |= {f"mla, fixed alpha {alpha}": {"alpha": alpha, "alpha_scale": None} for alpha in (1.0, 0.1, 0.01)}


def run(data: mla_ext.MultimodalData, settings: Settings) -> tuple[float, float]:
    """Fused test accuracy in %, at the best epoch and at the last."""
    model, optimizer = build(data, settings)
    with tempfile.TemporaryDirectory() as out:
        mla_ext.fit(model, optimizer, data, epochs=settings.epochs, seed=settings.seed, out=out, progress=False)
        best = mla_ext.evaluate(model, data, "test").accuracy
        model.load_state_dict(checkpoint.load(Path(out) / "last.pt")["model"])
    return 100 * best, 100 * mla_ext.evaluate(model, data, "test").accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npz; without it the built-in digits")
    parser.add_argument("--epochs", type=int, default=Settings().epochs)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    data = (mla_ext.load_npz(arguments.data) if arguments.data else mla_ext.digits()).standardized()
    source = arguments.data.stem if arguments.data else "digits"
    lines = [
        f"Fused test accuracy on {source}, %, {arguments.epochs} epochs, mean ± std over {arguments.seeds} seeds; "
        f"settings of `mla-ext train`. {machine('cpu')}.",
        "",
        "| method | best epoch by validation | last epoch |",
        "|---|---|---|",
    ]
    for name, change in METHODS.items():
        settings = replace(Settings(), method=name.split(",")[0], epochs=arguments.epochs, **change)
        runs = [run(data, replace(settings, seed=seed)) for seed in range(arguments.seeds)]
        cells = [
            f"{statistics.mean(column):.1f} ± {statistics.stdev(column):.1f}" for column in zip(*runs, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"projection_{source}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
