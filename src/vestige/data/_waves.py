"""Recordings in folders: which files there are, what is written about them, and their samples."""

import hashlib
import io
import json
import logging
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vestige.core import parallel
from vestige.errors import DataError, MissingExtraError

logger = logging.getLogger(__name__)

SUFFIXES = (".wav", ".flac")
METADATA = "metadata.jsonl"
_TOLD = 3
Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """One file.

    Attributes:
        path: of it.
        about: what metadata.jsonl says of it; "text" is its transcript.
        digest: sha256 in hex of its bytes.
    """

    path: Path
    about: Mapping[str, Any]
    digest: str

    @property
    def text(self) -> str | None:
        """Its transcript; None where nobody wrote one."""
        text = self.about.get("text")
        return text if isinstance(text, str) else None


@dataclass
class Notes:
    """What became of files while they were read: of each a count, and the first names.

    Attributes:
        skipped: corrupt, or without a sample.
        resampled: of another rate.
        cut: longer than a network hears, and without a transcript.
        too_long: likewise with a transcript, which would not be true of a part; left out.
        mixed: of several channels.
    """

    skipped: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """For the record."""
        return {key: len(names) for key, names in vars(self).items()}

    def tell(self, where: str, sample_rate_hz: int, seconds: float) -> None:
        """Say what was noticed, once."""
        said = {
            "skipped": "are corrupt or hold no sample and are skipped",
            "resampled": f"have another sample rate and are resampled to {sample_rate_hz} Hz",
            "cut": f"are longer than {seconds:g} s and are cut",
            "too_long": f"are longer than {seconds:g} s and are left out, as their texts are whole",
            "mixed": "have several channels, which are averaged",
        }
        for key, words in said.items():
            names: list[str] = getattr(self, key)
            message = f"{where}: {len(names):,} files {words} ({', '.join(names[:_TOLD])}"
            message += ", ...)" if len(names) > _TOLD else ")"
            if names and parallel.says(message):
                # Only what is lost is probably a mistake.
                logger.log(
                    logging.WARNING if key in ("skipped", "cut", "too_long") else logging.INFO,
                    "%s",
                    message,
                )


def list_clips(folder: Path) -> list[Clip]:
    """The files of a folder: those that metadata.jsonl names in its order, else all by name.

    Where there is metadata, files that it does not name have none and come last.

    Raises:
        DataError: metadata.jsonl is damaged or names a file that is not there.
    """
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    rows = _metadata(folder)
    missing = [name for name in rows if name not in found]
    if missing:
        raise DataError(
            f"got {folder / METADATA} with {len(missing)} files that are not there (first: "
            f"{missing[0]}), expected a file in {folder} for each line; put them there or take the "
            "lines out"
        )
    names = [*rows, *sorted(set(found) - set(rows))]
    return [Clip(found[name], rows.get(name, {}), _digest(found[name])) for name in names]


def holds_clips(folder: Path) -> bool:
    """Whether there is a recording in a folder or below it."""
    return folder.is_dir() and any(
        path.suffix.lower() in SUFFIXES for path in folder.rglob("*") if path.is_file()
    )


def read_clip(clip: Clip, sample_rate_hz: int, notes: Notes) -> Samples | None:
    """The samples (n,) in [-1, 1] of a file at a rate; None for one that is damaged or empty.

    Raises:
        MissingExtraError: a package that reads or resamples it is not installed.
    """
    try:
        samples, rate = _decoded(clip.path)
    except (OSError, EOFError, ValueError, RuntimeError, wave.Error):
        notes.skipped.append(clip.path.name)
        return None
    if samples.ndim > 1:
        notes.mixed.append(clip.path.name)
        samples = samples.mean(1)
    if not len(samples) or not np.isfinite(samples).all():
        notes.skipped.append(clip.path.name)
        return None
    if rate != sample_rate_hz:
        notes.resampled.append(clip.path.name)
        samples = _resampled(samples, rate, sample_rate_hz)
    return samples.astype(np.float32, copy=False).clip(-1, 1)


def as_rows(clips: Sequence[Samples], length: int) -> Samples:
    """Clips as rows (N, length), zeros behind what is shorter; what is longer is cut."""
    rows = np.zeros((len(clips), length), dtype=np.float32)
    for row, clip in zip(rows, clips, strict=True):
        row[: min(length, len(clip))] = clip[:length]
    return rows


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def _metadata(folder: Path) -> dict[str, Mapping[str, Any]]:
    path = folder / METADATA
    if not path.is_file():
        return {}
    rows: dict[str, Mapping[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"got {path}, which cannot be read ({error}); save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"got line {number} of {path}, which is no JSON ({error}), expected an object in "
                "each line; correct it"
            ) from error
        if not isinstance(row, Mapping) or not isinstance(row.get("file_name"), str):
            raise DataError(
                f"got line {number} of {path} without file_name, expected an object like "
                '{"file_name": "a.wav", "text": "hello"}; add it'
            )
        rows[row["file_name"]] = row
    return rows


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(
            f"got {path}, which cannot be read ({error}), expected a recording; correct its "
            "permissions or take it out"
        ) from error


def _decoded(path: Path) -> tuple[NDArray[np.float64], int]:
    raw = path.read_bytes()
    try:
        import soundfile
    except ImportError as error:
        if path.suffix.lower() != ".wav":
            raise MissingExtraError(
                f"reading {path.name} needs soundfile, which is not installed; "
                "pip install 'vestige[speech]'"
            ) from error
        return _plain_wave(raw)
    samples, rate = soundfile.read(io.BytesIO(raw), dtype="float64")
    return samples, int(rate)


def _plain_wave(raw: bytes) -> tuple[NDArray[np.float64], int]:
    """16-bit PCM, without any package."""
    with wave.open(io.BytesIO(raw)) as opened:
        if opened.getsampwidth() != 2:
            raise MissingExtraError(
                f"got WAV of {8 * opened.getsampwidth()} bits, which needs soundfile, and that is "
                "not installed; pip install 'vestige[speech]'"
            )
        data = np.frombuffer(opened.readframes(opened.getnframes()), dtype="<i2") / 32768.0
        channels = opened.getnchannels()
        return (data.reshape(-1, channels) if channels > 1 else data), opened.getframerate()


def _resampled(samples: NDArray[np.float64], rate: int, wanted: int) -> NDArray[np.float64]:
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise MissingExtraError(
            f"recordings of {rate} Hz have to be resampled to {wanted} Hz, which needs scipy; "
            "pip install 'vestige[speech]'"
        ) from error
    common = gcd(rate, wanted)
    made: NDArray[np.float64] = resample_poly(samples, wanted // common, rate // common)
    return made
