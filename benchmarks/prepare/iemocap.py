"""IEMOCAP (Busso et al. 2008): five sessions of two actors each, in utterances; the four emotions that the field uses.

DIR/Session1 to DIR/Session5, as USC gives it, each with
- dialog/EmoEvaluation/Ses01F_impro01.txt, lines `[start - end]<tab>utterance<tab>emotion<tab>…` among others,
- dialog/transcriptions/Ses01F_impro01.txt, lines `utterance [start-end]: what is said`,
- sentences/wav/Ses01F_impro01/<utterance>.wav,
- dialog/avi/DivX/Ses01F_impro01.avi, both actors side by side; or, instead, frames extracted to
  sentences/frames/Ses01F_impro01/<utterance>/*.jpg, of which the whole picture is used. The release without videos
  is prepared with `--modalities audio text`.

Of a video the speaker's half counts: the actor after whom the dialog is named (F or M in Ses01F) is on the left.
Emotions: angry, happy (with excited), neutral, sad; other utterances are left out. Split, without common speakers:
sessions 1 to 3 train, 4 validation, 5 test.
"""

from __future__ import annotations

import re
from pathlib import Path

from .samples import Clip, Corpus, Sample, check_label, entries, file, folder

CLASSES = ("ang", "hap", "neu", "sad")
OTHERS = ("dis", "fea", "fru", "oth", "sur", "xxx")  # of the annotation, not used; exc is merged with hap
SPLITS = {1: "train", 2: "train", 3: "train", 4: "validation", 5: "test"}
# Both stay within a line: what is empty in one must not be taken from the next.
UTTERANCE = re.compile(r"\[ *([\d.]+) *- *([\d.]+) *\][ \t]+(Ses\w+)[ \t]+(\w*)(?!\w)")
TRANSCRIPT = re.compile(r"(Ses\w+)[ \t]*\[[^]\n]*\][ \t]*:[ \t]*(.*)")


def read(root: Path) -> Corpus:
    samples = []
    for number, split in SPLITS.items():
        session = folder(root, f"Session{number}")
        for evaluation in entries(folder(session, "dialog", "EmoEvaluation"), "Ses*.txt"):
            samples += _dialog(session, evaluation, split)
    return Corpus(CLASSES, ("audio", "video", "text"), samples, seconds=8.0)


def _dialog(session: Path, evaluation: Path, split: str) -> list[Sample]:
    dialog = evaluation.stem
    transcription = file(session, "dialog", "transcriptions", evaluation.name)
    said = dict(TRANSCRIPT.findall(transcription.read_text(encoding="utf-8", errors="replace")))
    utterances = UTTERANCE.findall(evaluation.read_text(encoding="utf-8", errors="replace"))
    if not utterances:
        raise ValueError(f"{evaluation}: expected lines '[start - end]<tab>utterance<tab>emotion<tab>…', found none")
    samples = []
    for start, end, name, emotion in utterances:
        label = "hap" if emotion == "exc" else emotion
        check_label(label, (*CLASSES, *OTHERS), f"{evaluation}, {name}")
        if label in OTHERS:
            continue
        if name not in said:
            raise ValueError(f"{transcription}: expected a line '{name} [start-end]: …', found none")
        frames = session / "sentences" / "frames" / dialog / name
        if frames.is_dir():
            pictures = Clip((frames,))
        else:
            half = "left" if name.split("_")[-1][0] == dialog[5] else "right"
            video = session / "dialog" / "avi" / "DivX" / f"{dialog}.avi"
            pictures = Clip((frames, video), float(start), float(end), half)
        sound = Clip((session / "sentences" / "wav" / dialog / f"{name}.wav",))
        samples.append(Sample(name, label, split, {"audio": sound, "video": pictures, "text": said[name]}))
    return samples
