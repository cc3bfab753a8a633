"""A heap of images put together from several parts, each row of which remembers its part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vestige.core.types import InputSpec
from vestige.data.unlabelled.decoding import VERSION, Hashes, Unlabelled
from vestige.data.unlabelled.made_up import stream
from vestige.data.unlabelled.shifts import shifted
from vestige.recipes.image_cache import Kept, RowsFile, entry, keep, save_array

_BLOCK = 512
_HASHES, _IMAGES, _PARTS = "hashes.npy", "images.npy", "parts.npy"


@dataclass(frozen=True)
class Part:
    """One part of a heap.

    Attributes:
        name: in the heap.
        raw: its images.
        count: how many of them; None takes all.
        shift: distortions, one after another, see `data.unlabelled.shifts`.
    """

    name: str
    raw: Unlabelled
    count: int | None = None
    shift: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeapFiles:
    """A heap as it is drawn from.

    Attributes:
        images: .npy file of uint8 (N, H, W, C), shuffled.
        parts: (N,), the position of each row's part.
        hashes: (N,), of each row's contents before it was distorted.
        cards: of each part by its name, what is known of it.
    """

    images: Path
    parts: NDArray[np.uint8]
    hashes: Hashes
    cards: Mapping[str, Mapping[str, Any]]


def keep_heap(parts: Sequence[Part], spec: InputSpec, seed: int) -> HeapFiles:
    """Decode, distort, shuffle and keep a heap.

    Args:
        parts: at least one and at most 255.
        spec: of the teacher.
        seed: of what is chosen, of the distortions and of the order.

    Raises:
        DataError: a part has no images, or fewer than are asked for.
        StorageError: the heap cannot be written.
    """
    kept = [keep(part.raw, spec, count=part.count, seed=seed) for part in parts]
    told = {
        "version": VERSION,
        "heap": [
            {"name": part.name, "key": one.card["key"], "shift": list(part.shift)}
            for part, one in zip(parts, kept, strict=True)
        ],
        "seed": seed,
    }
    name = ", ".join(part.name for part in parts)
    folder, _ = entry(told, name, lambda made: _write(made, parts, kept, spec, seed))
    return HeapFiles(
        folder / _IMAGES,
        np.load(folder / _PARTS),
        np.load(folder / _HASHES),
        {part.name: one.card for part, one in zip(parts, kept, strict=True)},
    )


def _write(
    folder: Path, parts: Sequence[Part], kept: Sequence[Kept], spec: InputSpec, seed: int
) -> dict[str, Any]:
    channels, height, width = spec.shape
    counts = [len(one.hashes) for one in kept]
    total = sum(counts)
    places = stream(seed, "order of the heap").permutation(total)
    index, hashes = np.empty(total, dtype=np.uint8), np.empty(total, dtype=np.uint64)
    # Rows are written where the shuffle puts them, block by block, so that memory stays small.
    _room(folder / _IMAGES, total, (height, width, channels))
    images = np.load(folder / _IMAGES, mmap_mode="r+")
    start = 0
    for number, (part, one) in enumerate(zip(parts, kept, strict=True)):
        own = places[start : start + counts[number]]
        start += counts[number]
        index[own], hashes[own] = number, one.hashes
        stored = np.load(one.images, mmap_mode="r")
        for low in range(0, len(own), _BLOCK):
            block = np.array(stored[low : low + _BLOCK]).reshape(-1, height, width, channels)
            if part.shift:
                block = shifted(block, part.shift, stream(seed, f"{part.name}/{low}"))
            images[own[low : low + _BLOCK]] = block
    images.flush()
    save_array(folder / _PARTS, index)
    save_array(folder / _HASHES, hashes)
    return {"rows": total}


def _room(path: Path, total: int, shape: tuple[int, ...]) -> None:
    """A file of zeros: of a full disk a mapping would learn by a signal that ends the process."""
    rows = RowsFile(path, shape)
    empty = np.zeros((_BLOCK, *shape), dtype=np.uint8)
    for start in range(0, total, _BLOCK):
        rows.append(empty[: min(_BLOCK, total - start)])
    rows.close()
