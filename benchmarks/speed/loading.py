"""The loop on data that are read as they are needed: its speed, what it waits for, and what it keeps in memory.

    python -m benchmarks.speed.loading             # writes benchmarks/results/loading_<device>.md
    python -m benchmarks.speed.loading --quick     # a small set, a few rounds

Speed: passes over the same batches take turns, so that a disturbance meets all contestants. Memory: a process of its
own trains on a folder that is made for it and deleted afterwards, while this one looks at what is resident.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mla_ext import MultimodalData, ProjectedSGD, SharedHeadModel, load_folder
from mla_ext.multimodal import checkpoint
from mla_ext.multimodal.batches import Loader
from mla_ext.multimodal.encoders import build_encoder
from mla_ext.multimodal.fit import _Training, fit
from mla_ext.multimodal.model import Step
from mla_ext.multimodal.precision import Precision

from .. import RESULTS
from ..machine import machine

SHAPE, VECTOR, CLASSES, WIDTH, BATCH, WORKERS = (3, 96, 96), 300, 20, 128, 64, 2
BATCHES = 16  # of a pass: short, so that a disturbance meets all
SAMPLES = 2048  # of the set that the contestants share
PICTURE = int(np.prod(SHAPE))  # bytes
EVERY = 0.1  # seconds between two looks at the memory


def write_folder(folder: Path, samples: int, training: int) -> None:
    """Noise: pictures in uint8 and vectors in float32, of which `training` samples, spread evenly, are for training."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = np.lib.format.open_memmap(folder / "x_image.npy", "w+", np.uint8, (samples, *SHAPE))
    noise = rng.integers(0, 256, (4096, *SHAPE), np.uint8)
    for start in range(0, samples, len(noise)):
        pictures[start : start + len(noise)] = noise[: samples - start]
    pictures.flush()
    split = np.full(samples, 2, np.int8)
    split[np.linspace(0, samples - 1, training).astype(int)] = 0
    split[1 :: samples // 512] = 1
    arrays = {"x_text": rng.standard_normal((samples, VECTOR), np.float32), "y": np.arange(samples) % CLASSES}
    arrays |= {"modalities": np.array(["image", "text"]), "classes": np.array([str(c) for c in range(CLASSES)])}
    for key, array in (arrays | {"split": split}).items():
        np.save(folder / f"{key}.npy", array)


def make_model(device: str) -> tuple[SharedHeadModel, ProjectedSGD]:
    torch.manual_seed(0)
    encoders = {"image": build_encoder("small", SHAPE, WIDTH), "text": build_encoder("small", (VECTOR,), WIDTH)}
    model = SharedHeadModel(encoders, nn.Linear(WIDTH, CLASSES)).to(device)
    optimizer = ProjectedSGD(model.parameters(), lr=1e-3, momentum=0.9)
    optimizer.attach(model.head)
    return model, optimizer


# --- speed


class Samples(Dataset):
    """What one writes by hand: a map-style dataset of single samples of one modality."""

    def __init__(self, data: MultimodalData, modality: str) -> None:
        self.recordings, self.labels = data.features[modality], data.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.array(self.recordings[i])), self.labels[i]


def learn(model: SharedHeadModel, optimizer: ProjectedSGD, modality: str, x: Tensor, y: Tensor) -> None:
    """A step as anyone writes it."""
    optimizer.zero_grad()
    F.cross_entropy(model(modality, x.float()), y).backward()
    optimizer.step()


