"""Decoded images on disk, each set once: keyed by content, written aside and renamed when whole."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vestige.core.types import InputSpec
from vestige.data.unlabelled.arrays import ArrayImages
from vestige.data.unlabelled.decoding import (
    VERSION,
    Hashes,
    Skipped,
    Unlabelled,
    check_spec,
    row_hashes,
)
from vestige.data.unlabelled.made_up import stream
from vestige.errors import DataError
from vestige.recipes.teacher import cache_folder
from vestige.training.files import read_json, write_json, writing

logger = logging.getLogger(__name__)

_CARD, _IMAGES, _HASHES = "card.json", "images.npy", "hashes.npy"
_PROBES, _PROBE_BYTES = 64, 4096
_TELL_EVERY_S = 10.0


@dataclass(frozen=True)
class Kept:
    """A set of images as it is drawn from.

    Attributes:
        images: an .npy file of uint8 (N, H, W, C), or (N, H, W) of one channel.
        hashes: (N,), of each image's contents, before any distortion.
        card: what is known of it: "rows", "skipped" (how many), "first_skipped", "repeated",
            "greyed" and "key".
        folder: of the entry.
    """

    images: Path
    hashes: Hashes
    card: Mapping[str, Any]
    folder: Path


def images_folder() -> Path:
    """Where decoded images are kept: $VESTIGE_CACHE/images, else in the user's cache folder."""
    return cache_folder().with_name("images")


def keep(raw: Unlabelled, spec: InputSpec, *, count: int | None = None, seed: int = 0) -> Kept:
    """Decode a set once and keep it.

    An .npy file that holds what decoding would give is left where it is; only the hashes of its
    rows are kept.

    Args:
        raw: opened.
        spec: of the teacher.
        count: take the first so many after a shuffle by `seed`; None takes all. What cannot be
            decoded does not count.
        seed: of the shuffle.

    Raises:
        DataError: nothing can be decoded, or fewer than `count`.
        StorageError: it cannot be written.
    """
    check_spec(spec)
    if count is not None and count > len(raw):
        raise DataError(
            f"got count {count:,} for '{raw.name}', which has {len(raw):,} images, expected at "
            "most as many; lower it, or leave it out"
        )
    told = {
        "version": VERSION,
        "content": raw.fingerprint,
        "shape": list(spec.shape),
        "count": count,
        "seed": None if count is None else seed,
    }
    mapped = isinstance(raw, ArrayImages) and raw.paths and count is None
    own = raw if isinstance(raw, ArrayImages) and mapped and raw.fits(spec) else None

    def write(folder: Path) -> dict[str, Any]:
        return _decode(raw, spec, count, seed, folder) if own is None else _hash_only(own, folder)

    folder, card = entry(told, raw.name, write)
    _tell(raw, card)
    images = folder / _IMAGES if own is None else own.paths[0]
    return Kept(images, np.load(folder / _HASHES), card, folder)


