"""What other people's reports found in the preparation of data: real copies hold things that are no data."""

import numpy as np
import pytest
from PIL import Image
from test_prepare import picture, prepare, tone, write

from benchmarks.prepare import food101, iemocap, images, kinetics_sounds, mvsa, samples
from benchmarks.prepare.samples import Clip


def pixels(path):
    return images.read(Clip((path,)), count=1, size=8)


def grey16(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, dtype=np.uint16)).save(path)


def test_16_bit_grey_keeps_its_brightness(tmp_path):
    """Case 16: it came out white."""
    grey16(tmp_path / "a.png", 0x4080)
    assert (pixels(tmp_path / "a.png") == 0x40).all()


def test_16_bit_frames(tmp_path):
    """Kind of 16: the same picture as a frame of a folder."""
    grey16(tmp_path / "clip" / "0.png", 0x7FFF)
    assert (pixels(tmp_path / "clip") == 0x7F).all()


@pytest.mark.parametrize(("mode", "value"), [("1", 1), ("L", 90), ("P", 90)])
def test_other_depths(tmp_path, mode, value):
    """Kind of 16: pictures of 1 bit, of 8 bits and with a palette."""
    Image.new("L", (8, 8), 255 if mode == "1" else value).convert(mode).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png") == (255 if mode == "1" else value)).all()


def kinetics(root, *names):
    for part in ("train", "val", "test"):
        for name in names:
            path = root / part / "playing_accordion" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if not path.suffix or name.startswith(".ipynb") else path.touch()
    return sorted({sample.name for sample in kinetics_sounds.read(root).samples})


def test_hidden_entries_are_no_clips(tmp_path):
    """Case 17: ._clip.mp4 and .ipynb_checkpoints became samples."""
    assert kinetics(tmp_path, "a.mp4", "._a.mp4", ".ipynb_checkpoints") == ["a"]


def test_folders_of_tools_are_no_clips(tmp_path):
    """Kind of 17: what unpacking and a file server leave."""
    assert kinetics(tmp_path, "a.mp4", "__MACOSX", "@eaDir") == ["a"]


def test_folders_of_tools_are_no_classes(tmp_path):
    """Kind of 17: the classes of Food-101 are its folders."""
    for name in ("pizza", "__MACOSX", ".cache"):
        (tmp_path / name).mkdir()
    assert [path.name for path in samples.entries(tmp_path, "*")] == ["pizza"]


def test_hidden_frames_are_no_pictures(tmp_path):
    """Kind of 17: ._0.jpg among extracted frames."""
    picture(tmp_path / "clip" / "0.jpg")
    write(tmp_path / "clip" / "._0.jpg", "no picture")
    assert images.read(Clip((tmp_path / "clip",)), count=2, size=4).shape == (6, 4, 4)


def test_clips_without_a_label_are_named(tmp_path, capsys):
    """Kind of 18: a clip that is not in the annotations was passed over silently."""
    header = "label,youtube_id,time_start,time_end,split"
    for part in ("train", "val", "test"):
        for name in (f"{part}a_000000_000010", f"{part}b_000000_000010", f"{part}c_000000_000010"):
            tone(tmp_path / "copy" / part / f"{name}.wav")
        rows = [f"bowling,{part}a,0,10,{part}", f"archery,{part}b,0,10,{part}"]
        write(tmp_path / "copy" / "annotations" / f"{part}.csv", header, *rows)
    prepare("kinetics-sounds", tmp_path / "copy", "--modalities", "audio")
    root = tmp_path / "copy"
    assert capsys.readouterr().err.splitlines() == [
        f"left out: {root / part / part}c_000000_000010 is not in {root / 'annotations' / part}.csv"
        for part in ("train", "val", "test")
    ]


def test_clips_outside_the_folders_of_classes_are_named(tmp_path):
    """Kind of 18: a clip beside the folders of the classes was passed over silently."""
    kinetics(tmp_path, "a.mp4")
    (tmp_path / "val" / "b.mp4").touch()
    (tmp_path / "val" / "notes.txt").touch()
    (tmp_path / "val" / "archery").mkdir()
    assert kinetics_sounds.read(tmp_path).left_out == (f"{tmp_path / 'val' / 'b.mp4'} is in no folder of a class",)


def test_suffix_in_capitals(tmp_path):
    """Case 18: .MP4 was passed over."""
    assert kinetics(tmp_path, "a.mp4", "b.MP4", "c.Webm") == ["a", "b", "c"]
    sample = next(s for s in kinetics_sounds.read(tmp_path).samples if s.name == "b")
    assert sample.sources["video"].path().name == "b.MP4"


def test_recordings_in_capitals(tmp_path):
    """Kind of 18: .WAV in a list of recordings, .JPG where .jpg is named."""
    for name in ("1.wav", "2.WAV", "3.JPG"):
        (tmp_path / name).touch()
    assert [path.name for path in samples.entries(tmp_path, "*.wav")] == ["1.wav", "2.WAV"]
    assert Clip((tmp_path / "3.jpg",)).path().name == "3.JPG"


def test_first_row_is_no_header(tmp_path):
    """Kind of 18: a first picture that is no .jpg was passed over as a header."""
    for part in ("train", "test"):
        rows = ["p_0.png,a title,pizza", *(f"p_{i}.jpg,a title,pizza" for i in range(1, 20))]
        write(tmp_path / "texts" / f"{part}_titles.csv", *rows)
        picture(tmp_path / "images" / part / "pizza" / "p_1.jpg")
    assert len(food101.read(tmp_path).samples) == 40


def test_line_without_number(tmp_path):
    """Kind of 18: a judgement whose number is damaged was passed over."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "labelResultAll.txt", "ID\ttext,image", "1\tneutral,positive", "2x\tneutral,neutral")
    with pytest.raises(ValueError, match="found '2x"):
        mvsa.read(tmp_path)


def dialog(root, evaluation, transcript):
    for number in range(1, 6):
        name = f"Ses0{number}F_impro01"
        for folder, lines in (("EmoEvaluation", evaluation), ("transcriptions", transcript)):
            path = root / f"Session{number}" / "dialog" / folder / f"{name}.txt"
            write(path, *(line.replace("NAME", name) for line in lines))
    return {sample.name[-4:]: sample.sources["text"] for sample in iemocap.read(root).samples}


RATED = ["[1.0 - 2.0]\tNAME_F000\tneu\t[2.5, 2.5, 2.5]", "[2.0 - 3.0]\tNAME_F001\tsad\t[2.5, 2.5, 2.5]"]


@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_empty_text_stays_empty(tmp_path, blank):
    """Case 19: it took the next line's text."""
    said = dialog(tmp_path, RATED, [f"NAME_F000 [1-2]:{blank}", "NAME_F001 [2-3]: hello"])
    assert said == {"F000": "", "F001": "hello"}


def test_emotion_that_is_empty(tmp_path):
    """Kind of 19: the utterance was passed over."""
    with pytest.raises(ValueError, match="F000: expected one of the labels"):
        dialog(tmp_path, [RATED[0].replace("neu", ""), RATED[1]], ["NAME_F000 [1-2]: a", "NAME_F001 [2-3]: b"])


def test_name_without_its_line(tmp_path):
    """Kind of 19: a name alone on its line took the times and the text of the next."""
    with pytest.raises(ValueError, match="expected a line 'Ses01F_impro01_F000"):
        dialog(tmp_path, RATED, ["NAME_F000", "[1-2]: a stray line", "NAME_F001 [2-3]: b"])
