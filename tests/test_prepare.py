"""Tiny copies of the paper's datasets in their public layouts, prepared and loaded again."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from benchmarks.prepare import audio, build, images, kinetics_sounds, store, text
from benchmarks.prepare.__main__ import DATASETS, main
from benchmarks.prepare.samples import Clip
from mla_ext import load_folder, load_npz
from mla_ext.multimodal.data import SPLITS

ROOT = Path(__file__).parents[1]
needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV (the extra `prepare`)")


# --- copies of datasets


def tone(path, hertz=440.0, seconds=0.2, rate=16_000, dtype=np.int16, channels=1, amplitude=0.5):
    """A wav file of a pure tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    if np.dtype(dtype).kind == "i":
        wave = wave * np.iinfo(dtype).max
    elif dtype == np.uint8:
        wave = 128 + 127 * wave
    wavfile.write(path, rate, np.repeat(wave.astype(dtype)[:, None], channels, axis=1).squeeze())


def picture(path, color=(200, 30, 60), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, quality=95)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")


def crema_d(root, actors=range(1001, 1006)):
    for actor in actors:
        for emotion in EMOTIONS:
            clip = f"{actor}_DFA_{emotion}_XX"
            tone(root / "AudioWAV" / f"{clip}.wav")
            picture(root / "Image-01-FPS" / clip / "00000.jpg")
            picture(root / "Image-01-FPS" / clip / "00030.jpg", color=(0, 0, 255))


def kinetics(root, parts=("train", "val")):
    for part in parts:
        for label in ("playing_accordion", "bowling", "stomping", "abseiling"):
            for i in range(10 if part == "train" else 2):
                clip = root / part / label / f"{label[:3]}-{part}_{i}abcdef_{i:06d}_{i + 10:06d}"
                tone(clip.with_suffix(".wav"))
                picture(clip / "frame_00001.jpg")


def food_101(root, header=None):
    for part, count in (("train", 10), ("test", 2)):
        rows = [header] if header else []
        for label in ("apple_pie", "waffles"):
            for i in range(count):
                picture(root / "images" / part / label / f"{label}_{i}.jpg")
                rows.append(f'{label}_{i}.jpg,"{label.replace("_", " ")}, {part} word{i}",{label}')
        write(root / "texts" / f"{part}_titles.csv", *rows)


PAIRS = {"positive,positive": "positive", "neutral,negative": "negative", "positive,neutral": "positive"}
PAIRS |= {"neutral,neutral": "neutral", "negative,neutral": "negative", "positive,negative": None}


def mvsa_single(root, repeats=10):
    lines = ["ID\ttext,image"]
    for number, judged in enumerate([*PAIRS, "negative,positive"] * repeats, start=1):
        picture(root / "data" / f"{number}.jpg", color=(number, 0, 0))
        write(root / "data" / f"{number}.txt", f"tweet of {judged.replace(',', ' ')}")
        lines.append(f"{number}\t{judged}")
    write(root / "labelResultAll.txt", *lines)


def iemocap(root):
    for number in range(1, 6):
        session, dialog = root / f"Session{number}", f"Ses0{number}F_impro01"
        evaluation, transcripts = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""], []
        for i, emotion in enumerate(["ang", "hap", "exc", "neu", "sad", "fru", "xxx"]):
            name = f"{dialog}_{'FM'[i % 2]}{i:03d}"
            evaluation += [
                f"[{i}.5000 - {i + 1}.2500]\t{name}\t{emotion}\t[2.5000, 2.5000, 2.5000]",
                "C-E1:\tAnger;\t()",
            ]
            transcripts.append(f"{name} [00{i}.5000-00{i + 1}.2500]: It is {emotion}: number {number}.")
            tone(session / "sentences" / "wav" / dialog / f"{name}.wav")
            picture(session / "sentences" / "frames" / dialog / name / "1.jpg")
        write(session / "dialog" / "EmoEvaluation" / f"{dialog}.txt", *evaluation)
        write(session / "dialog" / "transcriptions" / f"{dialog}.txt", *transcripts)


MAKERS = {
    "crema-d": crema_d,
    "kinetics-sounds": kinetics,
    "food-101": food_101,
    "mvsa-single": mvsa_single,
    "iemocap": iemocap,
}


def prepare(name, root, *options):
    """Run the command; the data it wrote, and the names of its samples."""
    out = root.parent / f"{name}.npz"
    arguments = [name, "--root", root, "--out", out, "--size", 4, "--no-progress", *options]
    assert main(list(map(str, arguments))) == 0
    return load_npz(out), np.load(out)["name"].tolist()


def error(capsys, name, root, *options):
    """Run the command, which must fail and leave nothing; its one line on standard error."""
    out = root.parent / "out" / "failed.npz"
    arguments = [name, "--root", root, "--out", out, "--size", 4, "--no-progress", *options]
    assert main(list(map(str, arguments))) == 2
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("prepare: error: ")


