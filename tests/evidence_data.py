"""Small made data for the tests of the evidence."""

import numpy as np


def write_data(path, modalities=2, samples=60, classes=3):
    """Every modality tells the class, in noise; a third of the samples for validation and for test."""
    rng = np.random.default_rng(0)
    y = np.arange(samples) % classes
    arrays = {"modalities": np.array([f"m{i}" for i in range(modalities)]), "y": y}
    arrays |= {"classes": np.array([f"c{i}" for i in range(classes)]), "split": (np.arange(samples) // 3 % 3)}
    for i in range(modalities):
        arrays[f"x_m{i}"] = np.eye(classes)[y] @ rng.normal(size=(classes, 4 + i)) + rng.normal(size=(samples, 4 + i))
    np.savez(path, **arrays)
    return str(path)
