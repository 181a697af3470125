"""MVSA-Single (Niu et al. 2016): tweets with a picture, each judged negative, neutral or positive, as MCR Lab gives it.

DIR/data/1.jpg, DIR/data/1.txt and so on; DIR/labelResultAll.txt with lines `1<tab>neutral,positive`, the judgements of
the text and of the picture.

Label, by the rule of the field (Xu and Mao 2017): a pair that is positive and negative is dropped; where one is neutral
the other counts. Split: none comes with the data; 80/10/10 % of each class, drawn with a fixed seed. The lists of the
paper's code, as QMF's, hold only pairs whose two judgements agree: its figures do not compare.
"""

from __future__ import annotations

from pathlib import Path

from .samples import Clip, Corpus, Sample, check_label, file, folder, random_split

CLASSES = ("negative", "neutral", "positive")


def read(root: Path) -> Corpus:
    data, judgements = folder(root, "data"), file(root, "labelResultAll.txt")
    labels = {}
    lines = [line for line in judgements.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    for position, line in enumerate(lines):
        number, *judged = line.replace(",", " ").split()
        if position == 0 and not number.isdecimal():
            continue  # the header
        if not number.isdecimal() or len(judged) != 2:
            raise ValueError(f"{judgements}: expected lines like '1<tab>neutral,positive', found {line!r}")
        label = _agreed(*(check_label(name, CLASSES, f"{judgements}, {number}") for name in judged))
        if label is not None:
            labels[number] = label
    if not labels:
        raise ValueError(f"{judgements}: expected lines like '1<tab>neutral,positive', found none that can be used")
    splits = random_split(list(labels.values()), train=0.8, validation=0.1, test=0.1)
    samples = [
        Sample(n, label, split, {"text": Clip((data / f"{n}.txt",)), "image": Clip((data / f"{n}.jpg",))})
        for (n, label), split in zip(labels.items(), splits, strict=True)
    ]
    return Corpus(CLASSES, ("text", "image"), samples)


def _agreed(text: str, image: str) -> str | None:
    """The label of the pair; None where the two contradict each other."""
    if {text, image} == {"positive", "negative"}:
        return None
    return image if text == "neutral" else text
