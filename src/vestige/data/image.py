"""Sets of labelled images on disk, and how they become inputs of a network."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vestige.core.types import InputSpec
from vestige.errors import DataError, ShapeError

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Arrays = tuple[Images, Labels, tuple[str, ...]]

SPLITS = ("train", "select", "test")
BUILT_IN = "digits"
COMMON_SETS = ("cifar10", "fashion_mnist", "mnist", "web32")
LAYOUT = (
    "an .npz file with x: uint8 (N, H, W) or (N, H, W, 3), y: int64 (N,) class numbers from 0, "
    "classes: the names as a string array"
)
DIGITS_TEST_PER_CLASS = 50
DIGITS_SEED = 0


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a set of labelled images.

    Attributes:
        name: name of the set.
        split: "train", "select" or "test".
        images: (N, H, W) or (N, H, W, C), uint8.
        labels: (N,), int64, in [0, len(classes)).
        classes: names of the classes.
        path: the file it was read from; None for the built-in set.
        fingerprint: sha256 in hex of shapes, dtypes and bytes of images, labels and class names.
    """

    name: str
    split: str
    images: Images
    labels: Labels
    classes: tuple[str, ...]
    path: Path | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """Number of colour channels; 1 for images without a channel dimension."""
        return 1 if self.images.ndim == 3 else int(self.images.shape[3])

    @classmethod
    def open(cls, name: str, split: str) -> "ImageSet":
        """The same as `load_images`."""
        return load_images(name, split)

    def inputs(self, spec: InputSpec) -> Tensor:
        """All images as inputs (N, C, H, W) of `spec`, see `to_inputs`."""
        return to_inputs(self.images, spec)

    def examples(self, spec: InputSpec) -> tuple[Tensor, Tensor]:
        """Inputs (N, C, H, W) and labels (N,)."""
        return self.inputs(spec), torch.from_numpy(self.labels)


def data_folder() -> Path:
    """Where data sets lie: $VESTIGE_DATA, else vestige/data in the user's cache folder."""
    chosen = os.environ.get("VESTIGE_DATA")
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vestige" / "data"


def load_images(name_or_path: str, split: str) -> ImageSet:
    """Read one split of a set of images.

    "digits" is built in: the 1,797 handwritten 8x8 digits that scikit-learn ships, with values
    0..16 scaled to 0..255 and rounded. They are put into the order
    numpy.random.RandomState(0).permutation(1797); the first 50 of each class are the test split
    (500), and of the other 1,297 the last 10 % are select (129) and the rest is train (1,168).

    Any other name is a folder in `data_folder()`, and anything with a path separator is a folder
    itself; both hold train.npz, test.npz and, if there is one, select.npz or val.npz. Without such
    a file the last 10 % of train in stored order are "select", and "train" is the rest.

    Args:
        name_or_path: "digits", a name in the data folder, or a path to a folder.
        split: "train", "select" or "test"; the three never overlap.

    Raises:
        DataError: the split is unknown, or its file is missing, damaged or in another layout.
    """
    if split not in SPLITS:
        raise DataError(
            f"got split '{split}', expected one of {', '.join(SPLITS)}; use one of these"
        )
    if name_or_path == BUILT_IN:
        images, labels, classes = _digits(split)
        return _image_set(BUILT_IN, split, (images, labels, classes), None)
    folder = _folder(name_or_path)
    path, part = _locate(folder, split)
    if not path.is_file():
        raise _missing(name_or_path, folder, path, split)
    images, labels, classes = _read(path)
    rows = _part(len(images), part)
    if rows.start == rows.stop:
        raise DataError(
            f"got {len(images)} images in {path}, expected enough for a '{split}' split; add images"
        )
    return _image_set(folder.name, split, (images[rows], labels[rows], classes), path)


def to_inputs(images: Images, spec: InputSpec, *, batch_size: int = 1024) -> Tensor:
    """Turn stored images into inputs of a network.

    Values are divided by 255; where the size differs from the spec's, images are resized bilinearly
    (align_corners off, antialiased when one side shrinks); grey images are repeated over the spec's
    channels; then the spec's normalisation is applied.

    Args:
        images: (N, H, W) or (N, H, W, C), uint8.
        spec: an image spec (C, H, W).
        batch_size: images that are converted at a time; bounds the memory, changes no value.

    Returns:
        (N, C, H, W), float32, on the CPU, in the normalised space of `spec`.

    Raises:
        DataError: the array is no uint8 image array, or its channels do not fit the spec.
        ShapeError: the spec does not describe images.
    """
    if spec.kind != "image" or len(spec.shape) != 3:
        raise ShapeError(
            f"got an input spec of kind '{spec.kind}' and shape {spec.shape}, expected images "
            "(C, H, W); make it with InputSpec.image"
        )
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"got images of dtype {images.dtype} and shape {images.shape}, expected uint8 "
            "(N, H, W) or (N, H, W, C); scale values to 0..255 and put channels last"
        )
    found, (channels, height, width) = 1 if images.ndim == 3 else images.shape[3], spec.shape
    if found not in (1, channels):
        raise DataError(
            f"got images with {found} channels, expected {channels} as in the input spec; "
            f"convert the images or use a spec of {found} channels"
        )
    inputs = torch.empty(len(images), channels, height, width)
    for start in range(0, len(images), batch_size):
        rows = torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size]))
        rows = rows.unsqueeze(1) if images.ndim == 3 else rows.permute(0, 3, 1, 2)
        part = rows.float() / 255
        if part.shape[2:] != (height, width):
            shrinks = part.shape[2] > height or part.shape[3] > width
            part = functional.interpolate(
                part, (height, width), mode="bilinear", align_corners=False, antialias=shrinks
            )
        inputs[start : start + batch_size] = spec.normalize(part.expand(-1, channels, -1, -1))
    return inputs


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


