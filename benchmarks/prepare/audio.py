"""Sound: any recording to 16 kHz mono, and log-mel spectrograms of it."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor

from .samples import Clip
from .video import read_sound

RATE = 16_000  # Hz
WINDOW, HOP, FFT = 400, 320, 512  # samples: 25 ms windows, 20 ms apart
BANDS = 64  # from 0 to 8 kHz
FLOOR = 1e-6  # of the power, before the logarithm; a full-scale sine has about 1e4


def read(clip: Clip) -> np.ndarray:
    """float32 (samples,): the recording at 16 kHz, its channels averaged, full scale ±1.

    A wav file is read by SciPy, the sound of a video by PyAV. ValueError or OSError where it is damaged.
    """
    path = clip.path()
    wave = _read_wav(path) if path.suffix.lower() == ".wav" else read_sound(path, RATE)
    if len(wave) == 0:
        raise ValueError("holds no sound")
    if not np.isfinite(wave).all():
        raise ValueError("holds values that are not finite")
    return wave


def log_mel(waves: Sequence[np.ndarray], seconds: float) -> np.ndarray:
    """float16 (N, 64, frames): log power in mel bands by time, of the first `seconds`; shorter ones end in silence."""
    samples = round(seconds * RATE)
    padded = torch.zeros(len(waves), samples)
    for row, wave in zip(padded, waves, strict=True):
        part = torch.from_numpy(wave[:samples])
        row[: len(part)] = part
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(padded, FFT, HOP, WINDOW, window, center=False, return_complex=True)
    power = mel_filters() @ (spectrum.real.square() + spectrum.imag.square())
    return (power + FLOOR).log().half().numpy()


@functools.cache
def mel_filters() -> Tensor:
    """(64, FFT // 2 + 1): triangles of height 1, equally spaced in mel, 2595 log10(1 + f / 700)."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + RATE / 2 / 700), BANDS + 2) / 2595) - 1)
    lower, centre, upper = (edges[i : BANDS + i, None] for i in range(3))
    frequency = np.arange(FFT // 2 + 1) * RATE / FFT
    triangles = np.minimum((frequency - lower) / (centre - lower), (upper - frequency) / (upper - centre))
    return torch.from_numpy(triangles.clip(0)).float()


def _read_wav(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that hold no sound
        warnings.filterwarnings("error", "Reached EOF", wavfile.WavFileWarning)
        rate, wave = wavfile.read(path)
    if wave.dtype == np.uint8:  # the only unsigned format
        wave = wave.astype(np.float32) / 128 - 1
    elif wave.dtype.kind == "i":  # 24-bit samples come in the upper bits of 32
        wave = wave.astype(np.float32) / -float(np.iinfo(wave.dtype).min)
    if wave.ndim == 2:
        wave = wave.mean(axis=1)
    shared = math.gcd(rate, RATE)
    if rate != RATE and len(wave):
        wave = resample_poly(wave, RATE // shared, rate // shared)
    return wave.astype(np.float32)
