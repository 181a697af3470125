"""How the demo data is made of digit labels (N,): tones, misspelled names, noisy images and a stratified split."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

__all__ = ["NAMES", "keypad_tones", "misspelled_names", "noisy_images", "stratified_split"]

# Noise of each modality, set so that audio dominates and text is weakest.
AUDIO_NOISE = 3.3  # standard deviation; each of a tone's two sines has amplitude about 1
IMAGE_NOISE = 5.7  # standard deviation; pixels are 0..16
TYPOS = 4  # per name

SAMPLE_RATE = 8000  # Hz
WINDOW, HOP, FRAMES = 256, 128, 12  # samples, samples, windows
BANDS = slice(20, 52)  # of the WINDOW // 2 + 1 frequencies SAMPLE_RATE / WINDOW apart: 625 to 1594 Hz
KEYPAD_ROWS, KEYPAD_COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)  # Hz
KEYPAD = ("123", "456", "789", " 0 ")

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ALPHABET = "".join(sorted(set("".join(NAMES))))
TYPO_KINDS = ("drop", "swap", "replace", "duplicate")


def keypad_tones(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) -> float32 (N, 32, 12): log power by frequency and time of the digit's key (DTMF) in white noise.

    Phases, amplitude, onset and duration are random.
    """
    samples = WINDOW + (FRAMES - 1) * HOP
    keys = [next((r, row.index(name)) for r, row in enumerate(KEYPAD) if name in row) for name in "0123456789"]
    frequencies = np.array([(KEYPAD_ROWS[row], KEYPAD_COLUMNS[column]) for row, column in keys])[labels]
    time = np.arange(samples)
    phase = rng.uniform(0, 2 * np.pi, frequencies.shape)
    waves = np.sin(2 * np.pi / SAMPLE_RATE * frequencies[..., None] * time + phase[..., None]).sum(axis=1)
    duration = rng.integers(samples // 3, samples, (len(labels), 1))
    onset = (rng.random((len(labels), 1)) * (samples - duration)).astype(int)
    sounding = (time >= onset) & (time < onset + duration)
    signal = rng.uniform(0.7, 1.3, (len(labels), 1)) * waves * sounding
    signal += AUDIO_NOISE * rng.standard_normal(signal.shape)
    windows = np.lib.stride_tricks.sliding_window_view(signal, WINDOW, axis=1)[:, ::HOP]
    power = np.abs(np.fft.rfft(windows * np.hanning(WINDOW))[..., BANDS]) ** 2
    spectrograms: np.ndarray = np.log(power + 1e-6).swapaxes(1, 2).astype(np.float32, order="C")
    return spectrograms


def noisy_images(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images of pixels 0..16 -> float32 of that shape, with white noise added."""
    return (images + IMAGE_NOISE * rng.standard_normal(images.shape)).astype(np.float32)


def misspelled_names(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) -> float32 (N, A + (A+1)²), A = 15 letters: counts of letters, then of pairs, of the misspelled name.

    A space stands for either end of the name in a pair.
    """
    kinds = rng.choice(TYPO_KINDS, (len(labels), TYPOS))
    places = rng.random((len(labels), TYPOS))
    letters = rng.choice(list(ALPHABET), (len(labels), TYPOS))
    symbols = ALPHABET + " "
    counts = np.zeros((len(labels), len(ALPHABET) + len(symbols) ** 2), dtype=np.float32)
    for i, label in enumerate(labels):
        name = NAMES[label]
        for kind, place, letter in zip(kinds[i], places[i], letters[i], strict=True):
            name = _misspell(name, kind, place, letter)
        codes = [symbols.index(symbol) for symbol in f" {name} "]
        np.add.at(counts[i], codes[1:-1], 1)
        pairs = [len(ALPHABET) + len(symbols) * a + b for a, b in itertools.pairwise(codes)]
        np.add.at(counts[i], pairs, 1)
    return counts


def _misspell(name: str, kind: str, place: float, letter: str) -> str:
    """One typo, at `place` in [0, 1) of the name, which may have become empty."""
    span = 2 if kind == "swap" else 1
    at = int(place * max(0, len(name) - span + 1))
    here = name[at : at + span]
    typed = {"drop": "", "swap": here[::-1], "replace": letter, "duplicate": 2 * here}[kind]
    return name[:at] + typed + name[at + span :]


def stratified_split(labels: np.ndarray, fractions: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """(N,) -> int8 (N,): a random part of each class in each split, in these fractions (that sum to 1)."""
    split = np.empty(len(labels), dtype=np.int8)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        bounds = np.rint(np.cumsum(fractions)[:-1] * len(members)).astype(int)
        for part, chosen in enumerate(np.split(members, bounds)):
            split[chosen] = part
    return split
