"""MultimodalData, the .npz format with every way it can lie, and the built-in demo data."""

import builtins
import io
import random
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.stress.fuzz import contents as small_file
from mla_ext.multimodal.data import SPLITS, MultimodalData, digits
from mla_ext.multimodal.files import load_npz
from mla_ext.multimodal.synthesis import NAMES, _misspell, keypad_tones, stratified_split

N = small_file.SAMPLES


def contents() -> dict[str, np.ndarray]:
    """Of a small valid file: "a" has 5 recordings that samples share or lack, "b" one for each sample."""
    return small_file.contents() | {"speaker": np.arange(N)}  # an extra


@pytest.fixture
def save(tmp_path):
    def write(arrays):
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return path

    return write


@pytest.fixture
def data(save) -> MultimodalData:
    return load_npz(save(contents()))


@pytest.fixture(scope="module")
def demo() -> MultimodalData:
    return digits()


def same(first: MultimodalData, second: MultimodalData) -> bool:
    return (
        first.modalities == second.modalities
        and torch.equal(first.labels, second.labels)
        and torch.equal(first.split, second.split)
        and all(torch.equal(first.features[m], second.features[m]) for m in first.modalities)
        and all(torch.equal(first.rows[m], second.rows[m]) for m in first.modalities)
    )


# --- load_npz


def test_load_keeps_what_is_stored(data):
    arrays = contents()
    assert len(data) == N
    assert data.modalities == ("a", "b")
    assert data.classes == ("x", "y", "z")
    assert data.features["a"].dtype == torch.float16
    assert data.features["b"].dtype == torch.uint8
    assert data.labels.dtype == data.rows["a"].dtype == torch.int64
    assert data.split.dtype == torch.int8
    for modality in data.modalities:
        np.testing.assert_array_equal(data.features[modality].numpy(), arrays[f"x_{modality}"])
    assert data.rows["a"].tolist() == arrays["row_a"].tolist()
    assert data.rows["b"].tolist() == list(range(N))
    assert data.labels.tolist() == arrays["y"].tolist()
    assert data.split.tolist() == arrays["split"].tolist()


@pytest.mark.parametrize("dtype", ["?", "i1", ">i2", "u2", "u4", "u8", ">f4", "f8", "g"])
def test_load_any_numeric_dtype(save, dtype):
    stored = np.asfortranarray(contents()["x_b"] % 100).astype(dtype)
    data = load_npz(save(contents() | {"x_b": stored}))
    indices = torch.tensor([3, 1])
    np.testing.assert_array_equal(data.inputs("b", indices).numpy(), stored[[3, 1]].astype(np.float32))


@pytest.mark.parametrize("dtype", ["u1", ">i4", "u8"])
def test_load_any_integer_dtype(save, data, dtype):
    arrays = contents()
    assert same(load_npz(save(arrays | {key: arrays[key].astype(dtype) for key in ("y", "split")})), data)


def with_value(key, place, value):
    def lie(arrays):
        array = arrays[key].copy()
        array[place] = value
        arrays[key] = array

    return lie


def with_array(key, array):
    return lambda arrays: arrays.__setitem__(key, np.asarray(array))


def without(key):
    return lambda arrays: arrays.pop(key)


def several(*lies):
    return lambda arrays: [lie(arrays) for lie in lies]


