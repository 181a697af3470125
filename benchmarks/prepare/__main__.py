"""`python -m benchmarks.prepare NAME --root DIR --out PATH`: a local copy of a dataset in the common format."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cremad, food101, iemocap, kinetics_sounds, mvsa
from .build import Encoder, Options, build, load_encoder
from .samples import Corpus, folder

DATASETS = {
    "crema-d": cremad,
    "kinetics-sounds": kinetics_sounds,
    "food-101": food101,
    "mvsa-single": mvsa,
    "iemocap": iemocap,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for what is not as expected, with one line on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        corpus = DATASETS[arguments.name].read(folder(arguments.root))
        corpus = _with_modalities(corpus, arguments.modalities)
        options = Options(
            encoders=_encoders(corpus, arguments.encoder),
            frames=arguments.frames,
            size=arguments.size,
            form=arguments.format,
            tokenizer=arguments.tokenizer,
            skip_damaged=arguments.skip_damaged,
            progress=arguments.progress,
        )
        summary = build(corpus, arguments.out, options)
    except (ValueError, OSError, ImportError) as error:
        print("prepare: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    for message in (*corpus.left_out, *summary.damaged):
        print("left out:", message, file=sys.stderr)
    if summary.damaged:
        print(f"{len(summary.damaged)} recordings left out, {summary.dropped} samples with them", file=sys.stderr)
    counts = ", ".join(f"{count} {split}" for split, count in summary.samples.items())
    print(f"{arguments.out}: {len(corpus.classes)} classes; samples: {counts}")
    for modality, shape in summary.shapes.items():
        print(f"  {modality}: {shape[0]} recordings of shape {shape[1:]}")
    return 0


def _with_modalities(corpus: Corpus, names: Sequence[str] | None) -> Corpus:
    unknown = [name for name in names or () if name not in corpus.modalities]
    if unknown:
        raise ValueError(f"--modalities: expected some of {', '.join(corpus.modalities)}, got {', '.join(unknown)}")
    kept = tuple(name for name in corpus.modalities if names is None or name in names)
    return dataclasses.replace(corpus, modalities=kept)


def _encoders(corpus: Corpus, named: Sequence[str]) -> dict[str, Encoder]:
    encoders = {}
    for argument in named:
        modality, _, name = argument.partition("=")
        if modality not in corpus.modalities:
            raise ValueError(f"--encoder: expected one of {', '.join(corpus.modalities)} before '=', got {argument!r}")
        encoders[modality] = load_encoder(modality, name)
    return encoders


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare", description=__doc__)
    parser.add_argument("name", choices=tuple(DATASETS), help="where each is expected: docs/datasets.md")
    parser.add_argument("--root", type=Path, required=True, help="folder of your copy")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="a file is replaced")
    forms = "one .npz, or a folder of .npy files that training need not hold in memory (default %(default)s)"
    parser.add_argument("--format", choices=("npz", "folder"), default=Options.form, help=forms)
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="MODALITY=MODULE:FUNCTION",
        help="store what this Python function makes of a batch of recordings",
    )
    parser.add_argument("--frames", type=_positive, default=Options.frames, help="of a video (default %(default)s)")
    parser.add_argument("--size", type=_positive, default=Options.size, help="of images, pixels (default %(default)s)")
    tokens = "store texts as token ids of this tokenizer of transformers (default: tf-idf)"
    parser.add_argument("--tokenizer", metavar="NAME", help=tokens)
    parser.add_argument("--skip-damaged", action="store_true", help="leave out what is missing or unreadable")
    parser.add_argument("--no-progress", action="store_false", dest="progress", help="show no progress bars")
    return parser


if __name__ == "__main__":
    sys.exit(main())
