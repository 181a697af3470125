"""Video files, read by PyAV, which is needed for nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def read_sound(path: Path, rate: int) -> np.ndarray:
    """float32 (samples,): the first audio stream, mono, at `rate` Hz. ValueError where the video has none."""
    av = _av(path)
    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise ValueError("has no sound")
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        frames += resampler.resample(None)
    return np.concatenate([np.zeros(0, np.float32), *(frame.to_ndarray()[0] for frame in frames)])


def read_pictures(path: Path, count: int, start: float, end: float | None) -> list[Image.Image]:
    """`count` frames: those shown in the middle of as many equal parts of the time from `start` to `end` seconds."""
    av = _av(path)
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("has no pictures")
        stream = container.streams.video[0]
        if end is None:
            if container.duration is None:
                raise ValueError("does not say how long it is; extract its frames to a folder")
            end = container.duration / av.time_base
        pictures = []
        for i in range(count):
            time = start + (i + 0.5) * (end - start) / count
            container.seek(max(0, int(time * av.time_base)))  # to a frame before it from which decoding can start
            shown = None
            for frame in container.decode(stream):
                if shown is not None and frame.time is not None and frame.time > time:
                    break
                shown = frame
            if shown is None:
                raise ValueError(f"has no picture at {time:.2f} s")
            pictures.append(shown.to_image())
    return pictures


def _av(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"{path}: reading video files needs PyAV: pip install av; without it, extract sound to .wav files and "
            "frames to folders of .jpg files, where docs/datasets.md says"
        ) from error
    return av
