"""Options behind the name of a set of recordings, and utterances of several clips."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vestige.core.seeding import derive
from vestige.data._layout import place_of
from vestige.data._waves import Clip, Notes, Samples, read_clip
from vestige.errors import DataError

# Between two clips of one utterance, in seconds.
_GAPS = (0.05, 0.15)
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_JOIN = re.compile(r"([1-9]\d*)-([1-9]\d*)(?:x([1-9]\d*))?")


@dataclass(frozen=True)
class Choice:
    """What stands in the brackets.

    Attributes:
        values: by a key of the metadata those that are taken; a range is a group of values.
        join: fewest and most clips of an utterance.
        times: how often each clip is used.
    """

    values: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    join: tuple[int, int] = (1, 1)
    times: int = 1


@dataclass(frozen=True)
class Joined:
    """An utterance.

    Attributes:
        clips: one or more, of one speaker.
        gaps: seconds of silence behind each but the last.
    """

    clips: tuple[Clip, ...]
    gaps: tuple[float, ...] = ()

    @property
    def text(self) -> str | None:
        """All transcripts in a row; None where one is missing."""
        texts = [clip.text for clip in self.clips]
        return None if None in texts else " ".join(text for text in texts if text)


def parse(asked: str) -> tuple[str, Choice]:
    """Name or path of a set, and what is asked of it in brackets.

    What exists under the whole name is that, brackets and all.

    Raises:
        DataError: the brackets cannot be understood.
    """
    if not asked.endswith("]") or "[" not in asked or os.path.lexists(place_of(asked)):
        return asked, Choice()
    name, _, listed = asked[:-1].rpartition("[")
    values: dict[str, tuple[tuple[str, ...], ...]] = {}
    join, times = (1, 1), 1
    for part in listed.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        bounds = _JOIN.fullmatch(value)
        if key == "join" and bounds and int(bounds[1]) <= int(bounds[2]):
            join, times = (int(bounds[1]), int(bounds[2])), int(bounds[3] or 1)
        elif name and equals and key != "join" and key not in values and all(value.split("|")):
            values[key] = tuple(_listed(part.strip()) for part in value.split("|"))
        else:
            raise DataError(
                f"got {part.strip()!r} in the data set '{asked}', expected KEY=VALUE|VALUE or "
                "KEY=A..B of the metadata, join=1-3 or join=1-3x4; correct the brackets"
            )
    return name, Choice(values, join, times)


def _listed(value: str) -> tuple[str, ...]:
    """The values that "A..B" stands for; any other one is itself."""
    ends = _RANGE.fullmatch(value)
    return tuple(map(str, range(int(ends[1]), int(ends[2]) + 1))) if ends else (value,)


def joined(clips: Sequence[Clip], choice: Choice, split: str) -> list[Joined]:
    """Utterances; without `join` one for each clip.

    The order of clips, their number in an utterance and the silences depend on what the clips are,
    not on any seed: the same set is the same for everyone.
    """
    if choice.join == (1, 1) and choice.times == 1:
        return [Joined((clip,)) for clip in clips]
    by_speaker: dict[str, list[Clip]] = {}
    for clip in clips:
        by_speaker.setdefault(str(clip.about.get("speaker", "")), []).append(clip)
    made: list[Joined] = []
    low, high = choice.join
    for speaker, own in sorted(by_speaker.items()):
        rng = np.random.RandomState(derive(0, f"joined {split} {speaker}") % 2**32)
        order = [own[index] for _ in range(choice.times) for index in rng.permutation(len(own))]
        while order:
            count = int(rng.randint(low, high + 1))
            taken, order = order[:count], order[count:]
            gaps = tuple(round(float(rng.uniform(*_GAPS)), 4) for _ in taken[1:])
            if len(taken) >= low:
                made.append(Joined(tuple(taken), gaps))
    return made


def read_joined(
    utterances: Sequence[Joined], sample_rate_hz: int, length: int, notes: Notes
) -> tuple[list[Samples], list[str | None], list[str]]:
    """Samples, text and names of the files of each utterance that can be read as a whole."""
    waves: list[Samples] = []
    texts: list[str | None] = []
    names: list[str] = []
    for one in utterances:
        parts: list[Samples] = []
        for clip, gap in zip(one.clips, (*one.gaps, 0.0), strict=True):
            samples = read_clip(clip, sample_rate_hz, notes)
            if samples is None:
                break
            parts += [samples, np.zeros(round(gap * sample_rate_hz), dtype=np.float32)]
        if len(parts) < 2 * len(one.clips):
            continue
        whole = np.concatenate(parts)
        if len(whole) > length:
            (notes.cut if one.text is None else notes.too_long).append(one.clips[0].path.name)
            if one.text is not None:
                continue
        waves.append(whole[:length])
        texts.append(one.text)
        names.append(" + ".join(clip.path.name for clip in one.clips))
    return waves, texts, names
