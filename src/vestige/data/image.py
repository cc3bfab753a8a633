"""Sets of labelled images on disk, and how they become inputs of a network."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vestige.core.types import InputSpec
from vestige.data._built_in import BUILT_INS, read_built_in
from vestige.data._inputs import channel_statistics, to_inputs
from vestige.data._layout import (
    BUILT_IN,
    SPLITS,
    Part,
    Size,
    check_split,
    class_names,
    data_folder,
    is_undivided,
    listed_names,
    locate,
    named_classes,
    place_of,
    sizes,
)
from vestige.data._masks import MaskPictures, holds_masks, read_mask_folders, to_masks
from vestige.data._npz import Arrays, Images, Labels, read_npz
from vestige.data._pictures import Pictures, read_class_folders
from vestige.data._scenes import SCENE_CLASSES, draw_scenes
from vestige.data._subset import check_names, choose, full_name, split_name
from vestige.errors import DataError

__all__ = [
    "BUILT_IN",
    "COMMON_SETS",
    "SCENE_CLASSES",
    "ImageSet",
    "channel_statistics",
    "data_folder",
    "draw_scenes",
    "list_images",
    "load_images",
    "to_inputs",
    "to_masks",
]

COMMON_SETS = ("camvid", "cifar10", "fashion_mnist", "mnist", "web32")


@dataclass(eq=False)
class ImageSet:
    """One split of a set of labelled images; a `core.protocols.DataSet`.

    Attributes:
        name: name of the set, with the classes in brackets where only some are taken.
        split: "train", "select", "test" or "all".
        images: (N, H, W) or (N, H, W, C), uint8; or N pictures, which are decoded by `inputs`.
        labels: (N,), int64, in [0, len(classes)) where the classes have names; or masks (N, H, W)
            of integers; or N pictures of masks, which are decoded by `examples`.
        classes: names of the classes; () where the set gives none, and labels are class numbers.
        path: the file or folder it was read from; None for the built-in set.
        fingerprint: sha256 in hex of shapes, dtypes and bytes of images, labels and class names; of
            pictures it is of their files' contents, labels (or their masks' contents) and class
            names, and where only some classes are taken, of that of the whole and their names.
            Where the set lies and what its pictures' files are called does not matter.
    """

    name: str
    split: str
    images: Images | Pictures
    labels: Labels | MaskPictures
    classes: tuple[str, ...]
    path: Path | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def listed(cls) -> list[tuple[str, str, Mapping[str, Size]]]:
        """The same as `list_images`."""
        return list_images()

    def least_classes(self) -> int:
        """The fewest classes that it can have: its names, else what labels of images show.

        They need not show every class, and masks without names may hold a value for none: 2.
        """
        if self.classes or isinstance(self.labels, MaskPictures) or self.labels.ndim > 1:
            return len(self.classes) or 2
        return int(self.labels.max()) + 1

    @classmethod
    def open(cls, name: str, split: str) -> "ImageSet":
        """The same as `load_images`."""
        return load_images(name, split)

    @classmethod
    def find(cls, name: str, split: str) -> None:
        """Look for what `open` would read, without reading it.

        Raises:
            DataError: it is not there.
        """
        name, chosen = split_name(name)
        if name not in BUILT_INS:
            part = locate(name, split)
            if chosen:
                check_names(name, chosen, named_classes(part.path))

    @classmethod
    def undivided(cls, name: str) -> bool:
        """Whether `name` is the path of class folders of pictures without splits."""
        name, _ = split_name(name)
        return name not in BUILT_INS and is_undivided(name)

    def inputs(self, spec: InputSpec) -> Tensor:
        """All images as inputs (N, C, H, W) of `spec`, see `to_inputs`."""
        return to_inputs(self.images, spec)

    def examples(self, spec: InputSpec) -> tuple[Tensor, Tensor]:
        """Inputs (N, C, H, W), and labels (N,) or masks (N, H, W) of their size, int64."""
        if isinstance(self.labels, MaskPictures) or self.labels.ndim == 3:
            return self.inputs(spec), to_masks(self.labels, spec)
        return self.inputs(spec), torch.from_numpy(self.labels)


def load_images(name_or_path: str, split: str) -> ImageSet:
    """Read one split of a set of images; pictures are not decoded yet.

    "digits" is built in: the 1,797 handwritten 8x8 digits that scikit-learn ships, with values
    0..16 scaled to 0..255 and rounded. They are put into the order
    numpy.random.RandomState(0).permutation(1797); the first 50 of each class are the test split
    (500), and of the other 1,297 the last 10 % are select (129) and the rest is train (1,168).

    "scenes" is built in, too: 1,000, 100 and 200 drawn scenes of 64x64 pixels with exact masks of
    5 classes, see `draw_scenes`.

    Any other name is a folder in `data_folder()`, and anything with a path separator is a folder
    itself. A split is SPLIT.npz, or a folder SPLIT with one folder of pictures per class; "select"
    may be called "val". Without it the last 10 % of train are "select", and "train" is the rest:
    of an .npz in stored order, of pictures in the order of their contents' sha256. A folder SPLIT
    with images/ and masks/ and nothing else holds a class for each pixel: the mask of
    images/NAME.png is masks/NAME.png, an 8-bit grey or palette PNG of class numbers, 255 where
    there is none; SPLIT/classes.txt, or the one beside SPLIT, may name the classes, one per line.

    A folder with only all.npz, or all/CLASS/*.png, or CLASS/*.png, is divided by the sha256 of each
    image's bytes, 80 % train, 10 % select, 10 % test, whatever the order and the names of files;
    equal images fall into one split.

    The path of an .npz file, or of class folders whose folder is called as a split, is one split
    and opens as "test" only.

    Behind all of these, class names in brackets take these classes only, numbered in the order
    given: "cifar10[ship,dog]". Splits are divided first. Not for masks.

    Args:
        name_or_path: "digits", "scenes", a name in the data folder, or a path.
        split: "train", "select" or "test"; the three never overlap. "all" of what is not divided.

    Raises:
        DataError: the split is unknown, or what holds it is missing, damaged or in another layout.
    """
    check_split(split)
    name_or_path, chosen = split_name(name_or_path)
    if name_or_path in BUILT_INS:
        found = _image_set(name_or_path, split, read_built_in(name_or_path, split), None)
        return _chosen(found, chosen) if chosen else found
    part = locate(name_or_path, split)
    place = place_of(name_or_path)
    name = place.stem if place.suffix == ".npz" else place.name
    found = _read(name, part)
    found = _chosen(found, chosen) if chosen else found
    if not len(found):
        raise DataError(
            f"got no images for the '{split}' split in {part.path}, expected enough for one; add "
            "images, or store the splits apart: train, select and test"
        )
    return found


def list_images() -> list[tuple[str, str, Mapping[str, Size]]]:
    """What `load_images` can find: name, where, and per split its size, "missing" or "damaged".

    Lists the built-in sets, every set in `data_folder()`, and the sets that shipped recipes ask for
    even where they are missing. A set that is stored in one piece has the one size "all". Reads
    headers and names of files only.
    """
    found: list[tuple[str, str, Mapping[str, Size]]] = [
        (name, known.where, dict(known.sizes)) for name, known in BUILT_INS.items()
    ]
    root = data_folder()
    names = set(COMMON_SETS)
    if root.is_dir():
        names |= {folder.name for folder in root.iterdir() if folder.is_dir()}
    for name in sorted(names - BUILT_INS.keys()):
        try:
            held = sizes(root / name)
        except (DataError, OSError):
            held = dict.fromkeys(SPLITS, "damaged")
        if held or name in COMMON_SETS:
            found.append((name, str(root / name), held or dict.fromkeys(SPLITS, "missing")))
    return found


def _read(name: str, part: Part) -> ImageSet:
    if part.path.suffix == ".npz":
        return _read_npz(name, part)
    return _read_masked(name, part) if holds_masks(part.path) else _read_pictures(name, part)


def _read_npz(name: str, part: Part) -> ImageSet:
    images, labels, classes = read_npz(part.path)
    if part.rule == "content":
        digests = (hashlib.sha256(image.tobytes()).hexdigest() for image in images)
        chosen = np.array([part.has(digest) for digest in digests], dtype=bool)
        arrays: Arrays = (images[chosen], labels[chosen], classes)
    else:
        rows = part.rows(len(images))
        arrays = (images[rows], labels[rows], classes)
    return _image_set(name, part.split, arrays, part.path)


def _read_pictures(name: str, part: Part) -> ImageSet:
    found = read_class_folders(part.path, class_names(part.path))
    chosen = _rows_of(part, found.digests)
    pictures, labels = found.pictures[chosen], found.labels[chosen]
    lines = [f"{found.digests[row]} {found.labels[row]}\n" for row in np.flatnonzero(chosen)]
    whole = _digest_of(lines, found.classes)
    return ImageSet(name, part.split, pictures, labels, found.classes, part.path, whole)


def _read_masked(name: str, part: Part) -> ImageSet:
    found, classes = read_mask_folders(part.path), listed_names(part.path)
    chosen = _rows_of(part, found.digests)
    pairs = zip(found.digests, found.mask_digests, strict=True)
    lines = [f"{one} {mask}\n" for (one, mask), has in zip(pairs, chosen, strict=True) if has]
    whole = _digest_of(lines, classes)
    pictures, masks = found.pictures[chosen], found.masks[chosen]
    return ImageSet(name, part.split, pictures, masks, classes, part.path, whole)


def _rows_of(part: Part, digests: Sequence[str]) -> NDArray[np.bool_]:
    """Which pictures with these digests belong to the split, (N,)."""
    if part.rule == "content":
        return np.array([part.has(digest) for digest in digests], dtype=bool)
    chosen = np.zeros(len(digests), dtype=bool)
    chosen[part.rows(len(chosen))] = True
    return chosen


def _digest_of(lines: Sequence[str], classes: Sequence[str]) -> str:
    whole = hashlib.sha256()
    for line in lines:
        whole.update(line.encode())
    whole.update("\0".join(classes).encode())
    return whole.hexdigest()


def _chosen(found: ImageSet, names: tuple[str, ...]) -> ImageSet:
    """Only the classes `names` of a set, numbered in this order."""
    rows, labels = choose(found.name, found.labels, names, found.classes)
    name = full_name(found.name, names)
    if isinstance(found.images, Pictures):
        digest = hashlib.sha256("\0".join((found.fingerprint, *names)).encode()).hexdigest()
        return replace(
            found, name=name, images=found.images[rows], labels=labels, classes=names,
            fingerprint=digest,
        )  # fmt: skip
    return _image_set(name, found.split, (found.images[rows], labels, names), found.path)


def _image_set(name: str, split: str, arrays: Arrays, path: Path | None) -> ImageSet:
    images, labels, classes = arrays
    digest = hashlib.sha256()
    for array in (images, labels):
        digest.update(f"{array.dtype.name}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    digest.update("\0".join(classes).encode())
    return ImageSet(name, split, images, labels, classes, path, digest.hexdigest())
