"""Images with a class for every pixel: masks as arrays, or as pictures beside the pictures."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vestige.core.types import InputSpec
from vestige.data._npz import Labels
from vestige.data._pictures import Pictures, check_depth, folders_in, opened, pictures_in
from vestige.errors import DataError

_IMAGES, _MASKS = "images", "masks"
# A palette's numbers are the classes, whatever its colours.
_MODES = ("1", "L", "P")


@dataclass(frozen=True)
class MaskPictures:
    """Masks that are decoded when they are asked for, one at a time."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: slice | NDArray[np.bool_]) -> "MaskPictures":
        if isinstance(rows, slice):
            return MaskPictures(self.paths[rows])
        return MaskPictures(tuple(self.paths[row] for row in np.flatnonzero(rows)))

    def read(self) -> Iterator[NDArray[Any]]:
        """Each mask in its own size, (1, H, W) uint8.

        Raises:
            DataError: one cannot be decoded.
        """
        for path in self.paths:
            with opened(path) as image:
                yield np.array(image, dtype=np.uint8)[None]


@dataclass(frozen=True)
class MaskFolders:
    """What lies in a folder of pictures and a folder of masks.

    The order is that of the pictures' contents, as of class folders.

    Attributes:
        pictures: N of them.
        masks: N of them, each as large as its picture.
        digests: sha256 in hex of each picture's file.
        mask_digests: sha256 in hex of each mask's file.
    """

    pictures: Pictures
    masks: MaskPictures
    digests: tuple[str, ...]
    mask_digests: tuple[str, ...]


def holds_masks(folder: Path) -> bool:
    """Whether `folder` holds images/ and masks/ and no other folder."""
    return [one.name for one in folders_in(folder)] == [_IMAGES, _MASKS]


def count_masked(folder: Path) -> int:
    """Number of pictures that have, or should have, a mask."""
    return sum(1 for _ in pictures_in(folder / _IMAGES))


def read_mask_folders(folder: Path) -> MaskFolders:
    """Pictures and masks of `folder`; contents are hashed and headers read, nothing is decoded.

    Raises:
        DataError: one lacks the other, they differ in size, a mask holds no class numbers, or a
            file cannot be read.
    """
    try:
        for part in (_IMAGES, _MASKS):
            check_depth(folder / part, "the folder")
        pictures, masks = (_by_stem(folder / part) for part in (_IMAGES, _MASKS))
        for here, there, part in ((pictures, masks, _MASKS), (masks, pictures, _IMAGES)):
            for stem in sorted(here.keys() - there.keys()):
                raise DataError(
                    f"got {here[stem]} and nothing called {stem} in {folder / part}, expected a "
                    "picture and its mask to be called alike; add it, or remove this one"
                )
        for stem, path in masks.items():
            _check_pair(pictures[stem], path)
        found = sorted((_digest(path), _digest(masks[s]), s) for s, path in pictures.items())
    except OSError as error:
        raise DataError(
            f"got {folder}, which cannot be read ({error}), expected pictures and masks; correct "
            "its permissions"
        ) from error
    return MaskFolders(
        Pictures(tuple(pictures[stem] for _, _, stem in found)),
        MaskPictures(tuple(masks[stem] for _, _, stem in found)),
        tuple(digest for digest, _, _ in found),
        tuple(digest for _, digest, _ in found),
    )


def to_masks(masks: Labels | MaskPictures, spec: InputSpec) -> Tensor:
    """Masks at the size of the spec; each pixel takes the class of the one that it lies in.

    Args:
        masks: (N, H, W) integers, or pictures.
        spec: an image spec (C, H, W).

    Returns:
        (N, H, W), int64.
    """
    height, width = spec.shape[1:]
    found = torch.empty(len(masks), height, width, dtype=torch.int64)
    start = 0
    for part in masks.read() if isinstance(masks, MaskPictures) else [masks]:
        rows, columns = _nearest(part.shape[1], height), _nearest(part.shape[2], width)
        resized = np.ascontiguousarray(part[:, rows[:, None], columns])
        found[start : start + len(part)] = torch.from_numpy(resized)
        start += len(part)
    return found


def _nearest(old: int, new: int) -> NDArray[np.int64]:
    """Which of `old` pixels the middles of `new` pixels lie in, as with bilinear resizing."""
    found: NDArray[np.int64] = (2 * np.arange(new) + 1) * old // (2 * new)
    return found


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in pictures_in(folder):
        if path.stem in found:
            raise DataError(
                f"got {path} and {found[path.stem].name}, expected each name once, since it tells "
                "picture and mask apart from the others; rename one"
            )
        found[path.stem] = path
    return found


def _check_pair(picture: Path, mask: Path) -> None:
    if mask.suffix.lower() != ".png":
        raise DataError(
            f"got the mask {mask}, expected a PNG, which keeps class numbers as they are; save it "
            "as one"
        )
    with opened(mask) as image:
        mode, size = image.mode, image.size
    if mode not in _MODES:
        raise DataError(
            f"got the mask {mask} in mode {mode}, expected 8-bit grey or palette: class numbers, "
            "255 for pixels to ignore; write the numbers, not their colours"
        )
    with opened(picture) as image:
        if image.size != size:
            raise DataError(
                f"got the mask {mask} of {size[0]}x{size[1]} pixels for {picture} of "
                f"{image.size[0]}x{image.size[1]}, expected equal sizes; resize the mask by "
                "nearest neighbour"
            )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
