"""Unlabelled images of a recipe as sources: one set, or a heap of several."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vestige.core.protocols import Source
from vestige.core.rows import RowSource
from vestige.core.types import InputSpec
from vestige.data.unlabelled.arrays import ArrayImages
from vestige.data.unlabelled.decoding import Unlabelled, check_spec, row_hashes
from vestige.data.unlabelled.made_up import MADE_UP, MadeUpImages
from vestige.data.unlabelled.opening import open_unlabelled
from vestige.errors import DataError
from vestige.recipes.heap import Part, keep_heap
from vestige.recipes.image_cache import keep
from vestige.recipes.schema import PartConfig, SourceConfig
from vestige.sources.stored import StoredHeap, StoredImages
from vestige.training.diagnosis import Finding


@dataclass(frozen=True)
class Read:
    """Real images that were read: what they are called, how many, and what they are."""

    name: str
    images: int
    fingerprint: str


@dataclass(frozen=True)
class Opened:
    """A source with what was read for it.

    Attributes:
        source: draws the images.
        read: everything real.
        about: what else stands in the run record.
    """

    source: StoredImages
    read: tuple[Read, ...]
    about: Mapping[str, Any]


def open_folder(
    name: str, config: SourceConfig, spec: InputSpec, seed: int, device: torch.device
) -> Opened:
    """A source of kind "folder".

    Raises:
        DataError: there are no such images.
        StorageError: what was decoded cannot be written.
    """
    raw = open_unlabelled(str(config.data), split=config.split, column=config.column)
    return open_raw(raw, config, spec, seed, device)


def open_raw(
    raw: Unlabelled, config: SourceConfig, spec: InputSpec, seed: int, device: torch.device
) -> Opened:
    """A source of images that are opened already."""
    kept = keep(raw, spec, count=config.count, seed=seed)
    source = StoredImages(
        kept.images, spec, origin=config.origin, name=raw.name, device=device, hashes=kept.hashes
    )
    read = Read(raw.name, len(source), raw.fingerprint)
    return Opened(source, (read,), _about(raw, kept.card))


def open_given(
    name: str, given: str | Path | NDArray[Any], spec: InputSpec, seed: int, device: torch.device
) -> Opened:
    """What somebody hands in from Python: a path or name, or an array of images.

    An array in the teacher's size stays where it is; another one is resized into the cache.

    Raises:
        DataError: there are no such images, or the array is none of images.
    """
    if not isinstance(given, np.ndarray):
        config = SourceConfig(kind="folder", data=str(given))
        return open_folder(name, config, spec, seed, device)
    check_spec(spec)
    raw = ArrayImages(given, name)
    if not raw.fits(spec):
        return open_raw(raw, SourceConfig(kind="folder"), spec, seed, device)
    source = StoredImages(
        given, spec, origin="foreign", name=name, device=device, hashes=row_hashes(given)
    )
    return Opened(source, (Read(name, len(given), raw.fingerprint),), {"rows": len(given)})


def few_rows(sources: Mapping[str, Source], settings: object) -> list[Finding]:
    """A warning for each source with fewer rows than a batch, which then repeats some."""
    size = getattr(settings, "batch_size", None)
    return [
        Finding(
            "few-rows",
            "warning",
            f"source {name!r} has {len(source):,} rows and batch_size is {size:,}; rows are drawn "
            "with replacement, so a batch holds some of them several times",
            "hand in more images, or lower config.batch_size",
        )
        for name, source in sources.items()
        if isinstance(source, RowSource) and isinstance(size, int) and len(source) < size
    ]


def open_heap(
    name: str, config: SourceConfig, spec: InputSpec, seed: int, device: torch.device
) -> Opened:
    """A source of kind "heap".

    Raises:
        DataError: a part has no images, or fewer than are asked for.
        StorageError: what was decoded cannot be written.
    """
    if config.column is not None:
        raise DataError(
            f"got column {config.column!r} for the heap {name!r} of images, expected none: each "
            "part has its own; move it there"
        )
    parts = [
        Part(part_name, _raw(part_name, part, seed), part.count, part.shift)
        for part_name, part in config.parts.items()
    ]
    kept = keep_heap(parts, spec, seed)
    source = StoredHeap(
        kept.images,
        spec,
        origin=config.origin,
        name=name,
        parts={part_name: part.wanted for part_name, part in config.parts.items()},
        part_index=kept.parts,
        device=device,
        hashes=kept.hashes,
    )
    about = {
        part.name: {
            **_about(part.raw, kept.cards[part.name]),
            "shift": list(part.shift),
            "wanted": config.parts[part.name].wanted,
        }
        for part in parts
    }
    read = tuple(
        Read(f"{name}/{part.name}: {part.raw.name}", rows, part.raw.fingerprint)
        for part in parts
        if (rows := int(kept.cards[part.name]["rows"])) and not isinstance(part.raw, MadeUpImages)
    )
    return Opened(source, read, {"rows": len(source), "parts": about})


def _raw(name: str, part: PartConfig, seed: int) -> Unlabelled:
    if part.data in MADE_UP:
        return MadeUpImages(part.data, part.count or 0, seed)
    return open_unlabelled(part.data, split=part.split, column=part.column)


def _about(raw: Unlabelled, card: Mapping[str, Any]) -> dict[str, Any]:
    """What the run record says of a set besides that it was read."""
    return {
        "data": raw.name,
        "rows": card["rows"],
        "skipped": card["skipped"] + raw.left_out.count,
        "first_skipped": [*card["first_skipped"], *raw.left_out.first][:5],
        "repeated": card["repeated"],
        "greyed": card["greyed"],
        "cache": card["key"],
    }
