"""One training run, described by values; many of them in parallel; and the file that remembers what they gave."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

import mla_ext
from mla_ext.multimodal.evaluate import modality_scores, predict, standing
from mla_ext.multimodal.fit import NonFiniteLossError
from mla_ext.multimodal.metrics import score
from mla_ext.multimodal.model import ORDERS, MultimodalModel

from ..commit import commit
from . import together
from .measures import modality_gap, trust, unit_features
from .methods import BATCH_SIZE, METHODS, MeanFused, Setting

EPOCHS, WIDTH = 30, 64
MOST_RUNS = 12  # side by side
MOST_SAMPLES = 5000  # more data keeps a CPU busy one run at a time


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


@dataclasses.dataclass
class Trained:
    """A run that was trained: the model with the weights of its best epoch, the index of that epoch, the validation
    accuracy after each epoch, and the weights of the last."""

    model: MultimodalModel
    best: int
    validation: list[float]
    last: dict[str, Tensor]


def build(run: Run, data: mla_ext.MultimodalData) -> tuple[MultimodalModel, Optimizer, str]:
    """The model and the optimizer of before the training, and the `order` to train in."""
    torch.manual_seed(run.seed)
    setting = Setting(run.lr, run.weight_decay, run.own, run.seed, run.epochs, WIDTH)
    model, optimizer = METHODS[run.method].build(data, setting)
    if run.fusion == "mean":
        model = MeanFused(dict(model.encoders), model.head)
    if run.order in ORDERS:
        return model, optimizer, run.order
    return type(model)({m: model.encoders[m] for m in run.order.split(",")}, model.head), optimizer, "given"


def train(run: Run, data: mla_ext.MultimodalData) -> Trained | str:
    """A string says why the loss did not stay finite."""
    last: dict[str, Tensor] = {}

    def keep(record: dict[str, Any]) -> None:
        if record["epoch"] == run.epochs:
            last.update(copy.deepcopy(model.state_dict()))

    with torch.random.fork_rng(devices=[]):
        model, optimizer, order = build(run, data)
        options = {"epochs": run.epochs, "batch_size": BATCH_SIZE, "seed": run.seed, "order": order}
        try:
            history = mla_ext.fit(model, optimizer, data, **options, on_epoch=keep, progress=False)
        except NonFiniteLossError as error:
            return str(error).partition(":")[0]
    reports = [record["validation"] for record in history]
    best = max(index for index, record in enumerate(history) if record["best"])
    return finished(run, data, Trained(model, best, [r["fusions"][r["fused"]]["accuracy"] for r in reports], last))


def train_together(runs: Sequence[Run], data: mla_ext.MultimodalData) -> list[Trained | str]:
    """The same for runs of one `group`, side by side."""
    with torch.random.fork_rng(devices=[]):
        built = [build(run, data) for run in runs]
    pairs, seeds = [(model, optimizer) for model, optimizer, _ in built], [run.seed for run in runs]
    found: list[Trained | str] = []
    for run, (model, _), ends in zip(runs, pairs, together.train(pairs, data, seeds, runs[0].epochs), strict=True):
        if isinstance(ends, str):
            found.append(ends)
        else:
            model.load_state_dict(ends.last, strict=False)  # a shared head is there under one of its names
            last = copy.deepcopy(model.state_dict())
            model.load_state_dict(ends.weights, strict=False)
            found.append(finished(run, data, Trained(model, ends.best, ends.validation, last)))
    return found


def finished(run: Run, data: mla_ext.MultimodalData, trained: Trained) -> Trained:
    """With what the method does after the training, for the weights of both epochs."""
    finish = METHODS[run.method].finish
    if finish is not None:
        weights = copy.deepcopy(trained.model.state_dict())
        trained.model.load_state_dict(trained.last)
        finish(trained.model, data)
        trained.last = copy.deepcopy(trained.model.state_dict())
        trained.model.load_state_dict(weights)
        finish(trained.model, data)
    return trained


def group(run: Run) -> Run:
    """Runs of an equal group can be trained side by side: they differ in their seeds and settings."""
    data = load(run.data, 0.0, 0)
    complete = run.missing == 0 and all(data.present(m).all() for m in data.modalities)
    if not (METHODS[run.method].together and complete and run.order == "given" and samples(run.data) <= MOST_SAMPLES):
        return run
    return dataclasses.replace(run, lr=0.0, weight_decay=0.0, own=None, seed=0, split="")


def perform(runs: Sequence[Any], work: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """What `work` tells of each."""
    if len(runs) == 1:
        return [work(runs[0])]
    trained = train_together(runs, load(runs[0].data, 0.0, 0))
    return [work(*pair) for pair in zip(runs, trained, strict=True)]


def execute(run: Run, trained: Trained | str | None = None) -> dict[str, Any]:
    """Train, if that is not done, and measure. {"diverged": reason} where the loss did not stay finite."""
    data = load(run.data, run.missing, run.seed if run.missing else 0)
    if run.split == "test" and len(data.indices("test")) == 0:
        raise ValueError(f"{run.data}: expected test samples, got none")
    trained = trained or train(run, data)
    if isinstance(trained, str):
        return {"diverged": trained}
    model, accuracies = trained.model, trained.validation
    result = {"validation": accuracies[trained.best], "epoch": trained.best + 1, "last_validation": accuracies[-1]}
    if run.split == "validation":
        return result

    indices = data.indices("test")
    labels = data.labels[indices]
    prediction = predict(model, data, indices)
    joint = prediction.fusions[standing(prediction.fusions, getattr(model, "fusion", "entropy"))]
    alone = modality_scores(model.modalities, prediction, labels)
    features = unit_features(model, data, "validation")
    seen = mla_ext.evaluate(model, data, "validation").modalities
    return result | {
        "accuracy": score(joint, labels).accuracy,
        "macro_f1": score(joint, labels).macro_f1,
        "fusions": {name: score(logits, labels).accuracy for name, logits in prediction.fusions.items()},
        "modalities": {m: alone[m].accuracy if m in alone else None for m in model.modalities},
        "validation_modalities": {m: seen[m].accuracy if m in seen else None for m in model.modalities},
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
        self,
        runs: Iterable[Any],
        title: str,
        workers: int,
        work: Callable[..., dict[str, Any]] | None = None,
        group: Callable[[Any], Any] = lambda run: run,
    ) -> None:
        """Do the runs that are not there yet, the longest data first.

        work: what does one of them, if not `execute`; group: runs for which it is equal are done together.
        """
        missing = {run.key: run for run in runs if run.key not in self.found}
        if not missing:
            return
        groups: dict[Any, list[Any]] = {}
        for run in sorted(missing.values(), key=lambda run: (-samples(run.data), run.seed)):
            groups.setdefault(group(run), []).append(run)
        units = [unit[i : i + MOST_RUNS] for unit in groups.values() for i in range(0, len(unit), MOST_RUNS)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        about = provenance()
        with (
            self.path.open("a", encoding="utf-8") as file,
            tqdm(total=len(missing), unit="run", desc=title) as bar,
        ):
            if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
                file.write("\n")
            for unit, results in perform_all(units, workers, work or execute):
                for run, result in zip(unit, results, strict=True):
                    self.found[run.key] = result
                    file.write(json.dumps({"run": json.loads(run.key), "result": result, **about}) + "\n")
                file.flush()
                bar.update(len(unit))


def perform_all(
    units: list[list[Any]], workers: int, work: Callable[..., dict[str, Any]]
) -> Iterator[tuple[list[Any], list[dict[str, Any]]]]:
    """As they end. With one worker it is this process."""
    if workers == 1:
        yield from ((unit, perform(unit, work)) for unit in units)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(perform, unit, work): unit for unit in units}
        for future in as_completed(futures):
            yield futures[future], future.result()


@functools.cache
def samples(source: str) -> int:
    return len(load(source, 0.0, 0).labels)


def provenance() -> dict[str, Any]:
    """What a result was made with."""
    return {
        "commit": commit(),
        "mla_ext": mla_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def workers() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
