"""Labelled images as pictures in one folder per class."""

import hashlib
import io
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vestige.data._npz import Images, Labels
from vestige.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Pictures:
    """Pictures that are decoded when they are asked for, one at a time."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: slice | NDArray[np.bool_]) -> "Pictures":
        if isinstance(rows, slice):
            return Pictures(self.paths[rows])
        return Pictures(tuple(self.paths[row] for row in np.flatnonzero(rows)))

    def read(self, *, grey: bool) -> Iterator[Images]:
        """Each picture in its own size: (1, H, W) in grey, else (1, H, W) or (1, H, W, 3).

        Transparency is dropped and a camera's orientation mark is not followed, as data loaders of
        networks do.

        Raises:
            DataError: a picture cannot be decoded.
        """
        for path in self.paths:
            yield decoded(path, grey=grey)[None]


@dataclass(frozen=True)
class ClassFolders:
    """What lies in folders by class.

    The order is that of the pictures' contents: file names, and where the folder lies, change
    neither it nor a share of it.

    Attributes:
        pictures: N of them.
        labels: (N,), numbers of `classes`.
        classes: names of the folders, sorted as text; of all splits that lie beside one another.
        digests: sha256 in hex of each file.
    """

    pictures: Pictures
    labels: Labels
    classes: tuple[str, ...]
    digests: tuple[str, ...]


def class_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that hold pictures, sorted by name; [] without any."""
    return [one for one in folders_in(folder) if any(pictures_in(one))]


def count_pictures(folder: Path) -> int:
    """Number of pictures in the class folders in `folder`."""
    return sum(1 for one in class_folders(folder) for _ in pictures_in(one))


def read_class_folders(folder: Path, classes: tuple[str, ...]) -> ClassFolders:
    """All pictures in the class folders in `folder`; contents are hashed, not decoded.

    Args:
        folder: holds one folder of pictures per class.
        classes: names of the classes, those of the folders among them.

    Raises:
        DataError: a file cannot be read, or pictures lie deeper than in a class folder.
    """
    found = []
    try:
        for one in folders_in(folder):
            check_depth(one)
            found += [
                (hashlib.sha256(path.read_bytes()).hexdigest(), classes.index(one.name), path)
                for path in pictures_in(one)
            ]
    except OSError as error:
        raise DataError(
            f"got {folder}, which cannot be read ({error}), expected pictures by class; correct "
            "its permissions"
        ) from error
    found.sort()
    return ClassFolders(
        Pictures(tuple(path for _, _, path in found)),
        np.array([label for _, label, _ in found], dtype=np.int64),
        classes,
        tuple(digest for digest, _, _ in found),
    )


def folders_in(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted; [] where there is none."""
    if not folder.is_dir():
        return []
    return sorted(one for one in folder.iterdir() if one.is_dir() and one.name[0] != ".")


def pictures_in(folder: Path) -> Iterator[Path]:
    """The pictures in `folder`, in no order."""
    for path in folder.iterdir():
        if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file():
            yield path


def check_depth(folder: Path, where: str = "the class's own folder") -> None:
    """Nothing in `folder`, which `where` describes, is left out in silence.

    Raises:
        DataError: pictures lie deeper in it.
    """
    for deeper in folders_in(folder):
        if any(path.suffix.lower() in SUFFIXES for path in deeper.rglob("*")):
            raise DataError(
                f"got pictures in {deeper}, expected them in {where} {folder}; move them there"
            )
    others = [path.name for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    others = sorted(name for name in others if Path(name).suffix.lower() not in SUFFIXES)
    if others:
        logger.warning(
            "%d files in %s are no pictures (%s, ...) and are left out; pictures end in %s",
            *(len(others), folder, others[0], ", ".join(SUFFIXES)),
        )


def decoded(picture: Path | bytes, *, grey: bool) -> Images:
    """A picture from its file or its bytes: (H, W) in grey, else (H, W) or (H, W, 3).

    Raises:
        DataError: it cannot be decoded.
    """
    with opened(picture) as image:
        if image.mode in ("I", "F"):
            raise ValueError("32 bits per channel, expected 8 or 16")
        if image.mode.startswith("I;16"):
            # Pillow would clip what is above 255.
            wide = np.asarray(image).astype(np.uint32)
            return ((wide + 128) // 257).astype(np.uint8)
        plain = grey or image.mode in ("1", "L", "LA")
        return np.array(image.convert("L" if plain else "RGB"), dtype=np.uint8)


@contextmanager
def opened(picture: Path | bytes) -> Iterator[Any]:
    """The picture in a file or in its bytes, which is decoded when it is asked.

    Raises:
        DataError: it cannot be opened or decoded within the block, or a ValueError was raised.
    """
    from PIL import Image

    named = "a picture" if isinstance(picture, bytes) else str(picture)
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            yield image
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"got {named}, which cannot be read as a picture ({error}), expected one of "
            f"{', '.join(SUFFIXES)}; replace or remove it"
        ) from error
