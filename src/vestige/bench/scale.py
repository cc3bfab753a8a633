"""How a component behaves as it grows: seconds and memory at several sizes."""

import datetime
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from vestige.bench.claims import commit
from vestige.core.types import InputSpec
from vestige.errors import OutOfMemoryError, RecipeError
from vestige.sources.pool import Pool
from vestige.training import runtime
from vestige.training.checkpoint import CheckpointStore
from vestige.training.files import write_json

# Of the largest size; each doubles the one before, so that what is not linear shows.
SHARES = (8, 4, 2, 1)
BATCH = 250
_TEN_THOUSAND = 10_000
_MIB = 2**20
_SPEC = InputSpec.image(3, 32, 32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))

Measured = dict[str, float]
# Gets a number of images and an empty folder; runs in a process of its own.
ScaleCase = Callable[[int, Path], Measured]


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
    inputs = _SPEC.normalize(torch.rand((min(BATCH, images), *_SPEC.shape), generator=rng))
    labels = torch.randint(10, (len(inputs),), generator=rng)
    # What the first call of each operation costs is no cost of a pool.
    _fill(Pool(_SPEC), len(inputs), inputs, labels)
    before = _memory_mib("VmRSS")

    pool = Pool(_SPEC, memory_limit=256 * _MIB)
    start = time.perf_counter()
    _fill(pool, images, inputs, labels)
    added = time.perf_counter() - start
    held = _memory_mib("VmRSS") - before

    rounds = -(-max(images, _TEN_THOUSAND) // BATCH)
    start = time.perf_counter()
    for _ in range(rounds):
        pool.draw_labelled(BATCH, rng)
    drawn = time.perf_counter() - start
    # Before the checkpoint: writing a shard takes a copy of it alone.
    peak = _memory_mib("VmHWM") - before

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
        "peak_mib": peak,
        "checkpoint_seconds": whole,
        "again_seconds": again,
        "disk_mib": disk / _MIB,
    }


CASES: Mapping[str, ScaleCase] = {"pool": measure_pool}


def run_scale(
    name: str, *, images: int, out: Path, echo: Callable[[str], object] = lambda line: None
) -> Path:
    """Measure a case at four sizes, each in a fresh process, and write its JSON.

    Args:
        name: one of `CASES`.
        images: the largest size; the others are its half, quarter and eighth.
        out: folder that gets NAME.json.
        echo: gets a line as each size begins.

    Returns:
        The file that was written.

    Raises:
        RecipeError: there is no such case, or `images` is too small to be divided.
        OutOfMemoryError: the process of a size was killed.
    """
    if name not in CASES:
        raise RecipeError(f"got scale case {name!r}, expected one of {', '.join(CASES)}")
    if images < SHARES[0]:
        raise RecipeError(f"--images: got {images}, expected at least {SHARES[0]}")
    sizes = []
    for share in SHARES:
        size = images // share
        echo(f"{name}: {size:,} images ...")
        sizes.append({"images": size, **_measured(name, size)})
    path = out / f"{name}.json"
    write_json(
        path,
        {
            "schema": 1,
            "name": name,
            "input": list(_SPEC.shape),
            "sizes": sizes,
            "threads": torch.get_num_threads(),
            "machine": runtime.machine(),
            "versions": runtime.versions(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "command": f"vestige bench scale {name} --images {images}",
        },
    )
    return path


def scale_table(sizes: Sequence[Mapping[str, Any]]) -> str:
    """The sizes of a result as a Markdown table."""
    rows = [
        "| images | add, s per 10,000 | draw, s per 10,000 | MiB per 10,000 | held MiB | peak MiB "
        "| checkpoint s | again s | on disk MiB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in sizes:
        add, draw = size["add_seconds_per_10k"], size["draw_seconds_per_10k"]
        rows.append(
            f"| {size['images']:,} | {add:.3f} | {draw:.3f} "
            f"| {size['mib_per_10k']:.1f} | {size['held_mib']:,.0f} | {size['peak_mib']:,.0f} "
            f"| {size['checkpoint_seconds']:.2f} | {size['again_seconds']:.2f} "
            f"| {size['disk_mib']:,.0f} |"
        )
    return "\n".join(rows)


def _measured(name: str, images: int) -> Measured:
    """What a case gives in a new process: memory that another size took cannot be told apart."""
    folder = Path(tempfile.mkdtemp(prefix="vestige-scale-"))
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            return fresh.submit(_in_process, name, images, folder, torch.get_num_threads()).result()
    except BrokenProcessPool as error:
        raise OutOfMemoryError(
            f"the process that measured {name!r} with {images:,} images was killed, most likely "
            "for want of memory; lower --images"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_process(name: str, images: int, folder: Path, threads: int) -> Measured:
    torch.set_num_threads(threads)
    return CASES[name](images, folder)


def _fill(pool: Pool, images: int, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    while (missing := images - len(pool)) > 0:
        pool.add(inputs[:missing], labels[:missing])


def _memory_mib(key: str) -> float:
    """Memory of this process: "VmRSS" now, "VmHWM" at its highest.

    Where there is no /proc both are the highest so far; on Linux that is not used, since a process
    inherits the highest value of the one that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
    except OSError:
        return runtime.peak_memory_mib(torch.device("cpu"))
    values = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(values[0]) / 1024