LIES = {
    "no modalities": (without("modalities"), r"modalities: missing"),
    "no x": (without("x_b"), r"x_b: missing, the keys are \['classes'"),
    "no y": (without("y"), r"y: missing"),
    "no classes": (without("classes"), r"classes: missing"),
    "no split": (without("split"), r"split: missing"),
    "modalities empty": (with_array("modalities", np.array([], dtype=str)), "modalities: is empty"),
    "modalities twice": (with_array("modalities", ["a", "a"]), "modalities: .* no name twice"),
    "modalities nameless": (with_array("modalities", ["a", ""]), "modalities: .* non-empty names"),
    "modalities numbers": (with_array("modalities", [1, 2]), "modalities: has type ndarray, dtype int64"),
    "modalities scalar": (with_array("modalities", "a"), r"modalities: .*shape \(\), expected a one-dim"),
    "modalities of no characters": (
        with_array("modalities", np.full(2, 2**31, "<u4").view("<U1")),
        "modalities: .* do not exist",
    ),
    "classes twice": (with_array("classes", ["x", "y", "x"]), "classes: .* no name twice"),
    "classes numbers": (with_array("classes", [0, 1, 2]), "classes: has type ndarray, dtype int64"),
    "x text": (with_array("x_b", np.full((N, 4), "?")), "x_b: has type ndarray, dtype <U1 .* expected numbers"),
    "x complex": (with_array("x_b", np.zeros((N, 4), complex)), "x_b: has type ndarray, dtype complex128"),
    "x scalar": (with_array("x_b", 1.0), r"x_b: has type ndarray, dtype float64 and shape \(\)"),
    "x one-dimensional": (with_array("x_b", np.zeros(N)), r"x_b: .* shape \(12,\), expected .* \(recordings, feat"),
    "x without features": (with_array("x_b", np.zeros((N, 0))), r"x_b: .* shape \(12, 0\)"),
    "x without recordings": (
        several(with_array("x_a", np.zeros((0, 2))), with_array("row_a", np.full(N, -1))),
        r"x_a: .* shape \(0, 2\)",
    ),
    "x NaN": (with_value("x_a", ([3, 2], [0, 1], [2, 0]), np.nan), r"x_a: 2 of 30 .* first is nan at \[2, 1, 0\]"),
    "x infinite": (with_value("x_a", (4, 0, 0), -np.inf), r"x_a: 1 of 30 .* first is -inf at \[4, 0, 0\]"),
    "x beyond float32": (with_array("x_b", np.full((N, 4), 1e300)), r"x_b: 48 of 48 .* 1e\+300 at \[0, 0\]"),
    "x beyond float32, longdouble": (with_array("x_b", np.full((N, 4), 1e300, "g")), r"x_b: 48 of 48"),
    "x too long, no row": (with_array("x_b", np.zeros((N + 1, 4))), r"x_b: has 13 rows for 12 samples.* key row_b"),
    "row short": (with_array("row_a", [0, 1]), "row_a: has length 2, expected 12"),
    "row float": (with_array("row_a", np.zeros(N)), "row_a: has type ndarray, dtype float64 .* integers"),
    "row boolean": (with_array("row_a", np.zeros(N, bool)), "row_a: has type ndarray, dtype bool"),
    "row two-dimensional": (with_array("row_a", np.zeros((N, 1), int)), r"row_a: .* shape \(12, 1\)"),
    "row too large": (with_value("row_a", 3, 5), r"row_a: 1 of 12 .* first is 5 at 3; expected -1\.\.4"),
    "row below -1": (with_value("row_a", 3, -2), r"row_a: 1 of 12 .* first is -2 at 3"),
    "row wraps to -1": (with_array("row_a", np.full(N, 2**64 - 1, np.uint64)), "row_a: holds 18446744073709551615"),
    "y float": (with_array("y", np.zeros(N)), "y: has type ndarray, dtype float64"),
    "y two-dimensional": (with_array("y", np.zeros((N, 3), int)), r"y: .* shape \(12, 3\)"),
    "y scalar": (with_array("y", 0), r"y: .* shape \(\)"),
    "y too large": (with_value("y", 7, 3), r"y: 1 of 12 .* first is 3 at 7; expected 0\.\.2"),
    "y negative": (with_value("y", [7, 9], -1), "y: 2 of 12 .* first is -1 at 7"),
    "y long": (with_array("y", np.zeros(N + 1, int)), r"x_b: has 12 rows for 13 samples"),
    "split of 3": (with_value("split", 5, 3), r"split: 1 of 12 .* first is 3 at 5; expected 0\.\.2"),
    "split negative": (with_value("split", 5, -1), "split: 1 of 12"),
    "split wraps to 0": (with_array("split", [256] * N), "split: 12 of 12 .* first is 256"),
    "split short": (with_array("split", [0] * 3), "split: has length 3, expected 12"),
    "split float": (with_array("split", np.zeros(N)), "split: has type ndarray, dtype float64"),
    "no training sample": (with_array("split", [1] * 6 + [2] * 6), r"split: has no training sample"),
    "no samples": (
        several(*(with_array(key, np.zeros(0, int)) for key in ("y", "split", "row_a", "row_b"))),
        "y: has no samples",
    ),
    "samples of nothing": (
        several(with_array("row_b", [0] * 7 + [-1] * 5)),
        "row_a, row_b: 2 of 12 samples have no modality at all, the first is sample 7",
    ),
    "x pickled": (with_array("x_b", np.array([[1], [None]], dtype=object)), "x_b: cannot be read .*pickle"),
    "modalities pickled": (with_array("modalities", np.array(["a", "b"], dtype=object)), "modalities: .*pickle"),
}