def copy(name, tmp_path):
    root = tmp_path / "copy"
    MAKERS[name](root)
    return root


# --- each dataset


def test_crema_d_by_actor(tmp_path, capsys):
    data, names = prepare("crema-d", copy("crema-d", tmp_path))
    assert (data.modalities, data.classes) == (("audio", "video"), EMOTIONS)
    assert data.features["audio"].shape == (30, 64, 149)
    assert data.features["audio"].dtype == torch.float16
    assert data.features["video"].shape == (30, 9, 4, 4)
    assert data.features["video"].dtype == torch.uint8
    assert [name.split("_")[2] for name in names] == [data.classes[y] for y in data.labels]
    actors = [{names[i][:4] for i in data.indices(split)} for split in SPLITS]
    assert [len(found) for found in actors] == [3, 1, 1]
    assert len(set.union(*actors)) == 5
    first, middle, last = data.features["video"][0].reshape(3, 3, 16).float().mean(dim=2)  # frames 0 and 1 of 2
    assert abs(first - torch.tensor([200, 30, 60])).max() < 4
    assert abs(last - torch.tensor([0, 0, 255])).max() < 4
    assert torch.equal(middle, last)
    assert "6 classes; samples: 18 train, 6 validation, 6 test" in capsys.readouterr().out


def test_crema_d_by_lists(tmp_path):
    root = copy("crema-d", tmp_path)
    clips = sorted(path.stem for path in (root / "AudioWAV").iterdir())
    write(root / "test.csv", *(f"{clip},{clip.split('_')[2]}" for clip in clips[-6:]))
    write(root / "train.csv", *(f"\ufeff{clip},{clip.split('_')[2]}" for clip in clips[:1]))
    with (root / "train.csv").open("a", encoding="utf-8") as lines:
        lines.writelines(f"{clip},{clip.split('_')[2]}\n" for clip in clips[1:-12])
    write(root / "val.csv", *(f"{clip},{clip.split('_')[2]}" for clip in clips[-12:-6]))
    data, names = prepare("crema-d", root)
    expected = {"train": clips[:-12], "validation": clips[-12:-6], "test": clips[-6:]}
    assert {split: sorted(names[i] for i in data.indices(split)) for split in SPLITS} == expected


def test_lists_without_validation_give_a_tenth_of_the_training_samples(tmp_path):
    root = tmp_path / "copy"
    crema_d(root, range(1001, 1012))
    clips = sorted(path.stem for path in (root / "AudioWAV").iterdir())
    write(root / "train.csv", *(f"{clip},{clip.split('_')[2]}" for clip in clips[:60]))
    write(root / "test.csv", *(f"{clip},{clip.split('_')[2]}" for clip in clips[60:]))
    data, names = prepare("crema-d", root, "--modalities", "audio")
    assert sorted(names[i] for i in data.indices("test")) == clips[60:]
    assert torch.bincount(data.labels[data.indices("validation")]).tolist() == [1] * 6


def test_kinetics_sounds_in_folders_of_classes(tmp_path):
    data, names = prepare("kinetics-sounds", copy("kinetics-sounds", tmp_path))
    assert data.classes == ("bowling", "playing accordion", "stomping grapes")  # abseiling is none of its classes
    assert data.features["audio"].shape == (36, 64, 499)
    assert [len(data.indices(split)) for split in SPLITS] == [27, 3, 6]
    assert all("-val_" in names[i] for i in data.indices("test"))
    assert {name[:3]: data.classes[y][:3] for name, y in zip(names, data.labels, strict=True)} == {
        name: name for name in ("bow", "pla", "sto")
    }
    kinetics(tmp_path / "copy", parts=("test",))
    data, names = prepare("kinetics-sounds", tmp_path / "copy")
    assert [len(data.indices(split)) for split in SPLITS] == [30, 6, 6]
    assert all("-test_" in names[i] for i in data.indices("test"))


def test_kinetics_sounds_with_annotations(tmp_path):
    root = tmp_path / "copy"
    header = "label,youtube_id,time_start,time_end,split"
    for part in ("train", "val"):
        rows = []
        for i in range(10):
            label = ("playing drums", "tap dancing", "archery")[i % 3]
            tone(root / part / f"-a_{i}b_{i:06d}_{i + 10:06d}.wav")
            picture(root / part / f"-a_{i}b_{i:06d}_{i + 10:06d}" / "1.jpg")
            rows += [f"{label},-a_{i}b,{i},{i + 10},{part}", f"{label},gone{i},{i},{i + 10},{part}"]
        write(root / part / "notes.txt", "not a clip")
        write(root / "annotations" / f"{part}.csv", header, *rows)
    with pytest.raises(ValueError, match="comes twice"):
        build.check(kinetics_sounds.read(root))
    for path in (root / "val").glob("-a*"):
        path.rename(path.with_name(path.name.replace("-a", "-v")))
    write(
        root / "annotations" / "val.csv",
        *(root / "annotations" / "val.csv").read_text().replace("-a", "-v").split("\n"),
    )
    corpus = kinetics_sounds.read(root)
    assert corpus.classes == ("playing drums", "tap dancing")
    labels = {sample.name: sample.label for sample in corpus.samples}
    assert len(labels) == 14
    assert labels["-a_3b_000003_000013"] == "playing drums"
    assert labels["-v_4b_000004_000014"] == "tap dancing"