def entry(
    told: Mapping[str, Any], name: str, write: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """The entry of the cache that `told` describes, made by `write` where there is none.

    Args:
        told: all that decides the contents; JSON.
        name: for messages.
        write: fills an empty folder and returns what is to stand on the card.

    Returns:
        Its folder and its card.
    """
    text = json.dumps(told, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    folder = images_folder() / key
    if (card := _sound(folder)) is not None:
        return folder, card
    with _alone(folder, name):
        # Meanwhile another process may have made it.
        if (card := _sound(folder)) is not None:
            return folder, card
        if folder.exists():
            logger.warning("the cached images of '%s' are damaged and are decoded again", name)
            shutil.rmtree(folder)
        partial = folder.with_name(f"{key}.partial")
        # Of a process that was killed: whoever writes holds the lock.
        shutil.rmtree(partial, ignore_errors=True)
        with writing(partial):
            partial.mkdir(parents=True)
            try:
                made = write(partial)
                files = {path.name: _probe(path) for path in partial.iterdir()}
                card = {"key": key, "name": name, **told, **made, "files": files}
                write_json(partial / _CARD, card)
                os.rename(partial, folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return folder, card


class RowsFile:
    """An .npy file of images that grows block by block; its header is right once it is closed."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.count = 0
        self._shape = shape
        self._stream: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._header()
        self._start = self._stream.tell()

    def append(self, images: NDArray[np.uint8]) -> None:
        """Add images (n, ...) behind the others."""
        self._stream.write(np.ascontiguousarray(images).data)
        self.count += len(images)

    def close(self) -> None:
        """Write how many there are, and everything to the disk."""
        self._stream.seek(0)
        self._header()
        if self._stream.tell() != self._start:
            raise RuntimeError("the header of an .npy file changed its length")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def _header(self) -> None:
        # NumPy leaves room for a longer first axis, so that both headers are of one length.
        np.lib.format.write_array_header_1_0(
            self._stream,
            {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self._shape)},
        )


def save_array(path: Path, values: NDArray[Any]) -> None:
    """Write an .npy file through to the disk."""
    with open(path, "wb") as stream:
        np.save(stream, values)
        stream.flush()
        os.fsync(stream.fileno())


def _hash_only(raw: ArrayImages, folder: Path) -> dict[str, Any]:
    size = 4096
    hashes = [row_hashes(raw.images[start : start + size]) for start in range(0, len(raw), size)]
    save_array(folder / _HASHES, np.concatenate(hashes))
    return {"rows": len(raw), "skipped": 0, "first_skipped": [], "repeated": 0, "greyed": 0}


def _decode(
    raw: Unlabelled, spec: InputSpec, count: int | None, seed: int, folder: Path
) -> dict[str, Any]:
    channels, height, width = spec.shape
    total = len(raw) if count is None else count
    order = None if count is None else stream(seed, "chosen images").permutation(len(raw))
    rows = RowsFile(folder / _IMAGES, (height, width, channels))
    hashes: list[Hashes] = []
    skipped, repeated, greyed, start = Skipped(), 0, 0, 0
    progress = _Progress(raw.name, total)
    while rows.count < total and start < len(raw):
        wanted = total - rows.count
        chosen = np.arange(len(raw)) if order is None else np.sort(order[start : start + wanted])
        start += len(chosen)
        for block in raw.blocks(spec, chosen):
            rows.append(block.images)
            hashes.append(row_hashes(block.images))
            skipped = skipped.plus(block.skipped)
            repeated += block.repeated
            greyed += block.greyed
            progress(rows.count)
    rows.close()
    if not rows.count or (count is not None and rows.count < count):
        raise DataError(
            f"got {rows.count:,} images of '{raw.name}' that can be decoded and {skipped.count:,} "
            f"that cannot ({'; '.join(skipped.first)}), expected "
            f"{'at least one' if count is None else f'{count:,}'}; replace the files, or name "
            "others"
        )
    save_array(folder / _HASHES, np.concatenate(hashes))
    return {
        "rows": rows.count,
        "skipped": skipped.count,
        "first_skipped": list(skipped.first),
        "repeated": repeated,
        "greyed": greyed,
    }


class _Progress:
    """A line every ten seconds of a long decoding."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._started = self._told = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._told < _TELL_EVERY_S or not done:
            return
        self._told = now
        left = (now - self._started) / done * (self._total - done)
        logger.info(
            "decoding '%s': %s of %s images, about %d s left",
            *(self._name, f"{done:,}", f"{self._total:,}", round(left)),
        )


def _tell(raw: Unlabelled, card: Mapping[str, Any]) -> None:
    """What is not as it seems, once for each run, whether decoded now or before."""
    skipped = Skipped(int(card["skipped"]), tuple(card["first_skipped"]))
    skipped = Skipped(raw.left_out.count + skipped.count, (*skipped.first, *raw.left_out.first)[:5])
    if skipped.count:
        logger.warning(
            "%s of '%s' left out, %s images are used: %s%s",
            *(
                "1 file" if skipped.count == 1 else f"{skipped.count:,} files",
                raw.name,
                f"{card['rows']:,}",
                "; ".join(skipped.first),
            ),
            "; ..." if skipped.count > len(skipped.first) else "",
        )
    if card["repeated"]:
        logger.info(
            "%s images of '%s' have one channel, which is repeated for the teacher",
            *(f"{card['repeated']:,}", raw.name),
        )
    if card["greyed"]:
        logger.info(
            "%s images of '%s' have colours, which are turned to grey for the teacher",
            *(f"{card['greyed']:,}", raw.name),
        )


def _sound(folder: Path) -> dict[str, Any] | None:
    """The card of an entry whose files are what it says; None of one that is missing or damaged."""
    card = read_json(folder / _CARD)
    files = card.get("files") if card is not None else None
    if not isinstance(files, Mapping) or _HASHES not in files:
        return None
    try:
        if any(_probe(folder / name) != known for name, known in files.items()):
            return None
    except OSError:
        return None
    return card


def _probe(path: Path) -> dict[str, Any]:
    """Size of a file and a digest of its head and of blocks all over it; quick for any size."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    places = sorted({size * part // _PROBES for part in range(_PROBES)} | {size - _PROBE_BYTES})
    with open(path, "rb") as stream_:
        for place in places:
            stream_.seek(max(0, place))
            digest.update(stream_.read(_PROBE_BYTES))
    return {"bytes": size, "probe": digest.hexdigest()}


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Wait until no other process makes the same entry."""
    import fcntl

    lock = folder.with_name(f"{folder.name}.lock")
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = open(lock, "a", encoding="utf8")  # noqa: SIM115 - closed below
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process decodes '%s'; waiting for it", name)
            fcntl.flock(handle, fcntl.LOCK_EX)
        # The lock goes with the process; its file stays, since others may wait on it.
        yield