@pytest.mark.parametrize("name", LIES)
def test_load_refuses(save, name):
    lie, message = LIES[name]
    arrays = contents()
    lie(arrays)
    path = save(arrays)
    with pytest.raises(ValueError, match=f"(?s)^{path}: {message}"):
        load_npz(path)


def test_load_does_not_unpickle(save, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "fired"), "w"))

    with pytest.raises(ValueError, match="pickle"):
        load_npz(save(contents() | {"y": np.array([Bomb()], dtype=object)}))
    assert not (tmp_path / "fired").exists()


def test_load_ignores_extras(save, data):
    assert same(load_npz(save(contents() | {"extra": np.array([None], dtype=object), "x_c": np.zeros(1)})), data)


def test_load_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_npz(tmp_path / "none.npz")


def test_load_other_files(tmp_path):
    path = tmp_path / "other.npz"
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    for content, message in ((b"", "cut short"), (b"text", "cut short"), (single.getvalue(), "single .npy array")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_npz(path)


def test_load_archive_of_other_files(tmp_path):
    path = tmp_path / "other.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("modalities", "a b")
    with pytest.raises(ValueError, match="modalities: is no array but 3 raw bytes"):
        load_npz(path)


def test_load_truncated(save):
    path = save(contents())
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is not a readable \.npz file, or is cut short"):
            load_npz(path)


def test_load_truncated_member(save):
    """The archive is whole, an array in it is not."""
    path = save({key: array for key, array in contents().items() if key != "x_b"})
    member = io.BytesIO()
    np.save(member, contents()["x_b"])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_b.npy", member.getvalue()[:-5])
    with pytest.raises(ValueError, match="x_b: cannot be read"):
        load_npz(path)


def test_load_damaged(save):
    """A flipped byte is found or harmless; nothing but ValueError comes out."""
    path = save(contents())
    whole = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            load_npz(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 100


# --- MultimodalData


def test_made_by_hand_is_checked(data):
    with pytest.raises(ValueError, match=r"features: keys are \['a'\], expected \('a', 'b'\)"):
        replace(data, features={"a": data.features["a"]})
    with pytest.raises(ValueError, match="rows: keys"):
        replace(data, rows=data.rows | {"c": data.rows["a"]})
    with pytest.raises(ValueError, match="y: has type list"):
        replace(data, labels=data.labels.tolist())
    with pytest.raises(ValueError, match="x_a: has type ndarray"):
        replace(data, features=data.features | {"a": data.features["a"].numpy()})
    with pytest.raises(ValueError, match=r"x_a: .* NaN"):
        replace(data, features=data.features | {"a": data.features["a"] * torch.nan})
    narrow = replace(data, labels=data.labels.to(torch.int32), split=data.split.long())
    assert same(narrow, data)
    assert (narrow.labels.dtype, narrow.split.dtype) == (torch.int64, torch.int8)


def test_present(data):
    assert data.present("a").tolist() == [i not in (7, 9) for i in range(N)]
    assert data.present("b").dtype == torch.bool
    assert data.present("b").all()


def test_indices(data):
    assert data.indices("train").tolist() == list(range(8))
    assert data.indices("train", "a").tolist() == list(range(7))
    assert data.indices("validation", "a").tolist() == [8]
    assert data.indices("validation", "b").tolist() == [8, 9]
    assert data.indices("test").dtype == torch.int64


def test_inputs(data):
    inputs = data.inputs("a", torch.tensor([5, 4, 5]))
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs, data.features["a"][[0, 4, 0]].float())
    assert data.inputs("b", torch.tensor([], dtype=torch.int64)).shape == (0, 4)


def test_argument_errors(data):
    for call in (data.present, lambda m: data.indices("train", m), lambda m: data.inputs(m, torch.tensor([0]))):
        with pytest.raises(ValueError, match=r"modality must be one of \('a', 'b'\), got 'c'"):
            call("c")
    with pytest.raises(ValueError, match=r"split must be one of .*'validation'.*, got 'val'"):
        data.indices("val")
    with pytest.raises(ValueError, match="have modality 'a': 2 of 3 lack it, the first is sample 9"):
        data.inputs("a", torch.tensor([0, 9, 7]))
    for index in (-1, N):
        with pytest.raises(ValueError, match=rf"indices must lie in 0\.\.11, got {index}"):
            data.inputs("b", torch.tensor([0, index]))
    for indices in ([0], torch.tensor(0), torch.tensor([0.0]), torch.tensor([True] * N)):
        with pytest.raises(TypeError, match="indices must be a one-dimensional int64 tensor"):
            data.inputs("b", indices)
    for rate in (-0.1, 1.1, float("nan"), "0.5", True):
        with pytest.raises(ValueError, match="rate must be a number from 0 to 1"):
            data.with_missing(rate, 0)
    for seed in (-1, 0.5, None, True):
        with pytest.raises(ValueError, match="seed must be a non-negative integer"):
            data.with_missing(0.5, seed)
        with pytest.raises(ValueError, match="seed must be a non-negative integer"):
            digits(seed)


# --- standardized


def test_standardized_training_statistics(data):
    standard = data.standardized()
    for modality in data.modalities:
        training = data.inputs(modality, data.indices("train", modality)).double()  # shared recordings repeat
        centred = data.features[modality].double() - training.mean(dim=0)
        expected = centred / training.std(dim=0, correction=0)
        torch.testing.assert_close(standard.features[modality], expected.float(), rtol=1e-6, atol=1e-6)
        assert standard.features[modality].is_contiguous()
    assert data.features["b"].dtype == torch.uint8  # the original is as it was


def test_standardized_ignores_other_samples(data):
    """Neither the other splits nor training samples without the modality change the statistics."""
    other = data.features["b"].clone()
    other[8:] = 255 - other[8:]
    rows = data.rows["b"].clone()
    rows[7] = -1
    lacking = replace(data, rows=data.rows | {"b": rows, "a": torch.zeros(N, dtype=torch.int64)})
    changed = replace(lacking, features=data.features | {"b": other})
    first, second = lacking.standardized().features["b"], changed.standardized().features["b"]
    assert torch.equal(first[:8], second[:8])
    assert not torch.equal(first[8:], second[8:])
    torch.testing.assert_close(first[:7].mean(dim=0), torch.zeros(4), rtol=0, atol=1e-6)


def test_standardized_constant_and_offset_features(data):
    """A constant is 0 everywhere, whatever the other splits hold; a large offset does not drown a small spread."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(N, dtype=torch.float64, generator=generator)
    features = torch.stack([torch.full((N,), 0.1, dtype=torch.float64), 1e9 + spread], dim=1)
    features[10, 0] = 5.0
    standard = replace(data, features=data.features | {"b": features}).standardized().features["b"]
    assert torch.equal(standard[:, 0], torch.zeros(N))
    expected = (spread - spread[:8].mean()) / spread[:8].std(correction=0)
    torch.testing.assert_close(standard[:, 1], expected.float(), rtol=1e-5, atol=1e-5)


def test_standardized_in_parts():
    """More rows than one part holds."""
    generator = torch.Generator().manual_seed(0)
    x = (100 * torch.randn(50, 100_000, generator=generator) + 1000).half()
    every = torch.arange(50)
    split = torch.zeros(50, dtype=torch.int8)
    standard = MultimodalData(("a",), {"a": x}, {"a": every}, every, tuple(map(str, range(50))), split).standardized()
    expected = (x.double() - x.double().mean(dim=0)) / x.double().std(dim=0, correction=0)
    torch.testing.assert_close(standard.features["a"], expected.float(), rtol=1e-5, atol=1e-5)


def test_standardized_without_training_samples(data):
    rows = data.rows["a"].clone()
    rows[:8] = -1
    with pytest.raises(ValueError, match="modality 'a': no training sample has it"):
        replace(data, rows=data.rows | {"a": rows}).standardized()


# --- with_missing


@given(rate=st.floats(0, 1), higher=st.floats(0, 1), seed=st.integers(0, 2**63), gaps=st.integers(0, 2**16))
@settings(max_examples=50, deadline=None, database=None)
def test_with_missing_invariants(rate, higher, seed, gaps):
    rate, higher = sorted((rate, higher))
    rows = np.random.default_rng(gaps).integers(-1, 4, (3, 40))
    rows[0, (rows < 0).all(axis=0)] = 0
    modalities = ("a", "b", "c")
    data = MultimodalData(
        modalities,
        {m: torch.zeros(4, 2) for m in modalities},
        dict(zip(modalities, torch.from_numpy(rows), strict=True)),
        torch.zeros(40, dtype=torch.int64),
        ("one",),
        torch.arange(40) % 3,
    )
    state = torch.get_rng_state()
    missing, more = data.with_missing(rate, seed), data.with_missing(higher, seed)
    assert torch.equal(state, torch.get_rng_state())
    assert same(missing, data.with_missing(rate, seed))
    assert torch.stack([more.present(m) for m in modalities]).any(dim=0).all()
    for m in modalities:
        kept = missing.present(m)
        assert torch.equal(missing.rows[m][kept], data.rows[m][kept])
        assert not (kept & ~data.present(m)).any()
        assert not (more.present(m) & ~kept).any()
        assert missing.features[m] is data.features[m]
    assert torch.equal(missing.labels, data.labels)
    assert torch.equal(missing.split, data.split)


def test_with_missing_shares(demo):
    everything = torch.stack([demo.with_missing(1.0, 0).present(m) for m in demo.modalities])
    assert (everything.sum(dim=0) == 1).all()
    share = everything.double().mean(dim=1)
    torch.testing.assert_close(share, torch.full_like(share, 1 / 3), rtol=0, atol=0.05)
    assert same(demo.with_missing(0.0, 0), demo)
    dropped = torch.stack([~demo.with_missing(0.3, 0).present(m) for m in demo.modalities]).double().mean(dim=1)
    torch.testing.assert_close(dropped, torch.full_like(dropped, 0.3 - 0.3**3 / 3), rtol=0, atol=0.04)
    assert not same(demo.with_missing(0.3, 0), demo.with_missing(0.3, 1))


# --- digits


def test_digits_contents(demo):
    assert demo.modalities == ("audio", "image", "text")
    assert demo.classes == tuple("0123456789")
    assert len(demo) == 1797
    shapes = {m: (demo.features[m].dtype, tuple(demo.features[m].shape)) for m in demo.modalities}
    assert shapes == {
        "audio": (torch.float32, (1797, 32, 12)),
        "image": (torch.float32, (1797, 8, 8)),
        "text": (torch.float32, (1797, 271)),
    }
    assert all(demo.present(m).all() for m in demo.modalities)


def test_digits_split(demo):
    indices = [demo.indices(split) for split in SPLITS]
    assert torch.equal(torch.cat(indices).sort().values, torch.arange(1797))
    for index, fraction in zip(indices, (0.6, 0.15, 0.25), strict=True):
        share = torch.bincount(demo.labels[index], minlength=10) / torch.bincount(demo.labels)
        torch.testing.assert_close(share, torch.full((10,), fraction), rtol=0, atol=0.01)


def test_digits_deterministic(demo):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    again = digits(seed=0)
    assert torch.equal(states[0], torch.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    assert same(again, demo)
    other = digits(seed=1)
    assert torch.equal(other.labels, demo.labels)
    assert not torch.equal(other.split, demo.split)
    assert not any(torch.equal(other.features[m], demo.features[m]) for m in demo.modalities)


def test_digits_levels(demo, one_thread):
    """What a small network reaches with each modality alone: audio dominates, text is weakest."""
    data = demo.standardized()
    train, test = data.indices("train"), data.indices("test")
    accuracy = {}
    for modality in data.modalities:
        x, unseen = (data.inputs(modality, part).flatten(1) for part in (train, test))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 10))
            optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
            for _ in range(25):
                for batch in torch.randperm(len(x)).split(64):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(network(x[batch]), data.labels[train[batch]]).backward()
                    optimizer.step()
        accuracy[modality] = (network(unseen).argmax(dim=1) == data.labels[test]).double().mean().item()
    assert 0.88 < accuracy["audio"] < 0.98
    assert 0.74 < accuracy["image"] < 0.86
    assert 0.60 < accuracy["text"] < 0.76


def test_digits_without_scikit_learn(monkeypatch):
    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return load(name, *args, **kwargs)

    load = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install scikit-learn"):
        digits()


def test_tones_are_where_the_keypad_says(monkeypatch):
    """Without noise the two loudest bands are those of the key's row and column."""
    monkeypatch.setattr("mla_ext.multimodal.synthesis.AUDIO_NOISE", 0.0)
    keys = {1: (697, 1209), 2: (697, 1336), 3: (697, 1477), 4: (770, 1209), 5: (770, 1336), 6: (770, 1477)}
    keys |= {7: (852, 1209), 8: (852, 1336), 9: (852, 1477), 0: (941, 1336)}
    spectrum = np.exp(keypad_tones(np.array(list(keys)), np.random.default_rng(0))).sum(axis=2)
    for power, tones in zip(spectrum, keys.values(), strict=True):
        for tone in tones:
            near = round(tone / 31.25) - 20
            assert power[near - 1 : near + 2].max() > 100 * np.median(power)


@given(st.sampled_from((*NAMES, "a", "")), st.floats(0, 1, exclude_max=True))
@settings(database=None)
def test_misspell(name, place):
    assert len(_misspell(name, "drop", place, "x")) == max(len(name) - 1, 0)
    assert sorted(_misspell(name, "swap", place, "x")) == sorted(name)
    replaced = _misspell(name, "replace", place, "?")
    assert len(replaced) == max(len(name), 1)
    assert replaced.count("?") == 1
    duplicated = _misspell(name, "duplicate", place, "x")
    assert len(duplicated) == len(name) + bool(name)
    assert set(duplicated) == set(name)


def test_stratified_split_of_few():
    labels = np.array([0, 1, 0, 1, 0, 1, 0])
    split = stratified_split(labels, (0.5, 0.25, 0.25), np.random.default_rng(0))
    assert split.dtype == np.int8
    assert np.bincount(split[labels == 0]).tolist() == [2, 1, 1]


# --- real data


@pytest.mark.parametrize(
    ("name", "sizes", "shapes"),
    [
        ("avdigits", (9600, 1200, 1500), {"audio": (64, 40), "image": (28, 28)}),
        ("wikipedia", (1848, 325, 693), {"text": (10,), "image": (128,)}),
        ("mfeat", (1360, 240, 400), {"fou": (76,), "zer": (47,), "mor": (6,)}),
    ],
)
def test_real_files(real_data, name, sizes, shapes):
    data = load_npz(real_data / f"{name}.npz")
    assert data.modalities == tuple(shapes)
    assert len(data.classes) == 10
    assert tuple(len(data.indices(split)) for split in SPLITS) == sizes
    standard = data.standardized()
    train = data.indices("train")
    for modality, shape in shapes.items():
        inputs = standard.inputs(modality, train)
        assert inputs.shape == (len(train), *shape)
        mean, deviation = inputs.double().mean(dim=0), inputs.double().std(dim=0, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
        lit = data.inputs(modality, train).amin(dim=0) < data.inputs(modality, train).amax(dim=0)
        torch.testing.assert_close(deviation, lit.double(), rtol=0, atol=1e-4)


def test_real_recordings_do_not_cross_the_split(real_data):
    data = load_npz(real_data / "avdigits.npz")
    assert data.features["audio"].dtype == torch.float16
    assert data.features["image"].dtype == torch.uint8
    used = [set(data.rows["audio"][data.indices(split)].tolist()) for split in SPLITS]
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2]
