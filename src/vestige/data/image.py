"""Sets of labelled images on disk, and how they become inputs of a network."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vestige.core.types import InputSpec
from vestige.data._layout import (
    BUILT_IN,
    SPLITS,
    Part,
    Size,
    check_split,
    class_names,
    data_folder,
    is_undivided,
    locate,
    place_of,
    sizes,
)
from vestige.data._npz import Arrays, Images, Labels, read_npz
from vestige.data._pictures import Pictures, read_class_folders
from vestige.errors import DataError, ShapeError

__all__ = [
    "BUILT_IN",
    "COMMON_SETS",
    "ImageSet",
    "channel_statistics",
    "data_folder",
    "list_images",
    "load_images",
    "to_inputs",
]

COMMON_SETS = ("cifar10", "fashion_mnist", "mnist", "web32")
DIGITS_TEST_PER_CLASS = 50
DIGITS_SEED = 0


@dataclass(eq=False)
class ImageSet:
    """One split of a set of labelled images; a `core.protocols.DataSet`.

    Attributes:
        name: name of the set.
        split: "train", "select", "test" or "all".
        images: (N, H, W) or (N, H, W, C), uint8; or N pictures, which are decoded by `inputs`.
        labels: (N,), int64, in [0, len(classes)) where the classes have names.
        classes: names of the classes; () where the set gives none, and labels are class numbers.
        path: the file or folder it was read from; None for the built-in set.
        fingerprint: sha256 in hex of shapes, dtypes and bytes of images, labels and class names; of
            pictures it is of their files' contents, labels and class names. Where the set lies and
            what its pictures' files are called does not matter.
    """

    name: str
    split: str
    images: Images | Pictures
    labels: Labels
    classes: tuple[str, ...]
    path: Path | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.images)

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
        if name != BUILT_IN:
            locate(name, split)

    @classmethod
    def undivided(cls, name: str) -> bool:
        """Whether `name` is the path of class folders of pictures without splits."""
        return name != BUILT_IN and is_undivided(name)

    def inputs(self, spec: InputSpec) -> Tensor:
        """All images as inputs (N, C, H, W) of `spec`, see `to_inputs`."""
        return to_inputs(self.images, spec)

    def examples(self, spec: InputSpec) -> tuple[Tensor, Tensor]:
        """Inputs (N, C, H, W) and labels (N,)."""
        return self.inputs(spec), torch.from_numpy(self.labels)


def load_images(name_or_path: str, split: str) -> ImageSet:
    """Read one split of a set of images; pictures are not decoded yet.

    "digits" is built in: the 1,797 handwritten 8x8 digits that scikit-learn ships, with values
    0..16 scaled to 0..255 and rounded. They are put into the order
    numpy.random.RandomState(0).permutation(1797); the first 50 of each class are the test split
    (500), and of the other 1,297 the last 10 % are select (129) and the rest is train (1,168).

    Any other name is a folder in `data_folder()`, and anything with a path separator is a folder
    itself. A split is SPLIT.npz, or a folder SPLIT with one folder of pictures per class; "select"
    may be called "val". Without it the last 10 % of train are "select", and "train" is the rest:
    of an .npz in stored order, of pictures in the order of their contents' sha256.

    A folder with only all.npz, or all/CLASS/*.png, or CLASS/*.png, is divided by the sha256 of each
    image's bytes, 80 % train, 10 % select, 10 % test, whatever the order and the names of files;
    equal images fall into one split.

    The path of an .npz file, or of class folders whose folder is called as a split, is one split
    and opens as "test" only.

    Args:
        name_or_path: "digits", a name in the data folder, or a path.
        split: "train", "select" or "test"; the three never overlap. "all" of what is not divided.

    Raises:
        DataError: the split is unknown, or what holds it is missing, damaged or in another layout.
    """
    check_split(split)
    if name_or_path == BUILT_IN:
        if split == "all":
            raise DataError(f"got split 'all' of '{BUILT_IN}', expected one of {', '.join(SPLITS)}")
        images, labels, classes = _digits(split)
        return _image_set(BUILT_IN, split, (images, labels, classes), None)
    part = locate(name_or_path, split)
    place = place_of(name_or_path)
    name = place.stem if place.suffix == ".npz" else place.name
    found = _read_npz(name, part) if part.path.suffix == ".npz" else _read_pictures(name, part)
    if not len(found):
        raise DataError(
            f"got no images for the '{split}' split in {part.path}, expected enough for one; add "
            "images, or store the splits apart: train, select and test"
        )
    return found


def to_inputs(images: Images | Pictures, spec: InputSpec, *, batch_size: int = 1024) -> Tensor:
    """Turn stored images into inputs of a network.

    Values are divided by 255; where the size differs from the spec's, images are resized bilinearly
    (align_corners off, antialiased when one side shrinks); grey images are repeated over the spec's
    channels; then the spec's normalisation is applied. Pictures are read in grey for a spec of one
    channel, and may differ in size.

    Args:
        images: (N, H, W) or (N, H, W, C), uint8; or pictures.
        spec: an image spec (C, H, W).
        batch_size: images that are converted at a time; bounds the memory, changes no value.

    Returns:
        (N, C, H, W), float32, on the CPU, in the normalised space of `spec`.

    Raises:
        DataError: the array is no uint8 image array, its channels do not fit the spec, or a picture
            cannot be decoded.
        ShapeError: the spec does not describe images.
    """
    if spec.kind != "image" or len(spec.shape) != 3:
        raise ShapeError(
            f"got an input spec of kind '{spec.kind}' and shape {spec.shape}, expected images "
            "(C, H, W); make it with InputSpec.image"
        )
    inputs = torch.empty(len(images), *spec.shape)
    start = 0
    for part in _batches(images, spec, batch_size):
        inputs[start : start + len(part)] = _converted(part, spec)
        start += len(part)
    return inputs


def _batches(images: Images | Pictures, spec: InputSpec, batch_size: int) -> Iterator[Images]:
    if isinstance(images, Pictures):
        yield from images.read(grey=spec.shape[0] == 1)
        return
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"got images of dtype {images.dtype} and shape {images.shape}, expected uint8 "
            "(N, H, W) or (N, H, W, C); scale values to 0..255 and put channels last"
        )
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]


def _converted(images: Images, spec: InputSpec) -> Tensor:
    found, (channels, height, width) = 1 if images.ndim == 3 else images.shape[3], spec.shape
    if found not in (1, channels):
        raise DataError(
            f"got images with {found} channels, expected {channels} as in the input spec; "
            f"convert the images or use a spec of {found} channels"
        )
    rows = torch.from_numpy(np.ascontiguousarray(images))
    rows = rows.unsqueeze(1) if images.ndim == 3 else rows.permute(0, 3, 1, 2)
    part = rows.float() / 255
    if part.shape[2:] != (height, width):
        shrinks = part.shape[2] > height or part.shape[3] > width
        part = functional.interpolate(
            part, (height, width), mode="bilinear", align_corners=False, antialias=shrinks
        )
    return spec.normalize(part.expand(-1, channels, -1, -1))


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, to choose the normalisation of an input spec.

    Args:
        images: (N, C, H, W) in [0, 1], for example `to_inputs` with a spec without normalisation.

    Returns:
        Mean and population standard deviation over N, H and W; C values each.
    """
    columns = images.double().transpose(0, 1).flatten(1)
    mean, std = columns.mean(1), columns.std(1, correction=0)
    return tuple(mean.tolist()), tuple(std.tolist())


def list_images() -> list[tuple[str, str, Mapping[str, Size]]]:
    """What `load_images` can find: name, where, and per split its size, "missing" or "damaged".

    Lists the built-in set, every set in `data_folder()`, and the sets that shipped recipes ask for
    even where they are missing. A set that is stored in one piece has the one size "all". Reads
    headers and names of files only.
    """
    built_in = {split: len(_digits(split)[0]) for split in SPLITS}
    found: list[tuple[str, str, Mapping[str, Size]]] = [
        (BUILT_IN, "built in (scikit-learn)", built_in)
    ]
    root = data_folder()
    names = set(COMMON_SETS)
    if root.is_dir():
        names |= {folder.name for folder in root.iterdir() if folder.is_dir()}
    for name in sorted(names - {BUILT_IN}):
        try:
            held = sizes(root / name)
        except (DataError, OSError):
            held = dict.fromkeys(SPLITS, "damaged")
        if held or name in COMMON_SETS:
            found.append((name, str(root / name), held or dict.fromkeys(SPLITS, "missing")))
    return found


def _digits(split: str) -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    # RandomState, not default_rng: numpy promises that its stream never changes.
    order = np.random.RandomState(DIGITS_SEED).permutation(len(labels))
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in range(10):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    is_test = rank[order] < DIGITS_TEST_PER_CLASS
    rows = order[is_test] if split == "test" else order[~is_test]
    if split != "test":
        rows = rows[Part(Path(), "tenth", split).rows(len(rows))]
    return images[rows], labels[rows], tuple(str(digit) for digit in range(10))


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
    if part.rule == "content":
        chosen = np.array([part.has(digest) for digest in found.digests], dtype=bool)
    else:
        chosen = np.zeros(len(found.digests), dtype=bool)
        chosen[part.rows(len(chosen))] = True
    pictures, labels = found.pictures[chosen], found.labels[chosen]
    whole = hashlib.sha256()
    for row in np.flatnonzero(chosen):
        whole.update(f"{found.digests[row]} {found.labels[row]}\n".encode())
    whole.update("\0".join(found.classes).encode())
    return ImageSet(name, part.split, pictures, labels, found.classes, part.path, whole.hexdigest())


def _image_set(name: str, split: str, arrays: Arrays, path: Path | None) -> ImageSet:
    images, labels, classes = arrays
    digest = hashlib.sha256()
    for array in (images, labels):
        digest.update(f"{array.dtype.name}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    digest.update("\0".join(classes).encode())
    return ImageSet(name, split, images, labels, classes, path, digest.hexdigest())