def test_the_classes_of_kinetics_sounds():
    assert len(set(kinetics_sounds.CLASSES)) == 34
    assert set(kinetics_sounds.RENAMED.values()) < set(kinetics_sounds.CLASSES)


@pytest.mark.parametrize("header", [None, "Image_path,text,label"])
def test_food_101(tmp_path, header):
    food_101(tmp_path / "copy", header)
    data, names = prepare("food-101", tmp_path / "copy")
    assert (data.modalities, data.classes) == (("text", "image"), ("apple_pie", "waffles"))
    assert data.features["image"].shape == (24, 3, 4, 4)
    assert [len(data.indices(split)) for split in SPLITS] == [18, 2, 4]
    assert all(names[i].startswith("test/") for i in data.indices("test"))
    assert [name.split("/")[1].rsplit("_", 1)[0] for name in names] == [data.classes[y] for y in data.labels]


def test_mvsa_single_labels_where_judgements_agree(tmp_path):
    data, names = prepare("mvsa-single", copy("mvsa-single", tmp_path))
    assert data.classes == ("negative", "neutral", "positive")
    expected = {str(n): PAIRS.get(j) for n, j in enumerate([*PAIRS, "negative,positive"] * 10, start=1)}
    found = {name: data.classes[y] for name, y in zip(names, data.labels, strict=True)}
    assert found == {name: label for name, label in expected.items() if label is not None}
    assert [len(data.indices(split)) for split in SPLITS] == [40, 5, 5]
    red = data.features["image"][data.rows["image"]][:, 0].float().mean(dim=(1, 2))
    assert abs(red - torch.tensor([float(name) for name in names])).max() < 3  # row i is sample i's picture


def test_iemocap(tmp_path):
    data, names = prepare("iemocap", copy("iemocap", tmp_path))
    assert (data.modalities, data.classes) == (("audio", "video", "text"), ("ang", "hap", "neu", "sad"))
    assert data.features["audio"].shape == (25, 64, 399)
    assert torch.bincount(data.labels).tolist() == [5, 10, 5, 5]  # excited counts as happy; fru and xxx do not count
    for split, sessions in {"train": "123", "validation": "4", "test": "5"}.items():
        assert {names[i][4] for i in data.indices(split)} == set(sessions)


def test_iemocap_without_videos(tmp_path, capsys):
    root = copy("iemocap", tmp_path)
    for frames in root.glob("Session*/sentences/frames"):
        frames.rename(frames.with_name("other"))
    message = error(capsys, "iemocap", root)
    assert "25 recordings of 25 samples are missing" in message
    assert str(root / "Session1" / "dialog" / "avi" / "DivX" / "Ses01F_impro01.avi") in message
    data, _ = prepare("iemocap", root, "--modalities", "text", "audio")
    assert data.modalities == ("audio", "text")


def test_the_speaker_of_iemocap_is_on_the_side_of_the_dialogs_name(tmp_path):
    root = copy("iemocap", tmp_path)
    for frames in root.glob("Session*/sentences/frames"):
        frames.rename(frames.with_name("other"))
    clips = {s.name.rsplit("_", 1)[1]: s.sources["video"] for s in DATASETS["iemocap"].read(root).samples}
    assert (clips["F000"].half, clips["M001"].half) == ("left", "right")
    assert (clips["M001"].start, clips["M001"].end) == (1.5, 2.25)


def test_a_second_run_writes_the_same_file(tmp_path):
    root = copy("mvsa-single", tmp_path)
    prepare("mvsa-single", root)
    first = (tmp_path / "mvsa-single.npz").read_bytes()
    prepare("mvsa-single", root)
    assert first == (tmp_path / "mvsa-single.npz").read_bytes()


# --- sound, pictures, texts


@pytest.mark.parametrize("hertz", [150, 440, 1000, 3000, 7000])
def test_a_tone_lands_in_its_band(tmp_path, hertz):
    tone(tmp_path / "a.wav", hertz=hertz)
    spectrogram = audio.log_mel([audio.read(Clip((tmp_path / "a.wav",)))], seconds=0.5)[0]
    mel = 2595 * np.log10(1 + np.array([hertz, 8000]) / 700)
    band = mel[0] / mel[1] * 65 - 1  # band b is centred on edge b + 1 of 66
    sounding = spectrogram[:, :8]
    assert spectrogram.shape == (64, 24)
    assert (abs(sounding.argmax(axis=0) - band) <= 1).all()
    assert (spectrogram[:, -8:] == np.float16(np.log(1e-6))).all()  # silence after the 0.2 s


