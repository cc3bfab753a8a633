"""Labelled images in an .npz file."""

import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vestige.errors import DataError

Images = NDArray[np.uint8]
# One class for each image, or one for each of its pixels.
Labels = NDArray[np.integer[Any]]
Arrays = tuple[Images, Labels, tuple[str, ...]]

LAYOUT = (
    "an .npz file with x: uint8 (N, H, W) or (N, H, W, 3), values 0..255, y: integers (N,), class "
    "numbers from 0 (or (N, H, W), a class for each pixel), and perhaps classes: the names as a "
    "string array"
)


def read_npz(path: Path) -> Arrays:
    """Images, labels or masks, and class names; () where the file names no classes.

    Labels are int64; masks are uint8 where their values fit, else int64. Which values a mask may
    hold is for the task to say: it knows which one marks pixels that are ignored.

    Raises:
        DataError: it is damaged or in another layout.
    """
    try:
        found = _members(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"got {path}, which cannot be read ({error}), expected {LAYOUT}; the file is damaged "
            "or holds Python objects, write it again"
        ) from error
    missing = [key for key in ("x", "y") if key not in found]
    if missing:
        raise DataError(
            f"got {path} with the keys {sorted(found)}, expected {LAYOUT}; add {', '.join(missing)}"
        )
    wrong = _wrong(found["x"], found["y"], found.get("classes"))
    if wrong:
        raise DataError(f"got {wrong} in {path}, expected {LAYOUT}; write the file again")
    names = tuple(str(name) for name in found.get("classes", ()))
    return found["x"], _stored(found["y"]), names


def count_npz(path: Path) -> int | Literal["damaged"]:
    """Number of images, from the header alone."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("x.npy") as header:
            version = np.lib.format.read_magic(header)
            read = np.lib.format.read_array_header_1_0
            shape = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(header)[0]
            return int(shape[0])
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile, zlib.error):
        return "damaged"


def read_names(path: Path) -> tuple[str, ...]:
    """The class names alone; () without any, and where the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return tuple(map(str, stored["classes"])) if "classes" in stored.files else ()
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ):
        return ()


def _members(path: Path) -> dict[str, NDArray[Any]]:
    stored = np.load(path, allow_pickle=False)
    if isinstance(stored, np.ndarray):
        return {}
    with stored:
        return {key: stored[key] for key in stored.files}


def _stored(labels: NDArray[Any]) -> Labels:
    small = labels.ndim == 3 and labels.size and labels.min() >= 0 and labels.max() <= 255
    return labels.astype(np.uint8 if small else np.int64)


def _wrong(images: NDArray[Any], labels: NDArray[Any], classes: NDArray[Any] | None) -> str:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        return f"x of dtype {images.dtype} and shape {images.shape}"
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        hint = ", whose channels come first" if images.shape[1] in (1, 3) else ""
        return f"x of shape {images.shape}, so {images.shape[3]} channels{hint}"
    if labels.dtype.kind not in "iu" or labels.shape not in (images.shape[:1], images.shape[:3]):
        if labels.ndim == 3:
            return (
                f"y of dtype {labels.dtype} and shape {labels.shape} for {len(images)} images of "
                f"{images.shape[1]}x{images.shape[2]} pixels"
            )
        return f"y of dtype {labels.dtype} and shape {labels.shape} for {len(images)} images"
    if classes is not None and (classes.ndim != 1 or classes.dtype.kind != "U"):
        return f"classes of dtype {classes.dtype} and shape {classes.shape}"
    if labels.ndim == 3:
        return ""
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    if classes is not None and not 0 <= low <= high + 1 <= len(classes):
        return f"y from {low} to {high} for {len(classes)} class names"
    return f"y from {low} to {high}" if low < 0 else ""
