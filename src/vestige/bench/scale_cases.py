"""What scale benchmarks measure: components under many images, each in a process of its own."""

import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from vestige.core.types import InputSpec
from vestige.recipes.schema import SourceConfig
from vestige.recipes.unlabelled import open_folder
from vestige.sources.pool import Pool
from vestige.training import runtime
from vestige.training.checkpoint import CheckpointStore

BATCH = 250
SPEC = InputSpec.image(3, 32, 32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
_TEN_THOUSAND = 10_000
_MIB = 2**20
_RAW = (40, 40, 3)

Measured = dict[str, float]
# Gets a number of images, or of what else it counts, an empty folder and options of its own; runs
# in a process of its own.
ScaleCase = Callable[..., Measured]


def measure_pool(images: int, folder: Path) -> Measured:
    """A pool of uint8 images that holds 256 MiB of them in memory and the others in a file.

    So all sizes but the smallest have left memory, and what is held must not grow with them.

    Args:
        images: 3x32x32, added in batches of 250, each a shard.
        folder: gets the checkpoint.

    Returns:
        "add_seconds_per_10k", "draw_seconds_per_10k"; "held_mib", what the process grew by until
        all images were there, and "mib_per_10k" of it; "peak_mib", its highest growth;
        "checkpoint_seconds" for writing all shards, "again_seconds" for a second checkpoint of the
        same pool; "disk_mib".
    """
    rng = torch.Generator().manual_seed(0)
    inputs = SPEC.normalize(torch.rand((min(BATCH, images), *SPEC.shape), generator=rng))
    labels = torch.randint(10, (len(inputs),), generator=rng)
    # What the first call of each operation costs is no cost of a pool.
    _fill(Pool(SPEC), len(inputs), inputs, labels)
    before = memory_mib("VmRSS")

    pool = Pool(SPEC, memory_limit=256 * _MIB)
    start = time.perf_counter()
    _fill(pool, images, inputs, labels)
    added = time.perf_counter() - start
    held = memory_mib("VmRSS") - before

    rounds = -(-max(images, _TEN_THOUSAND) // BATCH)
    start = time.perf_counter()
    for _ in range(rounds):
        pool.draw_labelled(BATCH, rng)
    drawn = time.perf_counter() - start
    # Before the checkpoint: writing a shard takes a copy of it alone.
    peak = memory_mib("VmHWM") - before

    store = CheckpointStore(folder)
    start = time.perf_counter()
    store.save(1, {}, {"pool": pool})
    whole = time.perf_counter() - start
    start = time.perf_counter()
    store.save(2, {}, {"pool": pool})
    again = time.perf_counter() - start
    disk = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return {
        "add_seconds_per_10k": added / images * _TEN_THOUSAND,
        "draw_seconds_per_10k": drawn / (rounds * BATCH) * _TEN_THOUSAND,
        "mib_per_10k": held / images * _TEN_THOUSAND,
        "held_mib": held,
        # The system counts both in batches, and the mark may lag behind by some pages.
        "peak_mib": max(held, peak),
        "checkpoint_seconds": whole,
        "again_seconds": again,
        "disk_mib": disk / _MIB,
    }


def measure_foreign(images: int, folder: Path) -> Measured:
    """Images of an .npz file that are resized into the cache once and drawn from there.

    Args:
        images: 3x32x32; in the file they are 40x40, so that each is resized.
        folder: gets the file and the cache.

    Returns:
        "decode_seconds_per_10k", hashing of contents included; "draw_seconds_per_10k", batches of
        250 in random order; "held_mib", what the process grew by in memory of its own, pages of
        files that the system keeps not counted, and "mib_per_10k" of it; "peak_mib", its highest
        growth; "again_seconds" for opening what was decoded before; "disk_mib" of the cache.
    """
    raw = folder / "raw.npz"
    _write_raw(raw, images)
    rng = torch.Generator().manual_seed(0)
    config = SourceConfig(kind="folder", data=str(raw))
    with _cache_in(folder / "warm"):
        # What the first call of each operation costs is no cost of a million images.
        small = folder / "small.npz"
        _write_raw(small, BATCH)
        few = config.model_copy(update={"data": str(small)})
        open_folder("few", few, SPEC, 0, torch.device("cpu")).source.draw(BATCH, rng)
    with _cache_in(folder / "cache"):
        before, lowest = memory_mib("RssAnon"), memory_mib("VmRSS")

        start = time.perf_counter()
        source = open_folder("foreign", config, SPEC, 0, torch.device("cpu")).source
        decoded = time.perf_counter() - start

        rounds = -(-max(images, _TEN_THOUSAND) // BATCH)
        start = time.perf_counter()
        for _ in range(rounds):
            source.draw(BATCH, rng)
        drawn = time.perf_counter() - start
        held, peak = memory_mib("RssAnon") - before, memory_mib("VmHWM") - lowest

        start = time.perf_counter()
        open_folder("foreign", config, SPEC, 0, torch.device("cpu"))
        again = time.perf_counter() - start
    disk = sum(path.stat().st_size for path in (folder / "cache").rglob("*.npy"))
    return {
        "decode_seconds_per_10k": decoded / images * _TEN_THOUSAND,
        "draw_seconds_per_10k": drawn / (rounds * BATCH) * _TEN_THOUSAND,
        "mib_per_10k": held / images * _TEN_THOUSAND,
        "held_mib": held,
        "peak_mib": peak,
        "again_seconds": again,
        "disk_mib": disk / _MIB,
    }


IMAGE_CASES: Mapping[str, ScaleCase] = {"pool": measure_pool, "foreign": measure_foreign}


def _fill(pool: Pool, images: int, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    while (missing := images - len(pool)) > 0:
        pool.add(inputs[:missing], labels[:missing])


def _write_raw(path: Path, images: int) -> None:
    """An .npz file of images of 40x40 pixels, written block by block."""
    block = np.random.RandomState(0).randint(0, 256, (BATCH, *_RAW), dtype=np.uint8)
    with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w", force_zip64=True) as x:
        header = {"descr": "|u1", "fortran_order": False, "shape": (images, *_RAW)}
        np.lib.format.write_array_header_1_0(x, header)
        for start in range(0, images, BATCH):
            # Rolled, so that no two blocks are the same.
            x.write(np.roll(block, start // BATCH + 1).data[: min(BATCH, images - start)])


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Keep what is decoded inside the block in a folder of its own."""
    before = os.environ.get("VESTIGE_CACHE")
    os.environ["VESTIGE_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["VESTIGE_CACHE"]
        else:
            os.environ["VESTIGE_CACHE"] = before


def memory_mib(key: str) -> float:
    """Memory of this process: "VmRSS" now, "RssAnon" its own part, "VmHWM" at its highest.

    Where there is no /proc all are the highest so far; on Linux that is not used, since a process
    inherits the highest value of the one that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
    except OSError:
        return runtime.peak_memory_mib(torch.device("cpu"))
    values = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(values[0]) / 1024
