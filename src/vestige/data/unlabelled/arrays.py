"""Images in arrays: in memory, in an .npy file that is mapped, in an .npz that is streamed."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vestige.core.types import InputSpec
from vestige.data._npz import Images
from vestige.data.unlabelled.decoding import BLOCK, Block, Skipped, digest_of, in_size
from vestige.errors import DataError

LAYOUT = (
    "images: uint8 (N, H, W) or (N, H, W, C) with 1 or 3 channels and values 0..255; in an .npz "
    "file under the key x"
)
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


class ArrayImages:
    """Rows of an array; what is mapped is read block by block.

    Args:
        images: (N, H, W) or (N, H, W, C) uint8, N > 0.
        name: what is shown to the user.
        path: of the .npy file that is mapped, or None.

    Raises:
        DataError: the array is none of images.
    """

    left_out = Skipped()

    def __init__(self, images: NDArray[Any], name: str, path: Path | None = None) -> None:
        check_array(images.dtype, images.shape, name)
        self.name = name
        self.paths: tuple[Path, ...] = () if path is None else (path,)
        self.images: Images = images
        self.fingerprint = digest_of(
            (images[start : start + BLOCK] for start in range(0, len(images), BLOCK)), images.shape
        )

    def __len__(self) -> int:
        return len(self.images)

    def fits(self, spec: InputSpec) -> bool:
        """Whether the array itself holds the bytes that decoding would give."""
        channels, height, width = spec.shape
        shape = self.images.shape
        shape = (*shape, 1) if len(shape) == 3 else shape
        return bool(self.images.flags.c_contiguous) and shape[1:] == (height, width, channels)

    def blocks(self, spec: InputSpec, rows: NDArray[np.int64]) -> Iterator[Block]:
        """See `decoding.Unlabelled`."""
        for start in range(0, len(rows), BLOCK):
            yield in_size(self.images[rows[start : start + BLOCK]], spec)


class ZippedImages:
    """`x` of an .npz file, unpacked as it is read; nothing else in the file is looked at.

    Args:
        path: of the file.
        name: what is shown to the user.
        rows: numbers of the rows that count, ascending; None takes all.

    Raises:
        DataError: the file is damaged, or `x` is missing or none of images.
    """

    left_out = Skipped()

    def __init__(self, path: Path, name: str, rows: NDArray[np.int64] | None = None) -> None:
        self.name = name
        self.paths: tuple[Path, ...] = (path,)
        self.shape, self._unordered = _header(path, name)
        self._rows = np.arange(self.shape[0]) if rows is None else rows
        shape = (len(self._rows), *self.shape[1:])
        self.fingerprint = digest_of(self.native(np.arange(len(self._rows))), shape)

    def __len__(self) -> int:
        return len(self._rows)

    def blocks(self, spec: InputSpec, rows: NDArray[np.int64]) -> Iterator[Block]:
        """See `decoding.Unlabelled`."""
        for images in self.native(rows):
            yield in_size(images, spec)

    def native(self, rows: NDArray[np.int64]) -> Iterator[Images]:
        """The images with the numbers `rows`, ascending, in their own size, in blocks.

        Raises:
            DataError: the file is damaged.
        """
        wanted = self._rows[rows]
        try:
            for start, block in self._stored():
                low, high = np.searchsorted(wanted, (start, start + len(block)))
                if low < high:
                    yield block[wanted[low:high] - start]
        except _UNREADABLE as error:
            if isinstance(error, DataError):
                raise
            raise _damaged(self.paths[0], error) from error

    def _stored(self) -> Iterator[tuple[int, Images]]:
        count, size = self.shape[0], int(np.prod(self.shape[1:]))
        if self._unordered:
            # Columns first: no block of rows lies together, so it is read whole.
            with np.load(self.paths[0], allow_pickle=False) as stored:
                yield 0, stored["x"]
            return
        with zipfile.ZipFile(self.paths[0]) as archive, archive.open("x.npy") as stream:
            _read_header(stream)
            for start in range(0, count, BLOCK):
                rows = min(BLOCK, count - start)
                data = stream.read(rows * size)
                if len(data) < rows * size:
                    raise EOFError("the array ends too early")
                block = np.frombuffer(data, dtype=np.uint8)
                yield start, block.reshape((rows, *self.shape[1:]))


def open_npy(path: Path, name: str) -> ArrayImages:
    """The images of an .npy file, mapped.

    Raises:
        DataError: it is damaged or holds no images.
    """
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    if not isinstance(mapped, np.ndarray):
        mapped.close()
        raise DataError(f"got {path}, which is an .npz file; call it so")
    return ArrayImages(mapped, name, path)


def stored_rows(path: Path, name: str) -> int:
    """How many images an .npz file holds, from its header alone.

    Raises:
        DataError: it is damaged or holds none.
    """
    return _header(path, name)[0][0]


def check_array(dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> None:
    """Raise DataError unless an array of this form holds images."""
    got = f"got {dtype} values of shape {shape} in {name}, expected {LAYOUT}"
    if dtype != np.uint8:
        hint = "multiply values in [0, 1] by 255 first, " if dtype.kind == "f" else ""
        raise DataError(f"{got}; {hint}convert them with astype('uint8') and store them again")
    if len(shape) not in (3, 4) or 0 in shape[1:]:
        raise DataError(f"{got}; store one image per row")
    if len(shape) == 4 and shape[3] not in (1, 3):
        first = "put the channels last (transpose(0, 2, 3, 1))" if shape[1] in (1, 3) else ""
        raise DataError(f"{got}; {first or 'keep 1 or 3 channels'} and store them again")
    if not shape[0]:
        raise DataError(f"got no images in {name}, expected at least one; add some")


def _header(path: Path, name: str) -> tuple[tuple[int, ...], bool]:
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [one.removesuffix(".npy") for one in archive.namelist()]
            if "x" not in keys:
                raise DataError(
                    f"got {path} with the keys {sorted(keys)}, expected {LAYOUT}; write it with "
                    "numpy.savez(path, x=images)"
                )
            with archive.open("x.npy") as stream:
                shape, unordered, dtype = _read_header(stream)
    except _UNREADABLE as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(path, error) from error
    check_array(dtype, shape, name)
    return shape, unordered


def _read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    first = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, unordered, dtype = read(stream)
    return tuple(int(size) for size in shape), bool(unordered), dtype


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"got {path}, which cannot be read ({error}), expected {LAYOUT}; the file is damaged, "
        "write it again"
    )
