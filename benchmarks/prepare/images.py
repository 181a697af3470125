"""Pictures: photographs, folders of extracted frames, and frames of videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .samples import Clip, visible
from .video import read_pictures

SUFFIXES = (".jpg", ".jpeg", ".png")


def read(clip: Clip, count: int, size: int) -> np.ndarray:
    """uint8 (3 count, size, size): `count` RGB pictures, one after the other, the square in their middle.

    Of a folder, the frames in the middle of `count` equal parts of it in order of name; of a video, of its time.
    ValueError or OSError where it is damaged.
    """
    path = clip.path()
    if path.is_dir():
        frames = [frame for frame in visible(path) if frame.suffix.lower() in SUFFIXES]
        if not frames:
            raise ValueError("is a folder without frames")
        pictures = [_open(frames[(2 * i + 1) * len(frames) // (2 * count)]) for i in range(count)]
    elif path.suffix.lower() in SUFFIXES:
        pictures = [_open(path)] * count
    else:
        pictures = read_pictures(path, count, clip.start, clip.end)
    return np.concatenate([_pixels(picture, size, clip.half) for picture in pictures])


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")


def _pixels(picture: Image.Image, size: int, half: str | None) -> np.ndarray:
    """uint8 (3, size, size)."""
    if half is not None:
        middle = picture.width // 2
        left, right = (0, middle) if half == "left" else (middle, picture.width)
        picture = picture.crop((left, 0, right, picture.height))
    square = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(square).transpose(2, 0, 1)
