"""Distortions of recordings at a known rate: what a heap of unlabelled audio is full of.

Each takes rows (n, samples) float32 in [-1, 1], the samples (n,) that each row has before its
zeros, and a stream; it gives as many rows. The same seed gives the same rows.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from vestige.errors import DataError

Rows = NDArray[np.float32]
Lengths = NDArray[np.int64]
AudioShift = Callable[[Rows, Lengths, RandomState], Rows]

# Of the speech to what is added, in decibels.
_SNR = (0.0, 5.0)
_VOICES = 3


def noise(rows: Rows, lengths: Lengths, rng: RandomState) -> Rows:
    """White noise over the whole row, 0 to 5 dB below the recording."""
    return _mixed(rows, lengths, rng.standard_normal(rows.shape), rng)


def truncate(rows: Rows, lengths: Lengths, rng: RandomState) -> Rows:
    """The first 30 to 60 % are left; the rest is silence."""
    kept = (lengths * rng.uniform(0.3, 0.6, len(rows))).astype(np.int64)
    cut: Rows = np.where(np.arange(rows.shape[1]) < kept[:, None], rows, 0).astype(np.float32)
    return cut


def babble(rows: Rows, lengths: Lengths, rng: RandomState) -> Rows:
    """The sum of three other recordings, 0 to 5 dB below this one."""
    others = np.zeros(rows.shape)
    for _ in range(_VOICES):
        # Never the recording itself, unless it is alone.
        step = 1 + rng.randint(max(1, len(rows) - 1), size=len(rows))
        others += rows[(np.arange(len(rows)) + step) % len(rows)]
    return _mixed(rows, lengths, others, rng)


def backwards(rows: Rows, lengths: Lengths, rng: RandomState) -> Rows:
    """Played backwards: stands in for another language, which nobody here can write down."""
    made = np.zeros_like(rows)
    for row, out, length in zip(rows, made, lengths, strict=True):
        out[:length] = row[:length][::-1]
    return made


AUDIO_SHIFTS: Mapping[str, AudioShift] = {
    "noise": noise,
    "truncate": truncate,
    "babble": babble,
    "reversed": backwards,
}
# What is said in the language of the teacher after these: nothing.
UNSPOKEN = ("reversed",)


def unknown_audio_shifts(asked: Sequence[str]) -> list[str]:
    """The names in `asked` that no shift has, alternatives taken apart."""
    return [name for one in asked for name in _names(one) if name not in AUDIO_SHIFTS]


def shifted_audio(
    rows: Rows, asked: Sequence[str], rng: RandomState
) -> tuple[Rows, NDArray[np.bool_]]:
    """All of `asked` one after another.

    Args:
        rows: (n, samples).
        asked: names of `AUDIO_SHIFTS`; "a|b|c" draws one of them for each row.
        rng: of all that is drawn.

    Returns:
        The rows, and which of them (n,) still hold words of the language.

    Raises:
        DataError: there is no such shift.
    """
    if unknown := unknown_audio_shifts(asked):
        raise DataError(
            f"got the shift {unknown[0]!r} of recordings, expected one of "
            f"{', '.join(AUDIO_SHIFTS)}; name one"
        )
    spoken = np.ones(len(rows), dtype=bool)
    for one in asked:
        names = _names(one)
        drawn = rng.randint(len(names), size=len(rows))
        before, lengths, rows = rows, _lengths(rows), rows.copy()
        for number, name in enumerate(names):
            chosen = drawn == number
            if not chosen.any():
                continue
            # Over all rows, so that babble has others to take voices from.
            rows[chosen] = AUDIO_SHIFTS[name](before, lengths, rng)[chosen]
            if name in UNSPOKEN:
                spoken[chosen] = False
    return rows, spoken


def _names(asked: str) -> list[str]:
    return [name.strip() for name in asked.split("|")]


def _lengths(rows: Rows) -> Lengths:
    """Samples of each row up to the last that is not zero, at least 1."""
    sounding = rows != 0
    last: Lengths = rows.shape[1] - sounding[:, ::-1].argmax(1)
    return np.where(sounding.any(1), last, 1).astype(np.int64)


def _mixed(rows: Rows, lengths: Lengths, other: NDArray[np.float64], rng: RandomState) -> Rows:
    """Rows with something else at a drawn ratio of powers; made quieter where it would clip."""
    own = np.square(rows, dtype=np.float64).sum(1) / lengths
    power = np.square(other).mean(1)
    wanted = own / 10 ** (rng.uniform(*_SNR, len(rows)) / 10)
    scale = np.sqrt(wanted / np.maximum(power, 1e-12))
    mixed = rows + scale[:, None] * other
    mixed /= np.maximum(1.0, np.abs(mixed).max(1, keepdims=True))
    return np.asarray(mixed, dtype=np.float32)
