"""Sets of recordings on disk, and how they become inputs of a network."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vestige.core.texts import to_bytes
from vestige.core.types import InputSpec
from vestige.data._layout import Part, check_split, place_of
from vestige.data._spoken import Choice, Joined, joined, parse, read_joined
from vestige.data._waves import METADATA, Clip, Notes, as_rows, holds_clips, list_clips
from vestige.errors import DataError

__all__ = ["AudioSet", "load_audio"]

_STEMS = {"train": ("train",), "select": ("select", "val"), "test": ("test",)}
_BYTES = 4
# Of a row of bytes: more than what is said in 30 s, so that splits can be put together.
_ROOM = 1024


@dataclass(eq=False)
class AudioSet:
    """One split of a set of recordings; a `core.protocols.DataSet`. Decoded when asked for.

    Attributes:
        name: as it was asked for, options in brackets among it.
        split: "train", "select", "test" or "all".
        utterances: each of one or more clips, in order.
        path: the folder.
        fingerprint: sha256 in hex of the contents of all files, their transcripts, and how they
            were joined.
        classes: (), transcripts have none.
        notes: what became of the files when they were last read.
    """

    name: str
    split: str
    utterances: tuple[Joined, ...]
    path: Path
    fingerprint: str
    classes: tuple[str, ...] = ()
    notes: Notes = field(default_factory=Notes)

    def __len__(self) -> int:
        return len(self.utterances)

    @classmethod
    def open(cls, name: str, split: str) -> "AudioSet":
        """The same as `load_audio`."""
        return load_audio(name, split)

    @classmethod
    def find(cls, name: str, split: str) -> None:
        """Look for what `open` would read, without reading it.

        Raises:
            DataError: it is not there.
        """
        _located(parse(name)[0], split)

    @classmethod
    def undivided(cls, name: str) -> bool:
        """Whether `name` is a folder of recordings without splits."""
        place = place_of(parse(name)[0])
        return not _stored(place) and holds_clips(place)

    def inputs(self, spec: InputSpec) -> Tensor:
        """All recordings (n, samples) float32 in [-1, 1], zeros behind what is shorter.

        What cannot be read is left out. What is longer is cut where nobody wrote down what is said,
        and left out where somebody did, since the text would no longer be true. All of it is told.
        """
        return self.read(spec)[0]

    def examples(self, spec: InputSpec) -> tuple[Tensor, Tensor]:
        """Recordings (n, samples) and their transcripts (n, L), rows of bytes.

        Raises:
            DataError: a recording has no transcript, or none can be read.
        """
        waveforms, texts = self.read(spec)
        unknown = sum(text is None for text in texts)
        if unknown:
            raise DataError(
                f"got {unknown} of {len(texts)} recordings without a transcript in {self.path}, "
                f"expected one for each to judge by; add {METADATA} with file_name and text"
            )
        known = [text or "" for text in texts]
        length = max(_ROOM, *(_BYTES * len(text) for text in known))
        return waveforms, to_bytes(known, length)

    def read(self, spec: InputSpec) -> tuple[Tensor, list[str | None]]:
        """`inputs` with the transcript of each, None where nobody wrote one; see `read_named`."""
        waveforms, texts, _ = self.read_named(spec)
        return waveforms, texts

    def read_named(self, spec: InputSpec) -> tuple[Tensor, list[str | None], list[str]]:
        """`inputs` with the transcript and the files of each.

        Raises:
            DataError: no recording can be read, or the inputs are none of audio.
        """
        if spec.kind != "audio":
            raise DataError(
                f"got {spec.kind} inputs for the recordings {self.name}, expected audio; name a "
                "set of that kind"
            )
        notes = Notes()
        clips, texts, names = read_joined(
            self.utterances, spec.sample_rate_hz, spec.shape[0], notes
        )
        notes.tell(self.name, spec.sample_rate_hz, spec.shape[0] / spec.sample_rate_hz)
        self.notes = notes
        if not clips:
            raise DataError(
                f"got {len(self)} recordings in {self.path}, {len(notes.skipped)} of them corrupt "
                f"or empty and {len(notes.too_long)} longer than the "
                f"{spec.shape[0] / spec.sample_rate_hz:g} s of the input, expected one to hear; "
                "look at the files, or take a longer input"
            )
        return torch.from_numpy(as_rows(clips, spec.shape[0])), texts, names


def load_audio(name_or_path: str, split: str) -> AudioSet:
    """Read which recordings a split of a set has; nothing is decoded yet.

    A name is a folder in the data folder, anything with a path separator is a folder itself. A
    split is a folder SPLIT of WAV and FLAC files, at any depth, with metadata.jsonl: a line
    {"file_name", "text", ...} for each. Without it nothing is known of the files. "select" may be
    called "val"; without it the last 10 % of train, in the order of their contents' sha256, are
    "select", and "train" is the rest. A folder with only all/, or of files itself, is divided by
    the sha256 of each file's bytes, 80 % train, 10 % select, 10 % test, whatever their order and
    names.

    Behind it may stand options in brackets, separated by commas: KEY=VALUE|VALUE takes the files
    whose metadata says so, KEY=A..B those with a whole number in this range; join=A-B makes
    utterances of A to B clips of one "speaker" with 50 to 150 ms of silence between two, their
    texts joined by spaces, each clip once, in a fixed order; join=1-3x4 goes through all clips four
    times, in four orders. Splits are divided first:
    "fsdd[speaker=jackson|theo,join=1-3]".

    Args:
        name_or_path: name or folder, with options.
        split: "train", "select" or "test"; the three never overlap. "all" of what is not divided.

    Raises:
        DataError: the split is unknown, or what holds it is missing, damaged or in another layout.
    """
    check_split(split)
    asked, choice = parse(name_or_path)
    part = _located(asked, split)
    clips = list_clips(part.path)
    if part.rule == "content":
        clips = [clip for clip in clips if part.has(clip.digest)]
    elif part.rule == "tenth":
        clips = sorted(clips, key=lambda clip: clip.digest)[part.rows(len(clips))]
    utterances = joined(_chosen(clips, choice, name_or_path), choice, split)
    if not utterances:
        raise DataError(
            f"got no recordings for the '{split}' split of '{name_or_path}' in {part.path}, "
            "expected at least one; add WAV or FLAC files, or loosen what stands in brackets"
        )
    place = place_of(asked)
    shown = name_or_path if place.name == asked else name_or_path.replace(asked, place.name, 1)
    return AudioSet(shown, split, tuple(utterances), part.path, _fingerprint(utterances))


def _chosen(clips: Sequence[Clip], choice: Choice, asked: str) -> list[Clip]:
    """The clips whose metadata says what is asked for."""
    kept = list(clips)
    for key, groups in choice.values.items():
        known = {str(clip.about[key]) for clip in clips if key in clip.about}
        # Of a range some may be missing.
        unknown = [
            "..".join(dict.fromkeys((one[0], one[-1]))) for one in groups if not known & {*one}
        ]
        values = {value for one in groups for value in one}
        if unknown:
            listed = ", ".join(sorted(known)[:10]) or "nothing"
            raise DataError(
                f"got '{asked}', but no recording has {key} {', '.join(unknown)}, expected some of "
                f"{listed}; correct the brackets"
            )
        kept = [clip for clip in kept if str(clip.about.get(key)) in values]
    return kept


def _located(asked: str, split: str) -> Part:
    place = place_of(asked)
    stored = _stored(place)
    if not stored:
        whole = place / "all" if holds_clips(place / "all") else place
        if not holds_clips(whole):
            raise _missing(asked, place, split)
        return Part(whole, "whole" if split == "all" else "content", split)
    if split == "all":
        raise DataError(
            f"got split 'all' of '{asked}', which is divided into {', '.join(stored)}; name one"
        )
    if split in stored and (split != "train" or "select" in stored):
        return Part(stored[split], "whole", split)
    if split != "test" and "train" in stored:
        return Part(stored["train"], "tenth", split)
    raise _missing(asked, place, split)


def _stored(folder: Path) -> dict[str, Path]:
    """The folder of each split that there is."""
    return {
        split: folder / stem
        for split, stems in _STEMS.items()
        for stem in reversed(stems)
        if holds_clips(folder / stem)
    }


def _missing(asked: str, folder: Path, split: str) -> DataError:
    where = "" if os.sep in asked else ", or point $VESTIGE_DATA to the folder that holds it"
    stem = "train" if split == "select" else split
    return DataError(
        f"got no recordings for split '{split}' of data set '{asked}', expected WAV or FLAC files "
        f"in {folder / stem} with {METADATA} beside them; put them there{where}"
    )


def _fingerprint(utterances: Sequence[Joined]) -> str:
    whole = hashlib.sha256()
    for one in utterances:
        files = " ".join(f"{clip.digest} {clip.text!r}" for clip in one.clips)
        whole.update(f"{files} {one.gaps}\n".encode())
    return whole.hexdigest()