def contestants(data: MultimodalData, steps: list[Step], device: str) -> dict[str, Callable[[], float]]:
    """name -> a pass over the steps, which returns the share of its time that it waited for data."""
    on = torch.device(device)
    in_memory = MultimodalData(
        **(vars(data) | {"features": {m: torch.from_numpy(np.array(x)) for m, x in data.features.items()}})
    )

    def ours(data: MultimodalData, workers: int) -> Callable[[], float]:
        loader = Loader(data, on, workers)
        training = _Training(*make_model(device), loader, Precision(None, on), None)

        def run() -> float:
            with tqdm(disable=True) as bar:
                training.train(steps, 0, bar).cpu()  # waits for the device
            return loader.waiting

        return run

    def plain_with_our_loader() -> Callable[[], float]:
        loader, (model, optimizer) = Loader(data, on, WORKERS), make_model(device)

        def run() -> float:
            for step, batch in zip(steps, loader.read(steps, training=True), strict=True):
                (modality,) = step.modalities
                labels = data.labels[step.indices].to(on)
                learn(model, optimizer, modality, batch.inputs(modality, step.indices), labels)
            return loader.waiting

        return run

    def plain_by_hand() -> Callable[[], float]:
        model, optimizer = make_model(device)
        order = {m: [step.indices.tolist() for step in steps if m in step.modalities] for m in data.modalities}
        options: dict[str, Any] = {"persistent_workers": True, "pin_memory": on.type == "cuda"}
        loaders = {
            m: DataLoader(Samples(data, m), batch_sampler=batches, num_workers=WORKERS // 2, **options)
            for m, batches in order.items()
        }

        def run() -> float:
            start, waited = time.perf_counter(), 0.0
            readers = {m: iter(loader) for m, loader in loaders.items()}
            for step in steps:
                (modality,) = step.modalities
                begin = time.perf_counter()
                x, y = next(readers[modality])
                waited += time.perf_counter() - begin
                learn(model, optimizer, modality, x.to(on, non_blocking=True), y.to(on, non_blocking=True))
            return waited / (time.perf_counter() - start)

        return run

    return {
        "a: `fit`, data in memory": ours(in_memory, 0),
        f"b: `fit`, memory-mapped, {WORKERS} workers": ours(data, WORKERS),
        "c: plain loop, the DataLoader of b": plain_with_our_loader(),
        f"d: plain loop, a Dataset of single samples, {WORKERS} workers": plain_by_hand(),
    }


def measure_speed(folder: Path, device: str, rounds: int) -> list[str]:
    torch.set_num_threads(1)  # the workers have the other cores
    data = load_folder(folder)
    model, _ = make_model(device)
    steps = model.steps(data, BATCH, "given", torch.Generator().manual_seed(0))[:BATCHES]
    passes = contestants(data, steps, device)
    samples = sum(len(step.indices) for step in steps)
    rates: dict[str, list[float]] = {name: [] for name in passes}
    waits: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, run in passes.items():
            begin = time.perf_counter()
            share = run()
            seconds = time.perf_counter() - begin
            if number > 0:  # the first one warms up
                rates[name].append(samples / seconds)
                waits[name].append(share)
    lines = ["| loop | samples per second | waits for data |", "|---|---|---|"]
    for name, values in rates.items():
        p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
        median = statistics.median(values)
        lines.append(f"| {name} | {median:.0f} ({p20:.0f}–{p80:.0f}) | {statistics.median(waits[name]):.1%} |")
        print(lines[-1], flush=True)
    pairs = [b / c for b, c in zip(*(values for name, values in rates.items() if name[0] in "bc"), strict=True)]
    p20, *_, p80 = statistics.quantiles(pairs, n=5, method="inclusive")
    lines += ["", f"b ÷ c, round by round: {statistics.median(pairs):.3f} ({p20:.3f}–{p80:.3f}). {rounds} rounds."]
    print(lines[-1], flush=True)
    return lines


# --- memory


def train_once(folder: str, device: str, results: Any) -> None:
    """In a process of its own: all that `mla-ext train` does with a folder."""
    begin = time.perf_counter()
    data = load_folder(folder)
    data.checksum()
    checked = time.perf_counter()
    data = data.standardized()
    standardized = time.perf_counter()
    fit(*make_model(device), data, epochs=1, batch_size=BATCH, workers=WORKERS, progress=False)
    end = time.perf_counter()
    results.put({"checksum": checked - begin, "standardizing": standardized - checked, "epoch": end - standardized})


def resident(pid: int) -> tuple[float, float, float]:
    """MB of this process alone, of files, and of memory shared with others."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0, 0.0, 0.0
    found = {line.partition(":")[0]: line.split()[1] for line in status if line.startswith("Rss")}
    return tuple(int(found.get(name, 0)) / 1e3 for name in ("RssAnon", "RssFile", "RssShmem"))


def children(pid: int) -> list[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [child for each in map(int, found) for child in (each, *children(each))]


def measure_memory(folder: Path, samples: int, device: str) -> list[str]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=train_once, args=(str(folder), device, results))
    process.start()
    most, together = 0.0, 0.0
    while process.is_alive():
        every = [sum(resident(pid)) for pid in (process.pid, *children(process.pid))]
        most, together = max(most, *every), max(together, sum(every))
        time.sleep(EVERY)
    if process.exitcode != 0:
        raise RuntimeError(f"training failed with exit status {process.exitcode}")
    seconds = results.get()
    size = samples * (PICTURE + 4 * VECTOR) / 1e9
    lines = [
        f"A folder of {size:.1f} GB, {samples} samples. Resident memory at its highest, looked at every {EVERY} s, "
        f"Python and PyTorch included: {most / 1e3:.2f} GB in one process, {together / 1e3:.2f} GB in the training "
        f"process and its {WORKERS} workers together. Pages that they share count more than once.",
        f"Checksum of the whole folder: {seconds['checksum']:.0f} s; mean and variance of the training recordings: "
        f"{seconds['standardizing']:.0f} s; one epoch: {seconds['epoch']:.0f} s.",
    ]
    print(*lines, sep="\n", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gigabytes", type=float, default=6.4, help="of the set whose memory is measured")
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--folder", type=Path, help="where the sets are made (default: the system's temporary folder)")
    parser.add_argument("--quick", action="store_true", help="0.1 GB and 2 rounds; no table is written")
    arguments = parser.parse_args()
    gigabytes, rounds = (0.1, 2) if arguments.quick else (arguments.gigabytes, arguments.rounds)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        large, small = Path(temporary) / "large", Path(temporary) / "small"
        samples = int(gigabytes * 1e9 / (PICTURE + 4 * VECTOR)) + 1
        write_folder(large, samples, min(samples // 2, 25_600))
        memory = measure_memory(large, samples, arguments.device)
        write_folder(small, SAMPLES, SAMPLES // 2)
        speed = measure_speed(small, arguments.device, rounds)
    if arguments.quick:
        return
    about = [
        "# The loop on data that are read as they are needed",
        "",
        f"{machine(arguments.device)} (`python -m benchmarks.speed.loading`)",
        "",
        f"Two modalities in turn: {SHAPE} pictures in uint8 and vectors of {VECTOR} numbers. Batch {BATCH}, small "
        f"encoders, `ProjectedSGD` in every loop. Median (p20–p80) of passes over the same {BATCHES} batches, which "
        "take turns. The files are in the system's cache.",
        "",
    ]
    text = "\n".join([*about, *speed, "", "## Memory", "", *memory]) + "\n"
    checkpoint.write_text(RESULTS / f"loading_{arguments.device}.md", text)


if __name__ == "__main__":
    main()