def list_images() -> list[tuple[str, str, Mapping[str, int | Literal["missing", "damaged"]]]]:
    """What `load_images` can find: name, where, and per split its size, "missing" or "damaged".

    Lists the built-in set, every folder in `data_folder()` with an .npz split, and the sets that
    shipped recipes ask for even where they are missing. Reads headers only.
    """
    built_in = {split: len(_digits(split)[0]) for split in SPLITS}
    found: list[tuple[str, str, Mapping[str, int | Literal["missing", "damaged"]]]] = [
        (BUILT_IN, "built in (scikit-learn)", built_in)
    ]
    root = data_folder()
    names = set(COMMON_SETS)
    if root.is_dir():
        names |= {
            folder.name
            for folder in root.iterdir()
            if any((folder / f"{stem}.npz").is_file() for stem in (*SPLITS, "val"))
        }
    for name in sorted(names - {BUILT_IN}):
        found.append(
            (name, str(root / name), {split: _size(root / name, split) for split in SPLITS})
        )
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
        rows = rows[_part(len(rows), split)]
    return images[rows], labels[rows], tuple(str(digit) for digit in range(10))


def _part(count: int, part: str) -> slice:
    """Rows of a stored split: "all", or the share of train that is "train" or "select"."""
    cut = count if part == "all" else count - count // 10
    return slice(cut, count) if part == "select" else slice(0, cut)


def _folder(name_or_path: str) -> Path:
    path = Path(name_or_path).expanduser()
    if len(path.parts) != 1 or path.is_absolute() or name_or_path in (".", ".."):
        return path.resolve()
    named = data_folder() / name_or_path
    return path.resolve() if path.is_dir() and not named.is_dir() else named


def _locate(folder: Path, split: str) -> tuple[Path, str]:
    """The file that holds `split`, and which part of it: "all", "train" or "select"."""
    if split == "test":
        return folder / "test.npz", "all"
    for stem in ("select", "val"):
        if (folder / f"{stem}.npz").is_file():
            return folder / f"{stem if split == 'select' else 'train'}.npz", "all"
    return folder / "train.npz", split


def _missing(asked: str, folder: Path, path: Path, split: str) -> DataError:
    where = "" if asked != folder.name else ", or point $VESTIGE_DATA to the folder that holds it"
    return DataError(
        f"got no file {path} for split '{split}' of data set '{asked}'; expected {LAYOUT}. "
        f"Put train.npz and test.npz into {folder}{where}. From arrays of your own: "
        "numpy.savez('train.npz', x=images, y=labels, classes=names); folders of pictures must be "
        f"packed like that first. '{BUILT_IN}' is always there"
    )


def _read(path: Path) -> Arrays:
    try:
        found = _members(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"got {path}, which cannot be read ({error}), expected {LAYOUT}; the file is damaged "
            "or holds Python objects, write it again"
        ) from error
    missing = [key for key in ("x", "y", "classes") if key not in found]
    if missing:
        raise DataError(
            f"got {path} with the keys {sorted(found)}, expected {LAYOUT}; add {', '.join(missing)}"
        )
    _check(path, found)
    return found["x"], found["y"], tuple(str(name) for name in found["classes"])


def _members(path: Path) -> dict[str, NDArray[Any]]:
    stored = np.load(path, allow_pickle=False)
    if isinstance(stored, np.ndarray):
        return {}
    with stored:
        return {key: stored[key] for key in stored.files}


def _check(path: Path, found: Mapping[str, NDArray[Any]]) -> None:
    images, labels, classes = found["x"], found["y"], found["classes"]
    wrong = ""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        wrong = f"x of dtype {images.dtype} and shape {images.shape}"
    elif images.ndim == 4 and images.shape[3] not in (1, 3):
        wrong = f"x of shape {images.shape}, so {images.shape[3]} channels"
    elif labels.dtype != np.int64 or labels.shape != images.shape[:1]:
        wrong = f"y of dtype {labels.dtype} and shape {labels.shape} for {len(images)} images"
    elif classes.ndim != 1 or classes.dtype.kind != "U":
        wrong = f"classes of dtype {classes.dtype} and shape {classes.shape}"
    elif len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        wrong = f"y from {labels.min()} to {labels.max()} for {len(classes)} class names"
    if wrong:
        raise DataError(f"got {wrong} in {path}, expected {LAYOUT}; write the file again")


def _image_set(name: str, split: str, arrays: Arrays, path: Path | None) -> ImageSet:
    images, labels, classes = arrays
    digest = hashlib.sha256()
    for array in (images, labels):
        digest.update(f"{array.dtype.name}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    digest.update("\0".join(classes).encode())
    return ImageSet(name, split, images, labels, classes, path, digest.hexdigest())


def _size(folder: Path, split: str) -> int | Literal["missing", "damaged"]:
    path, part = _locate(folder, split)
    if not path.is_file():
        return "missing"
    try:
        with zipfile.ZipFile(path) as archive, archive.open("x.npy") as header:
            version = np.lib.format.read_magic(header)
            read = np.lib.format.read_array_header_1_0
            shape = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(header)[0]
            rows = _part(shape[0], part)
            return int(rows.stop - rows.start)
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile, zlib.error):
        return "damaged"
