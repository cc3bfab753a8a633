"""How a component behaves as it grows: seconds and memory at several sizes."""

import datetime
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from vestige.bench import scale_federated
from vestige.bench.claims import commit
from vestige.bench.scale_cases import IMAGE_CASES, SPEC, Measured, ScaleCase
from vestige.errors import OutOfMemoryError, RecipeError
from vestige.training import runtime
from vestige.training.files import write_json

# Of the largest size; each doubles the one before, so that what is not linear shows.
SHARES = (8, 4, 2, 1)
_COLUMNS: Mapping[str, tuple[str, str]] = {
    "images": ("images", ",d"),
    "clients": ("clients", ",d"),
    "active": ("asked", ",d"),
    "add_seconds_per_10k": ("add, s per 10,000", ".3f"),
    "decode_seconds_per_10k": ("decode, s per 10,000", ".3f"),
    "draw_seconds_per_10k": ("draw, s per 10,000", ".3f"),
    "mib_per_10k": ("MiB per 10,000", ".1f"),
    "held_mib": ("held MiB", ",.0f"),
    "peak_mib": ("peak MiB", ",.0f"),
    "checkpoint_seconds": ("checkpoint s", ".2f"),
    "again_seconds": ("again s", ".2f"),
    "disk_mib": ("on disk MiB", ",.0f"),
    "direct_join_seconds": ("in-process join s", ".2f"),
    "direct_round_seconds": ("round s", ".2f"),
    "direct_server_mib": ("MiB", ",.0f"),
    "ray_join_seconds": ("Ray join s", ".1f"),
    "ray_round_seconds": ("round s", ".2f"),
    "ray_server_mib": ("server MiB", ",.0f"),
    "ray_workers_mib": ("workers MiB", ",.0f"),
    "down_kib": ("KiB down per client", ".1f"),
    "up_kib": ("KiB up per client", ".1f"),
}
_FEDERATED = "federated"
CASES: Mapping[str, ScaleCase] = {
    **IMAGE_CASES,
    _FEDERATED: scale_federated.measure_federation,
}


def run_scale(
    name: str,
    *,
    images: int = 100_000,
    clients: int = 1000,
    active: int = 50,
    out: Path,
    echo: Callable[[str], object] = lambda line: None,
) -> Path:
    """Measure a case at four sizes, each in a fresh process, and write its JSON.

    Args:
        name: one of `CASES`.
        images: the largest size; the others are its half, quarter and eighth.
        clients: the same for "federated".
        active: of "federated", clients that are asked in a round.
        out: folder that gets NAME.json.
        echo: gets a line as each size begins.

    Returns:
        The file that was written.

    Raises:
        RecipeError: there is no such case, or the size is too small to be divided.
        OutOfMemoryError: the process of a size was killed.
    """
    if name not in CASES:
        raise RecipeError(f"got scale case {name!r}, expected one of {', '.join(CASES)}")
    unit, largest = ("clients", clients) if name == _FEDERATED else ("images", images)
    if largest < SHARES[0]:
        raise RecipeError(f"--{unit}: got {largest}, expected at least {SHARES[0]}")
    given = {"active": active} if name == _FEDERATED else {}
    sizes = []
    for share in SHARES:
        size = largest // share
        echo(f"{name}: {size:,} {unit} ...")
        sizes.append({unit: size, **_measured(name, size, **given)})
    options = "".join(f" --{key} {value}" for key, value in given.items())
    path = out / f"{name}.json"
    write_json(
        path,
        {
            "schema": 1,
            "name": name,
            "input": list((scale_federated.SPEC if given else SPEC).shape),
            "sizes": sizes,
            "threads": torch.get_num_threads(),
            "machine": runtime.machine(),
            "versions": runtime.versions(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "command": f"vestige bench scale {name} --{unit} {largest}{options}",
        },
    )
    return path


def scale_table(sizes: Sequence[Mapping[str, Any]]) -> str:
    """The sizes of a result as a Markdown table."""
    columns = [key for key in _COLUMNS if key in sizes[0]]
    rows = [
        f"| {' | '.join(_COLUMNS[key][0] for key in columns)} |",
        f"|{' ---: |' * len(columns)}",
    ]
    for size in sizes:
        rows.append(f"| {' | '.join(f'{size[key]:{_COLUMNS[key][1]}}' for key in columns)} |")
    return "\n".join(rows)


def scale_page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """SCALE.md: every scale benchmark."""
    lines = [
        "# Scale",
        "",
        "Generated from `benchmarks/scale/*.json` by `vestige bench tables`. Each size is measured "
        "in a process of its own; what the columns mean is told in `vestige.bench.scale_cases` and "
        "`vestige.bench.scale_federated`.",
    ]
    for name, result in results.items():
        machine = result["machine"]
        lines += [
            *("", f"## {name}", ""),
            f"`{result['command']}`, {result['date']}, {machine['gpu'] or machine['processor']} "
            f"with {machine['cores']} cores, OMP_NUM_THREADS={result['threads']}, torch "
            f"{result['versions']['torch']}:",
            *("", scale_table(result["sizes"])),
        ]
        if name == _FEDERATED:
            lines += ["", *scale_federated.paper_table(result["sizes"])]
    return "\n".join(lines) + "\n"


def _measured(name: str, size: int, **given: int) -> Measured:
    """What a case gives in a new process: memory that another size took cannot be told apart."""
    folder = Path(tempfile.mkdtemp(prefix="vestige-scale-"))
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            return fresh.submit(
                _in_process, name, size, given, folder, torch.get_num_threads()
            ).result()
    except BrokenProcessPool as error:
        unit = "clients" if name == _FEDERATED else "images"
        raise OutOfMemoryError(
            f"the process that measured {name!r} with {size:,} {unit} was killed, most likely "
            f"for want of memory; lower --{unit}"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_process(
    name: str, size: int, given: Mapping[str, int], folder: Path, threads: int
) -> Measured:
    torch.set_num_threads(threads)
    return CASES[name](size, folder, **given)
