"""What a name or a path stands for when only its images count; labels are never read."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vestige.data._built_in import BUILT_INS
from vestige.data._layout import SPLITS, Part, check_split, data_folder, place_of
from vestige.data._masks import holds_masks
from vestige.data._npz import Images
from vestige.data._pictures import SUFFIXES, Pictures
from vestige.data.image import ImageSet, load_images
from vestige.data.unlabelled.arrays import ArrayImages, ZippedImages, open_npy, stored_rows
from vestige.data.unlabelled.arrow import ArrowImages, is_saved_dataset
from vestige.data.unlabelled.decoding import Unlabelled
from vestige.data.unlabelled.files import chosen_pictures, find_pictures
from vestige.errors import DataError

_STEMS = {"train": ("train",), "select": ("select", "val"), "test": ("test",), "all": ("all",)}
Kind = Literal["labelled", "npz", "npy", "pictures", "arrow"]


@dataclass(frozen=True)
class Found:
    """What holds the images that were asked for.

    Attributes:
        kind: how to read it; "labelled" goes by `data.image.load_images`, which built-in sets and
            choices of classes need.
        name: what is shown to the user.
        part: path and, of a set without such a split of its own, which share of it.
    """

    kind: Kind
    name: str
    part: Part


def find_unlabelled(name_or_path: str, split: str | None = None) -> Found:
    """Look for what `open_unlabelled` would read, without reading it.

    Raises:
        DataError: it is not there, or has no such split.
    """
    if split is not None:
        check_split(split)
    if name_or_path in BUILT_INS or _names_classes(name_or_path):
        ImageSet.find(name_or_path, split or "train")
        return Found("labelled", name_or_path, Part(Path(), "whole", split or "train"))
    try:
        return _found(name_or_path, split)
    except OSError as error:
        raise DataError(
            f"got '{name_or_path}', which cannot be looked into ({error}), expected a folder of "
            "pictures or a file; correct the name or its permissions"
        ) from error


def open_unlabelled(
    name_or_path: str, *, split: str | None = None, column: str | None = None
) -> Unlabelled:
    """Images to learn from, whatever their size and kind; nothing is decoded yet.

    That may be a folder of pictures at any depth; an .npz file with `x`, or an .npy file, uint8
    (N, H, W) or (N, H, W, C); a set of the data folder by its name; or a folder that
    `datasets.Dataset.save_to_disk` wrote. Labels are not read wherever they lie, so they may be
    missing or damaged. Only a choice of classes, `NAME[class,class]`, reads them to choose by them.

    Args:
        name_or_path: see above.
        split: "train", "select" or "test" of what is stored in splits, or its share of 80, 10 and
            10 % by content of a folder that is not; "all" of the latter. None is "train" of what
            has splits and "all" of what has none.
        column: of a saved data set, the one with the pictures.

    Raises:
        DataError: there is nothing of the kind, or it is damaged.
        MissingExtraError: reading it takes a package that is not installed.
    """
    found = find_unlabelled(name_or_path, split)
    if column is not None and found.kind != "arrow":
        raise DataError(
            f"got column '{column}' for '{name_or_path}', expected one for a folder of "
            "datasets.save_to_disk only; leave it out"
        )
    part, name = found.part, found.name
    if found.kind == "labelled":
        return _labelled(name_or_path, part.split)
    if found.kind == "arrow":
        return ArrowImages(part.path, name, split=split, column=column)
    if found.kind == "npy":
        return open_npy(part.path, name)
    if found.kind == "npz":
        return _zipped(part, name)
    # A mask is no picture to learn from.
    folder = part.path / "images" if holds_masks(part.path) else part.path
    if part.rule == "content":
        return find_pictures(folder, name, keep=part.has)
    return find_pictures(folder, name, rows=part.rows)


def _found(asked: str, split: str | None) -> Found:
    path = Path(os.path.expanduser(asked)) if "\0" not in asked else Path("\ufffd")
    if path.suffix in (".npz", ".npy") and not path.is_dir():
        if not path.is_file():
            raise DataError(f"got no file {path}, expected images there; correct the path")
        if split not in (None, "all"):
            raise DataError(
                f"got split '{split}' of {path}, which is one file; leave the split out, or name "
                "the folder that holds the splits"
            )
        kind: Kind = "npz" if path.suffix == ".npz" else "npy"
        return Found(kind, path.stem, Part(path.resolve(), "whole", "all"))
    place = place_of(asked)
    if not place.is_dir():
        raise _missing(asked, place)
    if is_saved_dataset(place):
        return Found("arrow", _with_split(place, split), Part(place, "whole", split or "all"))
    stored = _stored(place)
    if stored.keys() & set(SPLITS):
        return _of_divided(place, stored, split or "train")
    whole = stored.get("all", place)
    rule: Literal["whole", "content"] = "whole" if split in (None, "all") else "content"
    kind = "npz" if whole.suffix == ".npz" else "pictures"
    return Found(kind, _with_split(place, split), Part(whole, rule, split or "all"))


def _of_divided(place: Path, stored: dict[str, Path], split: str) -> Found:
    if split in stored and (split != "train" or "select" in stored):
        part = Part(stored[split], "whole", split)
    elif split in ("train", "select") and "train" in stored:
        part = Part(stored["train"], "tenth", split)
    else:
        raise DataError(
            f"got split '{split}' of {place}, which is divided into {', '.join(sorted(stored))}; "
            "name one of these, or the folder of one to take it whole"
        )
    kind: Kind = "npz" if part.path.suffix == ".npz" else "pictures"
    return Found(kind, _with_split(place, split), part)


def _stored(place: Path) -> dict[str, Path]:
    """What holds each split that `place` has of its own; "all" where it is in one piece."""
    found: dict[str, Path] = {}
    for split, stems in _STEMS.items():
        for stem in stems:
            file = place / f"{stem}.npz"
            if file.is_file():
                found.setdefault(split, file)
            elif (place / stem).is_dir() and any(_pictures(place / stem)):
                found.setdefault(split, place / stem)
    return found


def _pictures(folder: Path) -> Iterator[str]:
    for _, _, files in os.walk(folder):
        yield from (name for name in files if Path(name).suffix.lower() in SUFFIXES)


def _zipped(part: Part, name: str) -> Unlabelled:
    if part.rule == "content":
        whole = ZippedImages(part.path, name)
        count = len(whole)
        digests = (_digest(row) for block in whole.native(np.arange(count)) for row in block)
        rows = np.flatnonzero(np.fromiter((part.has(one) for one in digests), bool, count))
    elif part.rule == "tenth":
        count = stored_rows(part.path, name)
        rows = np.arange(count)[part.rows(count)]
    else:
        return ZippedImages(part.path, name)
    if not len(rows):
        raise DataError(
            f"got no images for the '{part.split}' split in {part.path}, expected enough for one; "
            "add images, or leave the split out"
        )
    return ZippedImages(part.path, name, rows)


def _digest(image: Images) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def _labelled(name: str, split: str) -> Unlabelled:
    images = load_images(name, split).images
    if isinstance(images, Pictures):
        return chosen_pictures(images.paths, f"{name}/{split}")
    return ArrayImages(images, f"{name}/{split}")


def _with_split(place: Path, split: str | None) -> str:
    return place.name if split is None else f"{place.name}/{split}"


def _names_classes(asked: str) -> bool:
    """Whether `asked` is NAME[class,class], and not a path that is spelled so."""
    plain = os.path.expanduser(asked)
    return asked.endswith("]") and "[" in asked and "\0" not in asked and not os.path.exists(plain)


def _missing(asked: str, place: Path) -> DataError:
    return DataError(
        f"got no folder {place} for '{asked}', expected a folder of pictures at any depth, an .npz "
        "or .npy file of uint8 images, a folder of datasets.save_to_disk, or the name of a set in "
        f"{data_folder()}; correct the path, or put it there"
    )
