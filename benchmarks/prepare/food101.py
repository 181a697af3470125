"""UPMC Food-101 (Wang et al. 2015): about 90 000 photographs of 101 dishes and the titles of their web pages.

As in artelab's copy: DIR/images/train/<class>/<class>_0.jpg and DIR/images/test likewise; DIR/texts/train_titles.csv
and test_titles.csv, rows of image name, title and class, with or without a header.

Split: the public one; a tenth of each class of the training samples, drawn with a fixed seed, are for validation.
"""

from __future__ import annotations

from pathlib import Path

from .samples import Clip, Corpus, Sample, check_label, entries, file, folder, hold_out_validation, read_csv


def read(root: Path) -> Corpus:
    classes = tuple(path.name for path in entries(folder(root, "images", "train"), "*") if path.is_dir())
    samples = []
    for split in ("train", "test"):
        pictures = folder(root, "images", split)
        titles = file(root, "texts", f"{split}_titles.csv")
        for number, row in enumerate(read_csv(titles)):
            if len(row) != 3:
                raise ValueError(f"{titles}: expected rows of image, title and class, found {','.join(row)!r}")
            image, title, label = row
            if number == 0 and not Path(image).suffix:
                continue  # a header
            check_label(label, classes, f"{titles}, {image}")
            sources = {"image": Clip((pictures / label / image,)), "text": title}
            samples.append(Sample(f"{split}/{image}", label, split, sources))
    return Corpus(classes, ("text", "image"), hold_out_validation(samples))
