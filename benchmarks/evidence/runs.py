"""One training run, described by values; many of them in parallel; and the file that remembers what they gave."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import multiprocessing
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mla_ext
from mla_ext.multimodal.evaluate import modality_scores, predict
from mla_ext.multimodal.fit import NonFiniteLossError
from mla_ext.multimodal.metrics import score
from mla_ext.multimodal.model import MultimodalModel

from .measures import modality_gap, trust, unit_features
from .methods import BATCH_SIZE, METHODS, MeanFused, Setting

EPOCHS, WIDTH = 30, 64


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a result depends on. `data`: "digits" or the path of an .npz.

    split "validation": only the best validation accuracy is told, as for choosing hyperparameters; "test": the test
    split is read, once, with the weights of the epoch that is best on the validation split.
    """

    data: str
    method: str
    lr: float
    weight_decay: float
    own: float | None
    seed: int
    split: str = "test"
    missing: float = 0.0
    order: str = "given"  # "random", or the modalities in turn: "text,image"
    fusion: str = "own"  # "mean": the alternating methods' logits averaged instead
    epochs: int = EPOCHS

    @property
    def key(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "data": Path(self.data).stem})


@functools.lru_cache(maxsize=4)
def load(source: str, missing: float, seed: int) -> mla_ext.MultimodalData:
    """Standardised, every recording as one vector. `seed` is of what goes missing."""
    data = mla_ext.digits() if source == "digits" else mla_ext.load_npz(source)
    data = (data.with_missing(missing, seed) if missing else data).standardized()
    return dataclasses.replace(data, features={m: f.flatten(1) for m, f in data.features.items()})


def trained(
    run: Run, data: mla_ext.MultimodalData, before: Callable[[MultimodalModel], object] = lambda model: None
) -> tuple[MultimodalModel, list[dict[str, Any]]]:
    """The model with the weights of its best epoch, and its history; NonFiniteLossError as `fit`.

    before: called with the model when it is there and not trained yet.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        setting = Setting(run.lr, run.weight_decay, run.own, run.seed, run.epochs, WIDTH)
        model, optimizer = METHODS[run.method].build(data, setting)
        if run.fusion == "mean":
            model = MeanFused(dict(model.encoders), model.head)
        order = run.order
        if order not in ("given", "random"):
            model, order = type(model)({m: model.encoders[m] for m in order.split(",")}, model.head), "given"
        options = {"epochs": run.epochs, "batch_size": BATCH_SIZE, "seed": run.seed, "order": order}
        before(model)
        return model, mla_ext.fit(model, optimizer, data, **options, progress=False)


def execute(run: Run) -> dict[str, Any]:
    """Train and measure. {"diverged": reason} where the loss did not stay finite."""
    data = load(run.data, run.missing, run.seed if run.missing else 0)
    if run.split == "test" and len(data.indices("test")) == 0:
        raise ValueError(f"{run.data}: expected test samples, got none")
    try:
        model, history = trained(run, data)
    except NonFiniteLossError as error:
        return {"diverged": str(error).partition(":")[0]}
    validation = [record["validation"] for record in history]
    accuracies = [report["fusions"][report["fused"]]["accuracy"] for report in validation]
    best = max(index for index, record in enumerate(history) if record["best"])
    result = {"validation": accuracies[best], "epoch": best + 1, "last_validation": accuracies[-1]}
    if run.split == "validation":
        return result

    indices = data.indices("test")
    labels = data.labels[indices]
    prediction = predict(model, data, indices)
    alone = modality_scores(model.modalities, prediction, labels)
    features = unit_features(model, data, "validation")
    seen = validation[best]["modalities"]
    return result | {
        "accuracy": score(prediction.fusions[validation[0]["fused"]], labels).accuracy,
        "macro_f1": score(prediction.fusions[validation[0]["fused"]], labels).macro_f1,
        "fusions": {name: score(logits, labels).accuracy for name, logits in prediction.fusions.items()},
        "modalities": {m: alone[m].accuracy if m in alone else None for m in model.modalities},
        "validation_modalities": {m: seen[m]["accuracy"] if m in seen else None for m in model.modalities},
        "dropped": 1 - prediction.present.double().mean().item(),
        "gap": modality_gap(features, run.seed) if min(map(len, features.values())) > 1 < len(features) else None,
        **trust(prediction, labels, model.modalities),
    }


class Results:
    """The results of all runs so far, one JSON line each in a file that only grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # the last line of a process that was killed
                    continue
                self.found[json.dumps(record["run"])] = record["result"]

    def __getitem__(self, run: Any) -> dict[str, Any]:
        return self.found[run.key]

    def complete(
        self, runs: Iterable[Any], title: str, workers: int, work: Callable[[Any], dict[str, Any]] | None = None
    ) -> None:
        """Do the runs that are not there yet, the longest data first. work: what does one of them, if not `execute`."""
        missing = {run.key: run for run in runs if run.key not in self.found}
        if not missing:
            return
        todo = sorted(missing.values(), key=lambda run: (-samples(run.data), run.seed))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        about = provenance()
        with self.path.open("a", encoding="utf-8") as file:
            if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
                file.write("\n")
            for run, result in tqdm(
                execute_all(todo, workers, work or execute), total=len(todo), unit="run", desc=title
            ):
                self.found[run.key] = result
                file.write(json.dumps({"run": json.loads(run.key), "result": result, **about}) + "\n")
                file.flush()


def execute_all(
    runs: list[Any], workers: int, work: Callable[[Any], dict[str, Any]]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """As they end. With one worker it is this process."""
    if workers == 1:
        yield from ((run, work(run)) for run in runs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(work, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()


@functools.cache
def samples(source: str) -> int:
    return len(load(source, 0.0, 0).labels)


def provenance() -> dict[str, Any]:
    """What a result was made with."""
    root = Path(__file__).parents[2]
    git = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "commit": git.stdout.strip() or None,
        "mla_ext": mla_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def workers() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
