"""How fast something is beside a plain loop of the same calls, in one process."""

import datetime
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vestige.bench.claims import commit
from vestige.bench.speed_cases import CASES
from vestige.errors import RecipeError
from vestige.training import runtime
from vestige.training.files import write_json


def run_speed(
    name: str, *, repeats: int, out: Path, echo: Callable[[str], object] = lambda line: None
) -> Path:
    """Time all ways of a case in turn and write their medians.

    Args:
        name: one of `CASES`.
        repeats: of each way, after one that is not counted.
        out: folder that gets NAME.json.
        echo: gets a line for each way.

    Raises:
        RecipeError: there is no such case.
    """
    if name not in CASES:
        raise RecipeError(f"got speed case {name!r}, expected one of {', '.join(CASES)}")
    case = CASES[name]()
    seconds: dict[str, list[float]] = {way: [] for way in case.ways}
    for repeat in range(repeats + 1):
        # In turn, so that whatever else the machine does meets all of them.
        for way, call in case.ways.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[way].append(time.perf_counter() - start)
    ours = median(seconds["vestige"])
    ways = {
        way: {
            "seconds": median(found),
            f"{case.what}_per_second": case.items / median(found),
            "ratio": median(found) / ours,
        }
        for way, found in seconds.items()
    }
    for way, told in ways.items():
        rate = told[f"{case.what}_per_second"]
        echo(f"{way}: {rate:,.1f} {case.what} per second, {told['ratio']:.2f} times our time")
    path = out / f"{name}.json"
    write_json(
        path,
        {
            "schema": 1,
            "name": name,
            "what": case.what,
            "items": case.items,
            "shapes": dict(case.shapes),
            "repeats": repeats,
            "ways": ways,
            "threads": torch.get_num_threads(),
            "machine": runtime.machine(),
            "versions": runtime.versions(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "command": f"vestige bench speed {name}",
        },
    )
    return path


def speed_page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """SPEED.md: every speed benchmark."""
    lines = [
        "# Speed",
        "",
        "Generated from `benchmarks/speed/*.json` by `vestige bench tables`. All ways of a case "
        "are timed in turn in one process; what each is stands in `vestige.bench.speed_cases`. The "
        "ratio is that of its time to ours.",
    ]
    for name, result in results.items():
        machine, what = result["machine"], result["what"]
        lines += [
            *("", f"## {name}", ""),
            f"`{result['command']}`, {result['date']}, {machine['gpu'] or machine['processor']} "
            f"with {machine['cores']} cores, {result['threads']} threads, median of "
            f"{result['repeats']}:",
            *("", f"| way | {what} per second | ratio |", "| --- | ---: | ---: |"),
        ]
        lines += [
            f"| {way} | {told[f'{what}_per_second']:,.1f} | {told['ratio']:.2f} |"
            for way, told in result["ways"].items()
        ]
    return "\n".join(lines) + "\n"
