"""A folder of .npy files against the .npz of the same arrays."""

import numpy as np
import pytest
import torch
from test_data import LIES, contents

import mla_ext
from mla_ext.multimodal.files import load, load_folder, load_npz


def save_folder(path, arrays):
    path.mkdir()
    for key, array in arrays.items():
        np.save(path / f"{key}.npy", array)
    return path


def test_a_folder_holds_what_an_archive_holds(tmp_path):
    np.savez(tmp_path / "a.npz", **contents())
    folder = save_folder(tmp_path / "a", contents())
    data, expected = load(folder), load(tmp_path / "a.npz")
    assert all(isinstance(features, np.memmap) for features in data.features.values())
    assert (data.modalities, data.classes) == (expected.modalities, expected.classes)
    assert torch.equal(data.labels, expected.labels) and torch.equal(data.split, expected.split)
    for modality in data.modalities:
        having = data.present(modality).nonzero().flatten()
        assert torch.equal(data.rows[modality], expected.rows[modality])
        assert torch.equal(data.read(modality, having), expected.read(modality, having))
    assert data.checksum() == expected.checksum()
    assert mla_ext.load_folder is load_folder and mla_ext.load_npz is load_npz


FOUND_LATER = {"x NaN", "x infinite", "x beyond float32", "x beyond float32, longdouble"}


@pytest.mark.parametrize("name", [name for name in LIES if name not in FOUND_LATER])
def test_a_folder_is_refused_for_the_same_reasons(tmp_path, name):
    """But for numbers that are not finite, which are found when they are read."""
    lie, message = LIES[name]
    arrays = contents()
    lie(arrays)
    folder = save_folder(tmp_path / "a", arrays)
    message = message.replace("type ndarray", "type (?:ndarray|memmap)")
    with pytest.raises(ValueError, match=f"(?s)^{folder}: (?:{message}|x_[ab]: cannot be read as a plain array)"):
        load_folder(folder)


def test_what_is_no_folder_of_data(tmp_path):
    with pytest.raises(OSError, match=r"none: expected a folder of \.npy files"):
        load_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"modalities: missing, the keys are \[\]"):
        load(tmp_path)
    folder = save_folder(tmp_path / "cut", contents())
    whole = (folder / "x_a.npy").read_bytes()
    (folder / "x_a.npy").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="cut: x_a: cannot be read"):
        load(folder)
    (folder / "x_a.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match="cut: x_a: cannot be read"):
        load(folder)


def test_a_name_cannot_lead_out_of_the_folder(tmp_path):
    save_folder(tmp_path / "x_", {"b": np.zeros((12, 2))})
    arrays = contents() | {"modalities": np.array(["a", "/../../x_/b"])}
    with pytest.raises(ValueError, match=r"x_/\.\./\.\./x_/b: missing"):
        load_folder(save_folder(tmp_path / "a", arrays))