def test_every_mel_band_hears_something():
    filters = audio.mel_filters()
    assert filters.shape == (64, 257)
    assert (filters.amax(dim=1) > 0.2).all()
    assert (filters >= 0).all() and (filters <= 1).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 1)])
def test_wav_files_of_any_kind_sound_the_same(tmp_path, dtype, rate, channels):
    tone(tmp_path / "a.wav", dtype=dtype, rate=rate, channels=channels)
    wave = audio.read(Clip((tmp_path / "a.wav",)))
    assert wave.dtype == np.float32
    assert abs(len(wave) - 3200) <= 1
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(wave)) / 16_000)
    assert abs(wave - expected)[200:-200].max() < 0.02


def test_pictures(tmp_path):
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (20, 0, 40, 20))
    wide.save(tmp_path / "wide.png")
    wide.convert("P").save(tmp_path / "palette.png")
    for name in ("wide", "palette"):
        pixels = images.read(Clip((tmp_path / f"{name}.png",)), count=1, size=10)
        assert pixels.shape == (3, 10, 10)
        assert pixels[:, :, 0].T.tolist() == [[255, 0, 0]] * 10  # the square in the middle, half red and half blue
        assert pixels[:, :, -1].T.tolist() == [[0, 0, 255]] * 10
    left = images.read(Clip((tmp_path / "wide.png",), half="left"), count=1, size=10)
    assert left.reshape(3, -1).T.tolist() == [[255, 0, 0]] * 100


def test_frames_are_spread_over_a_folder(tmp_path):
    for i in range(10):
        picture(tmp_path / f"frame_{i:05d}.png", color=(i, 0, 0))
    write(tmp_path / "notes.txt")
    pixels = images.read(Clip((tmp_path,)), count=3, size=2)
    assert pixels[::3, 0, 0].tolist() == [1, 5, 8]


def test_words_are_those_of_the_training_texts(tmp_path):
    root = copy("food-101", tmp_path)
    data, names = prepare("food-101", root)
    titles = {}
    for part in ("train", "test"):
        for line in (root / "texts" / f"{part}_titles.csv").read_text().splitlines():
            titles[f"{part}/{line.split(',')[0]}"] = line.split('"')[1]
    training = [titles[names[i]] for i in data.indices("train")]
    expected = text.tf_idf(training)([titles[name] for name in names])
    np.testing.assert_array_equal(data.inputs("text", torch.arange(len(names))), expected)
    everything = text.tf_idf(list(titles.values()))(["test"])
    assert everything.shape[1] > expected.shape[1]  # "test" is a word of the test texts alone
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, rtol=1e-5)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "1.txt").write_bytes(b"caf\xa1\xad #sun\n")
    assert text.read(Clip((tmp_path / "1.txt",))) == "caf\ufffd\ufffd #sun"


# --- what the user's encoder makes


@pytest.fixture
def encoders(tmp_path, monkeypatch):
    (tmp_path / "my_encoders.py").write_text(
        "import numpy as np, torch\n"
        "def lengths(texts):\n"
        "    return torch.tensor([[len(t), t.count(' ')] for t in texts], dtype=torch.double, requires_grad=True)\n"
        "def loudest(waves): return np.array([[wave.max(), len(wave)] for wave in waves])\n"
        "def red(pictures): return pictures[:, 0].mean(axis=(1, 2))[:, None]\n"
        "def flat(batch): return np.zeros(len(batch))\n"
        "def nan(batch): return np.full((len(batch), 2), np.nan)\n"
        "def growing(batch): return np.zeros((len(batch), len(batch)))\n"
        "NUMBER = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_encoders"
    sys.modules.pop("my_encoders", None)


def test_features_of_a_named_encoder(tmp_path, encoders):
    root = copy("iemocap", tmp_path)
    named = [f"audio={encoders}:loudest", f"video={encoders}:red", f"text={encoders}:lengths"]
    data, _ = prepare("iemocap", root, *(part for name in named for part in ("--encoder", name)))
    assert {m: (x.dtype, tuple(x.shape[1:])) for m, x in data.features.items()} == {
        "audio": (torch.float32, (2,)),
        "video": (torch.float32, (1,)),
        "text": (torch.float32, (2,)),
    }
    torch.testing.assert_close(data.features["audio"][0], torch.tensor([0.5, 3200]), rtol=1e-3, atol=0)
    assert abs(data.features["video"][0] - 200) < 4
    assert data.features["text"][0].tolist() == [len("It is ang: number 1."), 4]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("text=nowhere:encode", "--encoder text: expected MODULE:FUNCTION to import, got 'nowhere:encode'"),
        ("text={}:nothing", "--encoder text: expected MODULE:FUNCTION to import"),
        ("text={}", "--encoder text: expected MODULE:FUNCTION to import"),
        ("text={}:NUMBER", "--encoder text: expected a function"),
        ("smell={}:red", "--encoder: expected one of text, image before '='"),
        ("text={}:flat", "expected numbers of shape (50, ...), got float64 (50,)"),
        ("text={}:nan", "expected finite numbers"),
    ],
)
def test_encoders_that_are_refused(tmp_path, capsys, encoders, argument, expected):
    assert expected in error(
        capsys, "mvsa-single", copy("mvsa-single", tmp_path), "--encoder", argument.format(encoders)
    )


