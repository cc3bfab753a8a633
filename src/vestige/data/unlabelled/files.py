"""Images in picture files, at any depth of a folder and in any size."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vestige.core.types import InputSpec
from vestige.data._pictures import SUFFIXES, decoded
from vestige.data.unlabelled.decoding import Block, Skipped, in_size
from vestige.errors import DataError

_FEW = 256
_NONE = Skipped()


class PictureFiles:
    """Pictures in the order of their contents' sha256, so that names of files change nothing.

    Args:
        name: what is shown to the user.
        paths: the folder, or the files.
        found: digest and path of each picture; paths may be below the one folder of `paths`.
        left_out: what is no picture.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        found: Sequence[tuple[bytes, str]],
        left_out: Skipped = _NONE,
    ) -> None:
        self.name = name
        self.paths = tuple(paths)
        self.left_out = left_out
        self._found = found
        self._folder = paths[0] if len(paths) == 1 else Path()
        whole = hashlib.sha256()
        for digest, _ in found:
            whole.update(digest)
        self.fingerprint = whole.hexdigest()

    def __len__(self) -> int:
        return len(self._found)

    def blocks(self, spec: InputSpec, rows: NDArray[np.int64]) -> Iterator[Block]:
        """See `decoding.Unlabelled`."""
        names = [self._found[row][1] for row in rows]
        yield from picture_blocks(((name, self._folder / name) for name in names), spec)


def find_pictures(
    folder: Path,
    name: str,
    *,
    keep: Callable[[str], bool] | None = None,
    rows: Callable[[int], slice] = lambda count: slice(0, count),
) -> PictureFiles:
    """The pictures in a folder, at any depth.

    What has no suffix of a picture, or no bytes, is left out and told; what cannot be decoded is
    found out when it is. Hidden files and folders are passed over in silence.

    Args:
        folder: searched at any depth.
        name: what is shown to the user.
        keep: whether a digest, in hex, belongs to what was asked for; None keeps all.
        rows: which of those that are kept, as a function of their number.

    Raises:
        DataError: the folder cannot be read or holds no picture.
    """
    found: list[tuple[bytes, str]] = []
    left_out: list[str] = []
    try:
        for path in _files(folder):
            content = _content(folder / path)
            if isinstance(content, str):
                left_out.append(f"{path}: {content}")
                continue
            digest = hashlib.sha256(content)
            if keep is None or keep(digest.hexdigest()):
                found.append((digest.digest(), path))
    except OSError as error:
        raise DataError(
            f"got {folder}, which cannot be read ({error}), expected pictures; correct its "
            "permissions"
        ) from error
    found.sort()
    found = found[rows(len(found))]
    if not found:
        others = f" but {len(left_out)} other files" if left_out else ""
        raise DataError(
            f"got no pictures in {folder}{others}, expected at least one of {', '.join(SUFFIXES)} "
            "at any depth; put some there, or name an .npz or .npy file"
        )
    return PictureFiles(name, (folder,), found, Skipped().plus(sorted(left_out)))


def chosen_pictures(paths: Sequence[Path], name: str) -> PictureFiles:
    """Certain files.

    Raises:
        DataError: one cannot be read.
    """
    try:
        found = sorted((hashlib.sha256(one.read_bytes()).digest(), str(one)) for one in paths)
    except OSError as error:
        raise DataError(f"got a picture of {name} that cannot be read ({error})") from error
    return PictureFiles(name, paths, found)


def picture_blocks(
    pictures: Iterator[tuple[str, "Path | bytes"]], spec: InputSpec
) -> Iterator[Block]:
    """Decode pictures one by one; one that cannot be is told and left out.

    Args:
        pictures: what each is called, and its file or its bytes.
        spec: of images (C, H, W).
    """
    images: list[NDArray[np.uint8]] = []
    skipped: list[str] = []
    repeated = 0
    for name, source in pictures:
        try:
            block = in_size(decoded(source, grey=spec.shape[0] == 1)[None], spec)
        # Decoders of damaged pictures raise whatever they stumble over.
        except Exception as error:
            skipped.append(f"{name}: {_why(error)}")
        else:
            images.append(block.images)
            repeated += block.repeated
        if len(images) + len(skipped) >= _FEW:
            yield _joined(images, spec, skipped, repeated)
            images, skipped, repeated = [], [], 0
    if images or skipped:
        yield _joined(images, spec, skipped, repeated)


def _joined(
    images: Sequence[NDArray[np.uint8]], spec: InputSpec, skipped: Sequence[str], repeated: int
) -> Block:
    channels, height, width = spec.shape
    none = np.empty((0, height, width, channels), dtype=np.uint8)
    return Block(np.concatenate([none, *images]), tuple(skipped), repeated)


def _files(folder: Path) -> Iterator[str]:
    """Paths below `folder`, as text; those of a million files as objects would take a gigabyte."""

    def fail(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        below = os.path.relpath(root, folder)
        for name in sorted(files):
            if name[0] != ".":
                yield name if below == "." else os.path.join(below, name)


def _content(path: Path) -> bytes | str:
    """The bytes of a picture file, or why it is none."""
    if path.suffix.lower() not in SUFFIXES:
        return "no picture"
    try:
        return path.read_bytes() or "empty"
    except OSError as error:
        return str(error.strerror or error)


def _why(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, DataError) and error.__cause__ else error
    return " ".join(str(cause).split()) or type(cause).__name__
