"""CREMA-D (Cao et al. 2014): 7442 clips of 91 actors who say a sentence in one of six emotions.

DIR/AudioWAV/1001_DFA_ANG_XX.wav and so on, as in the public repository: actor, sentence, emotion, intensity.
The picture: frames in DIR/Image-01-FPS/<clip>/*.jpg, as OGM-GE's code extracts them, else DIR/VideoFlash/<clip>.flv.

Split: DIR/train.csv and DIR/test.csv (rows: clip, emotion), the lists of OGM-GE, if they are there, with a validation
split from val.csv, else drawn from the training list. In those lists the same actors are in training and test. Without
lists the split is ours and by actor: 70/15/15 % of the actors, drawn with a fixed seed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .samples import SEED, Clip, Corpus, Sample, check_label, entries, file, folder, hold_out_validation, read_csv

CLASSES = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
LISTS = {"train.csv": "train", "val.csv": "validation", "test.csv": "test"}


def read(root: Path) -> Corpus:
    sound = folder(root, "AudioWAV")
    if (root / "train.csv").exists() or (root / "test.csv").exists():
        samples = _from_lists(root)
    else:
        samples = _by_actor(root, [path.stem for path in entries(sound, "*.wav")])
    return Corpus(CLASSES, ("audio", "video"), samples, seconds=3.0)


def _from_lists(root: Path) -> list[Sample]:
    lists = {file(root, "train.csv"): "train", file(root, "test.csv"): "test"}
    has_validation = (root / "val.csv").exists()
    if has_validation:
        lists[root / "val.csv"] = "validation"
    samples = []
    for path, split in lists.items():
        for row in read_csv(path):
            if len(row) != 2:
                raise ValueError(f"{path}: expected rows of clip and emotion, found {','.join(row)!r}")
            samples.append(_sample(root, row[0], check_label(row[1], CLASSES, f"{path}, {row[0]}"), split))
    return samples if has_validation else hold_out_validation(samples)


def _by_actor(root: Path, names: list[str]) -> list[Sample]:
    labels = {}
    for name in names:
        parts = name.split("_")
        if len(parts) != 4:
            raise ValueError(f"{root / 'AudioWAV' / name}.wav: expected a name like 1001_DFA_ANG_XX.wav")
        labels[name] = check_label(parts[2], CLASSES, f"{root / 'AudioWAV' / name}.wav")
    actors = sorted({name.split("_")[0] for name in names})
    if len(actors) < 3:
        raise ValueError(f"{root / 'AudioWAV'}: expected at least 3 actors, to split by, found {', '.join(actors)}")
    drawn = np.random.default_rng(SEED).permutation(actors).tolist()
    held = max(1, round(0.15 * len(actors)))
    split = dict.fromkeys(drawn[: 2 * held], "test") | dict.fromkeys(drawn[:held], "validation")
    return [_sample(root, name, labels[name], split.get(name.split("_")[0], "train")) for name in names]


def _sample(root: Path, name: str, label: str, split: str) -> Sample:
    pictures = Clip((root / "Image-01-FPS" / name, root / "VideoFlash" / f"{name}.flv"))
    return Sample(name, label, split, {"audio": Clip((root / "AudioWAV" / f"{name}.wav",)), "video": pictures})