def test_an_encoder_must_give_rows_of_one_shape(tmp_path, capsys, encoders, monkeypatch):
    monkeypatch.setattr(build, "BATCH", 30)
    message = error(capsys, "mvsa-single", copy("mvsa-single", tmp_path), "--encoder", f"text={encoders}:growing")
    assert "text: expected rows of float32 (30,), as before, got float32 (20,)" in message


def test_several_batches_are_one(tmp_path, monkeypatch):
    root = copy("mvsa-single", tmp_path)
    whole, _ = prepare("mvsa-single", root)
    monkeypatch.setattr(build, "BATCH", 7)
    parts, _ = prepare("mvsa-single", root)
    for modality in whole.modalities:
        assert torch.equal(whole.features[modality], parts.features[modality])
        assert torch.equal(whole.rows[modality], parts.rows[modality])


# --- a folder in place of a file


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_holds_the_same(tmp_path, name):
    root, out = copy(name, tmp_path), tmp_path / "out" / "data"
    expected, names = prepare(name, root)
    arguments = [name, "--root", root, "--out", out, "--size", 4, "--no-progress", "--format", "folder"]
    assert main(list(map(str, arguments))) == 0
    data = load_folder(out)
    assert [path.name for path in out.parent.iterdir()] == ["data"]
    assert data.checksum() == expected.checksum()
    assert (data.modalities, data.classes) == (expected.modalities, expected.classes)
    assert np.load(out / "name.npy").tolist() == names
    assert all(isinstance(features, np.memmap) for features in data.features.values())


def test_a_folder_leaves_out_what_is_damaged(tmp_path):
    """The count of recordings is known at the end only."""
    root, out = copy("crema-d", tmp_path), tmp_path / "data"
    damage(root)
    expected, _ = prepare("crema-d", root, "--skip-damaged")
    arguments = ["crema-d", "--root", root, "--out", out, "--size", 4, "--no-progress", "--format", "folder"]
    assert main([*map(str, arguments), "--skip-damaged"]) == 0
    assert load_folder(out).checksum() == expected.checksum()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    root, out = copy("mvsa-single", tmp_path), tmp_path / "out" / "data"
    arguments = ["mvsa-single", "--root", str(root), "--out", str(out), "--size", "4", "--no-progress"]
    arguments += ["--format", "folder"]
    for fault in (KeyboardInterrupt(), OSError(28, "No space left on device")):

        def failing(*_, fault=fault):
            raise fault

        with monkeypatch.context() as patch:
            patch.setattr(store.Folder, "save", failing)
            if isinstance(fault, OSError):
                assert main(arguments) == 2
                assert "No space left on device" in capsys.readouterr().err
            else:
                with pytest.raises(KeyboardInterrupt):
                    main(arguments)
        assert list(out.parent.iterdir()) == []
    (out.parent / ".data.tmp").mkdir()  # of a run that was killed
    (out.parent / ".data.tmp" / "x_text.npy").write_bytes(b"half")
    assert main(arguments) == 0
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(arguments) == 2
    assert "--out: expected a folder that does not exist yet" in capsys.readouterr().err
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["data"]


def test_the_header_has_room_for_any_count(tmp_path):
    with open(tmp_path / "a.npy", "wb+") as file:
        rows = store.Rows("a", file)
        for _ in range(5):
            rows.append(np.ones((25_000, 2), np.uint8))
        rows.array()
    assert np.load(tmp_path / "a.npy").shape == (125_000, 2)


# --- what is not as expected


@pytest.mark.parametrize(
    ("name", "gone", "expected"),
    [
        ("crema-d", "AudioWAV", "AudioWAV: expected this folder; in {root} there is Image-01-FPS/"),
        ("kinetics-sounds", "val", "val: expected this folder; in {root} there is train/"),
        ("food-101", "texts/test_titles.csv", "test_titles.csv: expected this file; in {root}/texts there is train"),
        ("food-101", "images/train", "train: expected this folder; in {root}/images there is test/"),
        ("mvsa-single", "labelResultAll.txt", "labelResultAll.txt: expected this file; in {root} there is data/"),
        ("iemocap", "Session4", "Session4: expected this folder; in {root} there is Session1/, Session2/"),
        ("iemocap", "Session2/dialog/transcriptions", "transcriptions/Ses02F_impro01.txt: expected this file"),
    ],
)
def test_missing_pieces(tmp_path, capsys, name, gone, expected):
    root = copy(name, tmp_path)
    (root / gone).rename(tmp_path / "gone")
    assert expected.format(root=root) in error(capsys, name, root)


