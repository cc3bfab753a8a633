"""A pool in a folder: images.npy, labels.npy and pool.json, open to any other program."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vestige.core.types import InputSpec
from vestige.errors import DataError
from vestige.sources._rows import FileRows, MemoryRows
from vestige.sources.pool import Pool

_SCHEMA = 1
_CHUNK = 4096


def save_pool(pool: Pool, folder: Path, card: Mapping[str, Any]) -> None:
    """Write a pool of uint8 images; pool.json last, as the mark that the rest is whole.

    Args:
        pool: with an input spec and at least one image.
        folder: made if it is missing; a pool that is there is replaced.
        card: what else is to be known, for example "teacher_fingerprint" and "classes"; JSON.

    Raises:
        DataError: the pool is empty or keeps no uint8 images.
    """
    if pool.spec is None or not len(pool):
        raise DataError(
            f"got a pool of {len(pool)} inputs {'without' if pool.spec is None else 'with'} an "
            "input spec, expected at least one uint8 image; make it as Pool(spec) and add to it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pool.json").unlink(missing_ok=True)
    images = np.lib.format.open_memmap(
        folder / "images.npy", "w+", np.uint8, (len(pool), *pool.spec.shape)
    )
    for start in range(0, len(pool), _CHUNK):
        stop = min(start + _CHUNK, len(pool))
        images[start:stop] = pool.between(start, stop).cpu().numpy()
    images.flush()
    labels = pool.labels
    (folder / "labels.npy").unlink(missing_ok=True)
    if labels is not None:
        np.save(folder / "labels.npy", labels.numpy())
    about = {
        "schema": _SCHEMA,
        "images": len(pool),
        "batches": pool.shard_count(),
        "input": {
            "kind": pool.spec.kind,
            "shape": list(pool.spec.shape),
            "mean": list(pool.spec.mean),
            "std": list(pool.spec.std),
        },
        "labels": None if labels is None else torch.bincount(labels).tolist(),
        **card,
    }
    (folder / "pool.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def read_card(folder: Path) -> dict[str, Any]:
    """pool.json of a pool.

    Raises:
        DataError: there is none, or it is not one of ours.
    """
    path = folder / "pool.json"
    if not path.is_file() and (folder / "pool" / "pool.json").is_file():
        path = folder / "pool" / "pool.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"got {folder}, expected a pool: a folder with pool.json, images.npy and labels.npy; "
            "a run of a method with a pool leaves one in RUN/pool"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"got a damaged {path} ({error}); save the pool again, or resume its run"
        ) from None
    if not isinstance(card, dict) or card.get("schema") != _SCHEMA:
        found = card.get("schema") if isinstance(card, dict) else type(card).__name__
        raise DataError(f"got {path} of schema {found!r}, expected {_SCHEMA}; save the pool again")
    return {**card, "folder": str(path.parent)}


def open_pool(folder: Path, spec: InputSpec | None = None) -> Pool:
    """A pool that was saved, read from its files as it is drawn from and never changed.

    Args:
        folder: of the pool, or of the run that left it.
        spec: of the teacher that is to see the images: drawn inputs are normalised for it. None
            takes what the pool was made for.

    Returns:
        A pool whose memory does not grow with its images; `add` is refused.

    Raises:
        DataError: files are missing, damaged, or of images with another shape than the teacher's.
    """
    card = read_card(folder)
    folder = Path(card["folder"])
    made_for = InputSpec(
        card["input"]["kind"],
        tuple(card["input"]["shape"]),
        tuple(card["input"]["mean"]),
        tuple(card["input"]["std"]),
    )
    spec = spec or made_for
    if spec.shape != made_for.shape:
        raise DataError(
            f"got a pool of images {made_for.shape} in {folder}, expected the teacher's "
            f"{spec.shape}; synthesise one for this teacher"
        )
    images = _array(folder / "images.npy", np.dtype(np.uint8), (card["images"], *spec.shape))
    labels = None
    if card["labels"] is not None:
        labels = torch.from_numpy(
            np.array(_array(folder / "labels.npy", np.dtype(np.int64), (card["images"],)))
        )
    return _OpenedPool(
        spec,
        folder,
        FileRows(
            folder / "images.npy",
            spec.shape,
            torch.uint8,
            offset=images.offset,
            count=len(images),
        ),
        labels,
        card,
    )


class _OpenedPool(Pool):
    def __init__(
        self,
        spec: InputSpec,
        folder: Path,
        images: FileRows,
        labels: Tensor | None,
        card: Mapping[str, Any],
    ) -> None:
        super().__init__(spec)
        self.paths = tuple(folder / name for name in ("images.npy", "labels.npy", "pool.json"))
        self.name = f"pool of {card.get('method', 'unknown')} in {folder.name}"
        self.card = dict(card)
        self._inputs = images
        self._ends = [images.count]
        self._losses = [None]
        if labels is not None:
            self._labels = MemoryRows(labels, torch.device("cpu"))
            self._labels.append(labels)


def _array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    try:
        found: np.memmap[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"got {path}, which cannot be read ({error}); save the pool again, or resume its run"
        ) from error
    if found.dtype != dtype or found.shape != shape:
        raise DataError(
            f"got {path} with {found.dtype} values of shape {found.shape}, expected {dtype} of "
            f"{shape} as pool.json says; save the pool again"
        )
    return found
