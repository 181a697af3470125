"""Recordings that are not in memory: memory-mapped arrays, and objects that make them one by one."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mla_ext.multimodal import recordings
from mla_ext.multimodal.data import MultimodalData
from mla_ext.multimodal.recordings import RecordingError

N = 30


class Items:
    """A map-style object over a tensor; `change` makes of recording i what is given out."""

    def __init__(self, values, change=lambda i, x: x):
        self.values, self.change = values, change
        self.asked = []

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.change(i, self.values[i])


def map_to(path, array):
    """The array as a file that is memory-mapped."""
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def make(features, **more):
    """Every sample its recordings, but 3 and 4 share one and 5 has none of "a"; "b" is a vector."""
    rows = torch.arange(N)
    rows[4], rows[5] = 3, -1
    vectors = torch.randn(N, 2, generator=torch.Generator().manual_seed(1))
    split = torch.tensor([0, 0, 0, 1, 2], dtype=torch.int8).repeat(N // 5)
    both = {"a": features, "b": vectors}
    return MultimodalData(
        ("a", "b"), both, {"a": rows, "b": torch.arange(N)}, rows.abs() % 3, tuple("xyz"), split, **more
    )


def values(dtype=np.float32):
    return (np.random.default_rng(0).standard_normal((N, 3, 4)) * 50 + 100).astype(dtype)


def kinds(tmp_path, array):
    in_memory = recordings.as_tensor(array)
    return {"memory": in_memory, "mapped": map_to(tmp_path / "a.npy", array), "items": Items(in_memory)}


@pytest.mark.parametrize("dtype", ["?", "u1", ">i2", "u2", "f2", "f4", ">f8", "g"])
def test_every_kind_reads_the_same(tmp_path, dtype):
    """The same bits and dtypes, standardised or not; the same checksum."""
    found = {kind: make(features) for kind, features in kinds(tmp_path, values(dtype)).items()}
    memory = found.pop("memory")
    indices = torch.tensor([4, 0, 29, 3, 0])
    for data in found.values():
        assert data.shape("a") == (3, 4)
        assert torch.equal(data.read("a", indices), memory.read("a", indices))
        assert data.read("a", indices).dtype == memory.features["a"].dtype
        assert data.inputs("a", indices).dtype == torch.float32
        assert data.inputs("a", indices[:0]).shape == (0, 3, 4)
        assert torch.equal(data.example("a"), memory.example("a"))
        standard, expected = data.standardized(), memory.standardized()
        assert torch.equal(standard.inputs("a", indices), expected.inputs("a", indices))
        assert torch.equal(standard.features["a"][7], expected.features["a"][7])
        assert (data.checksum(), standard.checksum()) == (memory.checksum(), expected.checksum())


def test_standardizing_does_not_read_what_no_training_sample_has(monkeypatch):
    monkeypatch.setattr(recordings, "_PART", 12)  # a recording at a time
    items = Items(torch.from_numpy(values()))
    data = make(items)
    items.asked.clear()
    data.standardized()
    training = set(data.rows["a"][data.indices("train", "a")].tolist())
    assert set(items.asked) - {0} == training - {0}  # the first tells the shape


def test_training_features_are_for_training_alone():
    plain = torch.from_numpy(values())
    data = make(plain, training_features={"a": Items(plain, lambda i, x: x + 1000)})
    indices = torch.tensor([1, 4])
    assert torch.equal(data.read("a", indices, training=True), plain[[1, 3]] + 1000)
    assert torch.equal(data.read("b", indices, training=True), data.features["b"][indices])
    assert torch.equal(data.inputs("a", indices), plain[[1, 3]])
    standard = data.standardized()  # by the statistics of what evaluation reads
    scale = plain[data.rows["a"][data.indices("train", "a")]].std(dim=0, correction=0)
    difference = standard.read("a", indices, training=True) - standard.read("a", indices)
    torch.testing.assert_close(difference, (1000 / scale).expand(2, 3, 4), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("training_features", "message"),
    [
        ({"c": torch.zeros(N, 3, 4)}, r"training_features: keys are \['c'\], expected some of \('a', 'b'\)"),
        ({"a": torch.zeros(N - 1, 3, 4)}, r"training_features\['a'\]: has 29 recordings of .*, expected 30 of shape"),
        (
            {"a": Items(torch.zeros(N, 4, 3))},
            r"training_features\['a'\]: has 30 recordings of shape \(4, 3\), expected",
        ),
        ({"a": np.zeros((N, 3, 4))}, r"training_features\['a'\]: has type ndarray"),
    ],
)
def test_training_features_are_checked(training_features, message):
    with pytest.raises(ValueError, match=message):
        make(torch.from_numpy(values()), training_features=training_features)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (values(), "x_a: has type ndarray, .* expected numbers .* a memory-mapped array, or an object with __len__"),
        (None, "x_a: has type NoneType"),
        (Items([]), "x_a: is empty, expected at least one recording"),
        (Items([(1, 2)]), "x_a: recording 0: has type tuple, expected a tensor of numbers"),
        (Items([torch.zeros(())]), r"x_a: recording 0: has type Tensor, .* shape \(\), expected a tensor"),
        (Items([torch.zeros(2, dtype=torch.complex64)]), "x_a: recording 0: has type Tensor, dtype torch.complex64"),
        (Items([torch.tensor([torch.nan])]), r"x_a: recording 0: has NaN or infinite values"),
        (Items([torch.zeros(2)], lambda i, x: 1 / 0), "x_a: recording 0: cannot be read: ZeroDivisionError: division"),
    ],
)
def test_what_cannot_be_recordings_is_refused(features, message):
    with pytest.raises(ValueError, match=message):
        make(features)


def test_a_mapped_array_of_something_else_is_refused(tmp_path):
    for array in (np.zeros(N), np.zeros((N, 2), complex), np.full((N, 2), "x")):
        with pytest.raises(ValueError, match=r"x_a: has type memmap.* expected numbers of shape"):
            make(map_to(tmp_path / "a.npy", array))


def spoiled(i, x):
    if i == 7:
        raise OSError("image file is truncated")
    if i == 8:
        return x[:2]
    if i == 9:
        return x.double()
    if i == 10:
        return x / 0
    return x


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (7, r"sample 7, modality 'a' \(recording 7\): cannot be read: OSError: image file is truncated"),
        (8, r"sample 8, .* shape \(2, 4\), expected type Tensor, .* shape \(3, 4\), as sample 1, modality 'a'"),
        (9, r"sample 9, .* dtype torch.float64 .* expected type Tensor, dtype torch.float32"),
        (10, r"sample 10, modality 'a' \(recording 10\): has NaN or infinite values"),
    ],
)
def test_a_recording_that_cannot_be_read_is_named(sample, message):
    data = make(Items(torch.from_numpy(values()), spoiled))
    with pytest.raises(RecordingError, match=message):
        data.inputs("a", torch.tensor([1, sample, 2]))
    assert issubclass(RecordingError, RuntimeError)


def test_a_mapped_recording_that_is_not_finite_is_named_by_its_sample(tmp_path):
    array = values("f8")
    array[3, 1, 1] = 1e300  # beyond float32
    data = make(map_to(tmp_path / "a.npy", array))
    with pytest.raises(RecordingError, match=r"sample 4, modality 'a' \(recording 3\): has NaN or infinite"):
        data.inputs("a", torch.tensor([1, 4]))
    assert data.inputs("a", torch.tensor([1, 2])).isfinite().all()


def test_random_transforms_depend_on_the_seed_and_the_recording_alone():
    def jitter(i, x):
        return x + torch.rand(()) + random.random() + np.random.rand()

    data = make(Items(torch.zeros(N, 3, 4), jitter))
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = (torch.rand(2).tolist(), random.random(), np.random.rand())
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    first = data.read("a", torch.tensor([1, 2, 6]), seed=5)
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected  # ours to draw from, not to change
    assert torch.equal(first[[2, 0]], data.read("a", torch.tensor([6, 1]), seed=5))
    assert len({x.flatten()[0].item() for x in first}) == 3
    assert not torch.equal(first, data.read("a", torch.tensor([1, 2, 6]), seed=6))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what is resident")
def test_what_was_read_does_not_stay_resident(tmp_path):
    def mapped_megabytes():
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssFile"))

    array = map_to(tmp_path / "a.npy", np.ones((64, 2**20), np.uint8))
    before = mapped_megabytes()
    for part in recordings.whole(array):
        assert part.all()
    assert mapped_megabytes() - before < 16  # of 64
    assert array[:].all() and mapped_megabytes() - before > 48  # the test can tell


def test_other_fields_change_without_reading(tmp_path):
    data = make(map_to(tmp_path / "a.npy", values()))
    missing = data.with_missing(0.3, seed=0)
    assert missing.features["a"] is data.features["a"]
    assert replace(data, classes=tuple("uvw")).features["a"] is data.features["a"]