@pytest.mark.parametrize("name", DATASETS)
def test_no_root_and_empty_root(tmp_path, capsys, name):
    assert f"{tmp_path / 'none'}: expected this folder" in error(capsys, name, tmp_path / "none")
    (tmp_path / "copy").mkdir()
    message = error(capsys, name, tmp_path / "copy")
    assert "expected this" in message and "there is nothing" in message


def replace(path, old, new):
    content = path.read_text(encoding="utf-8")
    assert old in content
    path.write_text(content.replace(old, new, 1), encoding="utf-8")


def test_unknown_labels(tmp_path, capsys):
    roots = {name: tmp_path / name / "copy" for name in DATASETS}
    for name, root in roots.items():
        MAKERS[name](root)
    tone(roots["crema-d"] / "AudioWAV" / "1001_DFA_BAD_XX.wav")
    message = error(capsys, "crema-d", roots["crema-d"])
    assert "1001_DFA_BAD_XX.wav: expected one of the labels NEU, HAP" in message and "found 'BAD'" in message
    write(roots["crema-d"] / "train.csv", "1001_DFA_NEU_XX,JOY")
    write(roots["crema-d"] / "test.csv", "1002_DFA_NEU_XX,NEU")
    assert "train.csv, 1001_DFA_NEU_XX: expected one of the labels" in error(capsys, "crema-d", roots["crema-d"])
    replace(roots["food-101"] / "texts" / "train_titles.csv", ",waffles\n", ",pancakes\n")
    assert "train_titles.csv, waffles_0.jpg: expected one of the labels apple_pie, waffles, found 'pancakes'" in error(
        capsys, "food-101", roots["food-101"]
    )
    replace(roots["mvsa-single"] / "labelResultAll.txt", "1\tpositive", "1\tfine")
    assert "labelResultAll.txt, 1: expected one of the labels" in error(capsys, "mvsa-single", roots["mvsa-single"])
    evaluation = roots["iemocap"] / "Session3" / "dialog" / "EmoEvaluation" / "Ses03F_impro01.txt"
    replace(evaluation, "\tneu\t", "\tjoy\t")
    assert "Ses03F_impro01_M003: expected one of the labels" in error(capsys, "iemocap", roots["iemocap"])
    for part in ("train", "val"):
        for label in ("playing_accordion", "bowling", "stomping"):
            (roots["kinetics-sounds"] / part / label).rename(roots["kinetics-sounds"] / part / f"un{label}")
    assert "expected folders named as classes" in error(capsys, "kinetics-sounds", roots["kinetics-sounds"])


def test_lines_that_are_not_as_expected(tmp_path, capsys):
    roots = {name: tmp_path / name / "copy" for name in DATASETS}
    for name, root in roots.items():
        MAKERS[name](root)
    tone(roots["crema-d"] / "AudioWAV" / "noise.wav")
    assert "noise.wav: expected a name like 1001_DFA_ANG_XX.wav" in error(capsys, "crema-d", roots["crema-d"])
    titles = Path("texts") / "test_titles.csv"
    for name, file, content, message in (
        ("crema-d", "train.csv", b"1001_DFA_NEU_XX", "test.csv: expected this file"),
        ("crema-d", "test.csv", b"1001_DFA_NEU_XX,NEU", "train.csv: expected rows of clip and emotion"),
        ("crema-d", "train.csv", b"1001_DFA_NEU_XX,NEU", "1001_DFA_NEU_XX: comes twice"),
        ("food-101", titles, b"waffles_0.jpg,waffles", "test_titles.csv: expected rows of image, title and class"),
        ("food-101", titles, b"\xff\xfe\x00", "test_titles.csv: expected a csv file in UTF-8"),
        ("food-101", titles, b"", "test_titles.csv: expected rows, found none"),
    ):
        (roots[name] / file).write_bytes(content)
        assert message in error(capsys, name, roots[name])
    write(roots["mvsa-single"] / "labelResultAll.txt", "1\tpositive")
    assert "expected lines like '1<tab>neutral,positive', found" in error(capsys, "mvsa-single", roots["mvsa-single"])
    write(roots["mvsa-single"] / "labelResultAll.txt", "ID\ttext,image")
    assert "found none that can be used" in error(capsys, "mvsa-single", roots["mvsa-single"])
    dialog = roots["iemocap"] / "Session1" / "dialog"
    replace(dialog / "transcriptions" / "Ses01F_impro01.txt", "Ses01F_impro01_F000", "")
    assert "expected a line 'Ses01F_impro01_F000 [start-end]" in error(capsys, "iemocap", roots["iemocap"])
    write(dialog / "EmoEvaluation" / "Ses01F_impro01.txt", "nothing")
    assert "expected lines '[start - end]<tab>utterance" in error(capsys, "iemocap", roots["iemocap"])
    write(roots["kinetics-sounds"] / "annotations" / "train.csv", "label,id")
    for label in ("playing_accordion", "bowling", "stomping", "abseiling"):
        (roots["kinetics-sounds"] / "train" / label).rename(roots["kinetics-sounds"] / label)
    tone(roots["kinetics-sounds"] / "train" / "a_000001_000011.wav")
    message = error(capsys, "kinetics-sounds", roots["kinetics-sounds"])
    assert "train.csv: expected columns label, youtube_id, time_start, time_end, found label, id" in message
    write(
        roots["kinetics-sounds"] / "annotations" / "train.csv", "label,youtube_id,time_start,time_end", "bowling,a,x,11"
    )
    assert "expected whole seconds" in error(capsys, "kinetics-sounds", roots["kinetics-sounds"])
    write(
        roots["kinetics-sounds"] / "annotations" / "train.csv", "label,youtube_id,time_start,time_end", "archery,a,1,11"
    )
    assert "expected clips of the classes" in error(capsys, "kinetics-sounds", roots["kinetics-sounds"])


