"""Kinetics-Sounds (Arandjelović and Zisserman 2017): the classes of Kinetics-400 that can be seen and heard.

DIR/train, DIR/val and, if you have it, DIR/test hold 10-second clips <id>_<start>_<end>.mp4, either in a folder for
each class (DIR/train/playing_accordion/…) or all in one, with their labels in DIR/annotations/train.csv and so on
(header: label, youtube_id, time_start, time_end, split), as Kinetics is distributed. A whole copy of Kinetics will do:
other classes are passed over. A clip that is in no folder of a class or in no line of the annotations is left out and
named. Beside or instead of the .mp4 there may be its sound as <clip>.wav, and its frames as <clip>/*.jpg. Only clips
that are there count, as many are no longer to be had.

The publication names 34 classes. Kinetics-400 as released has 31 of them, four under another name: those are the
classes here, and `typing`, `fingerpicking` and `patting` if a copy has them.

Split: the one of Kinetics. Without DIR/test, validation clips are the test split, as is usual for Kinetics, and a tenth
of each class of the training clips, drawn with a fixed seed, the validation split.
"""

from __future__ import annotations

from pathlib import Path

from .samples import Clip, Corpus, Sample, entries, folder, hold_out_validation, read_csv, visible

INSTRUMENTS = ("accordion", "bagpipes", "bass guitar", "clarinet", "drums", "guitar", "harmonica", "keyboard", "organ")
INSTRUMENTS += ("piano", "saxophone", "trombone", "trumpet", "violin", "xylophone")
ACTIONS = ("blowing nose", "blowing out candles", "bowling", "chopping wood", "dribbling basketball", "laughing")
ACTIONS += ("mowing lawn", "ripping paper", "shoveling snow", "shuffling cards", "singing", "stomping grapes")
ACTIONS += ("tap dancing", "tapping guitar", "tapping pen", "tickling", "typing", "fingerpicking", "patting")
CLASSES = tuple(sorted((*ACTIONS, *(f"playing {name}" for name in INSTRUMENTS))))
RENAMED = {  # the publication's name: that of Kinetics-400
    "blowing out": "blowing out candles",
    "dribbling ball": "dribbling basketball",
    "mowing the lawn by pushing lawnmower": "mowing lawn",
    "stomping": "stomping grapes",
}
VIDEO = (".mp4", ".mkv", ".webm")
COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def read(root: Path) -> Corpus:
    has_test = (root / "test").is_dir()
    splits = {"train": "train", "val": "validation" if has_test else "test"} | ({"test": "test"} if has_test else {})
    samples, left_out = [], []
    for part, split in splits.items():
        clips, unlabelled = _clips(root, part)
        samples += [_sample(base, label, split) for base, label in clips]
        left_out += unlabelled
    classes = tuple(name for name in CLASSES if any(sample.label == name for sample in samples))
    samples = samples if has_test else hold_out_validation(samples)
    return Corpus(classes, ("audio", "video"), samples, seconds=10.0, left_out=tuple(left_out))


def _clips(root: Path, part: str) -> tuple[list[tuple[Path, str]], list[str]]:
    """(path without suffix, class) of the part's clips that are of a class of ours, and which clips have no label.

    ValueError if no clip is of a class of ours.
    """
    parent = folder(root, part)
    directories = [path for path in entries(parent, "*") if path.is_dir() and _class(path.name) in CLASSES]
    annotations = root / "annotations" / f"{part}.csv"
    if directories:
        clips = [(clip, _class(directory.name)) for directory in directories for clip in _bases(directory)]
        unlabelled = [f"{path} is in no folder of a class" for path in visible(parent) if _is_recording(path)]
    elif annotations.exists():
        labels, bases = _labels(annotations), _bases(parent)
        clips = [(clip, _class(labels[clip.name])) for clip in bases if clip.name in labels]
        unlabelled = [f"{clip} is not in {annotations}" for clip in bases if clip.name not in labels]
    else:
        there = ", ".join(path.name for path in entries(parent, "*")[:5])
        raise ValueError(f"{parent}: expected folders named as classes, or {annotations}; found {there}")
    clips = [(clip, label) for clip, label in clips if label in CLASSES]
    if not clips:
        raise ValueError(f"{parent}: expected clips of the classes {', '.join(CLASSES)}; found none")
    return clips, unlabelled


def _class(name: str) -> str:
    spaced = name.replace("_", " ")
    return RENAMED.get(spaced, spaced)


def _bases(parent: Path) -> list[Path]:
    """The clips in a folder, without suffix: a video, its sound and the folder of its frames are one."""
    paths = [path for path in visible(parent) if path.is_dir() or _is_recording(path)]
    return sorted({path if path.is_dir() else path.with_suffix("") for path in paths})


def _is_recording(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (*VIDEO, ".wav")


def _labels(annotations: Path) -> dict[str, str]:
    """Clip -> label."""
    header, *rows = read_csv(annotations)
    if not set(COLUMNS) <= set(header):
        raise ValueError(f"{annotations}: expected columns {', '.join(COLUMNS)}, found {', '.join(header)}")
    label, name, start, end = (header.index(column) for column in COLUMNS)
    try:
        return {f"{row[name]}_{int(row[start]):06d}_{int(row[end]):06d}": row[label] for row in rows}
    except (ValueError, IndexError) as error:
        raise ValueError(f"{annotations}: expected whole seconds in {COLUMNS[2]} and {COLUMNS[3]}: {error}") from error


def _sample(base: Path, label: str, split: str) -> Sample:
    videos = tuple(base.with_suffix(suffix) for suffix in VIDEO)
    sources = {"audio": Clip((base.with_suffix(".wav"), *videos)), "video": Clip((base, *videos))}
    return Sample(base.name, label, split, sources)
