"""How an image of any size becomes bytes of a teacher's size, and a number that stands for it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vestige.core.types import InputSpec
from vestige.data._npz import Images
from vestige.data._pictures import Pictures
from vestige.data.image import to_inputs
from vestige.errors import DataError, ShapeError

# Raised whenever the same file would be decoded to other bytes: what was kept is then made again.
VERSION = 1
BLOCK = 256
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Block:
    """Images that were decoded together.

    Attributes:
        images: (n, H, W, C) uint8 in the size of a spec.
        skipped: what could not be decoded, each as "name: why".
        repeated: how many had one channel, which was repeated.
        greyed: how many had colours, which were turned to grey.
    """

    images: Images
    skipped: tuple[str, ...] = ()
    repeated: int = 0
    greyed: int = 0


@dataclass(frozen=True)
class Skipped:
    """What was left out of a set, with reasons; of many only the first have names."""

    count: int = 0
    first: tuple[str, ...] = field(default=())

    def plus(self, more: Sequence[str]) -> "Skipped":
        """With `more` left out as well."""
        return Skipped(self.count + len(more), (*self.first, *more)[:5])


class Unlabelled(Protocol):
    """Images without labels that were found and not yet decoded.

    Attributes:
        name: what is shown to the user.
        paths: the files or folders that they lie in.
        fingerprint: sha256 in hex of the images' contents, whatever their files are called.
        left_out: what was seen to be no image before anything was decoded.
    """

    name: str
    paths: tuple[Path, ...]
    fingerprint: str
    left_out: Skipped

    def __len__(self) -> int:
        """How many there are at most: what cannot be decoded is still counted."""
        ...

    def blocks(self, spec: InputSpec, rows: NDArray[np.int64]) -> Iterator[Block]:
        """The images with the numbers `rows`, ascending, in the size of `spec`."""
        ...


def check_spec(spec: InputSpec) -> None:
    """Raise ShapeError unless `spec` describes images."""
    if spec.kind != "image" or len(spec.shape) != 3:
        raise ShapeError(
            f"got an input spec of kind '{spec.kind}' and shape {spec.shape}, expected images "
            "(C, H, W); make it with InputSpec.image"
        )


def in_size(images: Images, spec: InputSpec) -> Block:
    """Images of one size and form in the size of `spec`.

    They are resized as `data.image.to_inputs` does and rounded to whole grey levels. One channel is
    repeated over the spec's; three become grey for a spec of one, by Rec. 601 as in pictures.

    Args:
        images: (n, h, w) or (n, h, w, c), uint8.
        spec: of images (C, H, W).

    Raises:
        DataError: the channels cannot be made the spec's.
    """
    channels, height, width = spec.shape
    rows = images[..., None] if images.ndim == 3 else images
    found = rows.shape[3]
    if found not in (1, channels) and (found, channels) != (3, 1):
        raise DataError(
            f"got images with {found} channels, expected {channels} as the teacher takes, or 1; "
            "drop opacity, or convert them to RGB or grey first"
        )
    greyed = found == 3 and channels == 1
    if greyed:
        rows = _grey(rows)
    if rows.shape[1:3] != (height, width):
        plain = InputSpec(spec.kind, (rows.shape[3], height, width))
        resized = to_inputs(np.ascontiguousarray(rows), plain).mul(255).round().byte()
        rows = resized.permute(0, 2, 3, 1).numpy()
    repeated = rows.shape[3] != channels
    if repeated:
        rows = rows.repeat(channels, axis=3)
    return Block(
        np.ascontiguousarray(rows),
        repeated=len(rows) if repeated else 0,
        greyed=len(rows) if greyed else 0,
    )


def as_bytes(images: Images | Pictures, spec: InputSpec) -> Iterator[Images]:
    """Blocks (n, H, W, C) of labelled images as unlabelled ones of the same files are decoded.

    Raises:
        DataError: a picture cannot be decoded, or the channels do not fit.
    """
    if isinstance(images, Pictures):
        for one in images.read(grey=spec.shape[0] == 1):
            yield in_size(one, spec).images
        return
    for start in range(0, len(images), BLOCK):
        yield in_size(images[start : start + BLOCK], spec).images


def row_hashes(images: Images) -> Hashes:
    """A number for each image (n, ...), the same for the same bytes; (n,) uint64."""
    rows = np.ascontiguousarray(images).reshape(len(images), int(np.prod(images.shape[1:])))
    digests = b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def digest_of(blocks: Iterator[Images], shape: Sequence[int]) -> str:
    """sha256 in hex of a shape and of the bytes of all blocks, one after another."""
    digest = hashlib.sha256(f"uint8{tuple(shape)}".encode())
    for block in blocks:
        digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()


def _grey(images: Images) -> Images:
    # Pillow's own whole-number weights, so that a picture and its array give the same bytes.
    weighted = images.astype(np.uint32) @ np.array([19595, 38470, 7471], dtype=np.uint32)
    grey: NDArray[Any] = (weighted + 0x8000) >> 16
    return grey.astype(np.uint8)[..., None]