def test_other_arguments(tmp_path, capsys, monkeypatch):
    root = copy("mvsa-single", tmp_path)
    assert "--modalities: expected some of text, image, got smell" in error(
        capsys, "mvsa-single", root, "--modalities", "text", "smell"
    )
    for arguments in (["mnist", "--root", "."], ["crema-d", "--root", ".", "--out", "x", "--size", "0"]):
        with pytest.raises(SystemExit):
            main(arguments)
        capsys.readouterr()
    write(root / "labelResultAll.txt", "1\tpositive,positive")
    monkeypatch.setattr(text, "read", lambda source: pytest.fail("read a recording"))
    assert "expected samples in every split" in error(capsys, "mvsa-single", root)


def damage(root):
    """Seven recordings of CREMA-D that cannot be read, in six ways; clip 4 loses both of its own."""
    clips = sorted(path.stem for path in (root / "AudioWAV").iterdir())
    sound, frames = root / "AudioWAV", root / "Image-01-FPS"
    whole = (sound / f"{clips[0]}.wav").read_bytes()
    (sound / f"{clips[0]}.wav").write_bytes(whole[: len(whole) // 2])
    (sound / f"{clips[1]}.wav").write_bytes(b"no sound")
    wavfile.write(sound / f"{clips[2]}.wav", 16_000, np.zeros(0, dtype=np.int16))
    wavfile.write(sound / f"{clips[3]}.wav", 16_000, np.full(100, np.nan, dtype=np.float32))
    wavfile.write(sound / f"{clips[4]}.wav", 16_000, np.zeros(0, dtype=np.int16))
    for name in ("00000.jpg", "00030.jpg"):
        jpg = frames / clips[5] / name
        jpg.write_bytes(jpg.read_bytes()[:-200])
        (frames / clips[4] / name).unlink()
    (frames / clips[6] / "00000.jpg").unlink()
    return clips


def test_damaged_recordings(tmp_path, capsys):
    root = copy("crema-d", tmp_path)
    clips = damage(root)
    message = error(capsys, "crema-d", root)
    assert f"{clips[0]}: {root / 'AudioWAV' / clips[0]}.wav cannot be read" in message
    assert "--skip-damaged leaves such recordings out" in message

    data, names = prepare("crema-d", root, "--skip-damaged")
    listed = capsys.readouterr().err.splitlines()
    assert listed[-1] == "7 recordings left out, 1 samples with them"
    assert sorted(line.split(": ")[1] for line in listed[:-1]) == sorted([*clips[:5], clips[4], clips[5]])
    for reason in ("EOF", "not understood", "holds no sound", "not finite", "Truncated", "without frames"):
        assert any(reason in line for line in listed), reason
    assert names == [clip for clip in clips if clip != clips[4]]
    assert data.present("audio").tolist() == [clip not in clips[:5] for clip in names]
    assert data.present("video").tolist() == [clip != clips[5] for clip in names]
    assert data.rows["audio"][4:].tolist() == list(range(len(names) - 4))
    assert data.features["audio"].shape[0] == 25
    assert data.features["video"].shape[0] == 28


def test_missing_recordings_are_found_before_any_is_read(tmp_path, capsys, monkeypatch):
    root = copy("mvsa-single", tmp_path)
    (root / "data" / "3.jpg").unlink()
    (root / "data" / "5.txt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(text, "read", lambda source: pytest.fail("read a recording"))
        message = error(capsys, "mvsa-single", root)
    assert "2 recordings of 50 samples are missing" in message
    assert f"3: {root / 'data' / '3.jpg'} is missing" in message
    data, names = prepare("mvsa-single", root, "--skip-damaged")
    assert len(names) == 50
    assert not data.present("image")[names.index("3")] and not data.present("text")[names.index("5")]
    assert f"left out: 5: {root / 'data' / '5.txt'} is missing" in capsys.readouterr().err


def test_nothing_that_can_be_read(tmp_path, capsys):
    root = copy("mvsa-single", tmp_path)
    for path in (root / "data").glob("*.jpg"):
        path.write_bytes(b"")
    assert "image: expected at least one recording that can be read" in error(
        capsys, "mvsa-single", root, "--skip-damaged"
    )
    for path in (root / "data").glob("*.txt"):
        path.write_text("?!")
    assert "text: expected words in the 40 training texts" in error(capsys, "mvsa-single", root)


def test_interrupted_in_mid_write_leaves_the_old_file(tmp_path, monkeypatch):
    root = copy("mvsa-single", tmp_path)
    out = tmp_path / "out" / "data.npz"
    arguments = ["mvsa-single", "--root", str(root), "--out", str(out), "--size", "4", "--no-progress"]

    def interrupted(file, **arrays):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez_compressed", interrupted)
        main(arguments)
    assert list(out.parent.iterdir()) == []
    assert main(arguments) == 0
    before = out.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez_compressed", interrupted)
        main(arguments)
    assert [path.name for path in out.parent.iterdir()] == ["data.npz"]
    assert out.read_bytes() == before


def test_killed_in_mid_write_leaves_no_file(tmp_path):
    root, out = copy("mvsa-single", tmp_path), tmp_path / "data.npz"
    arguments = ["mvsa-single", "--root", str(root), "--out", str(out), "--size", "4", "--no-progress"]
    code = (
        "import json, os, signal, sys, numpy as np; from benchmarks.prepare.__main__ import main\n"
        "np.savez_compressed = lambda file, **arrays: (file.write(b'half'), os.kill(os.getpid(), signal.SIGKILL))\n"
        "main(json.loads(sys.argv[1]))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(arguments)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert not out.exists()
    assert main(arguments) == 0
    assert load_npz(out).modalities == ("text", "image")


# --- videos


def test_videos_without_pyav_say_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    root = copy("crema-d", tmp_path)
    (root / "Image-01-FPS").rename(tmp_path / "frames")
    for sound in (root / "AudioWAV").iterdir():
        write(root / "VideoFlash" / f"{sound.stem}.flv")
    message = error(capsys, "crema-d", root, "--skip-damaged")
    assert "needs PyAV: pip install av; without it, extract sound to .wav files and frames to folders" in message


def film(path, colors, rate=10, sound=True):
    """A video that shows each colour for a second, left and the complement right, over a 440 Hz tone."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flv" if path.suffix == ".flv" else "mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 32, "yuv420p", 4_000_000
        speaker = container.add_stream("aac" if path.suffix == ".mp4" else "mp3", rate=44_100) if sound else None
        for color in colors:
            pixels = np.empty((32, 64, 3), dtype=np.uint8)
            pixels[:, :32], pixels[:, 32:] = color, 255 - np.array(color)
            for _ in range(rate):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
        if speaker is not None:
            wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44_100 * len(colors)) / 44_100, dtype=np.float64)
            for start in range(0, len(wave), 1024):
                frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024].astype(np.float32), "fltp", "mono")
                frame.sample_rate, frame.pts = 44_100, start
                container.mux(speaker.encode(frame))
            container.mux(speaker.encode(None))


RED, GREEN, BLUE = (220, 20, 20), (20, 220, 20), (20, 20, 220)


@needs_av
@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".flv"])
def test_frames_and_sound_of_a_video(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    film(path, [RED, GREEN, BLUE])
    shown = images.read(Clip((path,), half="left"), count=3, size=4).reshape(3, 3, -1).mean(axis=2)
    assert abs(shown - [RED, GREEN, BLUE]).max() < 12
    part = images.read(Clip((path,), start=1.2, end=1.8, half="right"), count=2, size=4).reshape(2, 3, -1).mean(axis=2)
    assert abs(part - (255 - np.array([GREEN, GREEN]))).max() < 12
    wave = audio.read(Clip((path,)))
    assert 2.9 < len(wave) / 16_000 < 3.2
    spectrum = abs(np.fft.rfft(wave[8000:24_000]))
    assert spectrum.argmax() == 440


@needs_av
def test_damaged_videos(tmp_path, capsys):
    root = tmp_path / "copy"
    for part in ("train", "val"):
        for i in range(10 if part == "train" else 1):
            for label in ("bowling", "singing"):
                film(root / part / label / f"{label}{part}_{i:06d}_{i + 10:06d}.mp4", [RED])
    path = root / "train" / "bowling" / "bowlingtrain_000000_000010.mp4"
    path.write_bytes(path.read_bytes()[:300])
    film(root / "train" / "bowling" / "bowlingtrain_000001_000011.mp4", [RED], sound=False)
    assert "bowlingtrain_000000_000010.mp4 cannot be read" in error(capsys, "kinetics-sounds", root)
    data, names = prepare("kinetics-sounds", root, "--skip-damaged")
    assert "bowlingtrain_000000_000010" not in names and len(names) == 21
    silent = names.index("bowlingtrain_000001_000011")
    assert not data.present("audio")[silent] and data.present("video")[silent]
    assert "bowlingtrain_000001_000011.mp4 cannot be read: has no sound" in capsys.readouterr().err
