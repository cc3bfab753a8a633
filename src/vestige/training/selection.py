"""What a method chose of its sources: figures, and a picture of what it kept and dropped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vestige.core.protocols import Source
from vestige.core.rows import KnowsParts, RowSource, Selection, SelectsRows
from vestige.core.types import InputSpec
from vestige.training.files import write_json
from vestige.training.moments import drawable
from vestige.training.pictures import contact_sheet, save_png

_COLUMNS, _SHOWN = 10, 30


def selection_facts(method: object, sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """What `method` took of each of `sources`; {} for one that does not choose.

    Args:
        method: any; what it says of its selections is read.
        sources: of the run.

    Returns:
        By source "rows", how many it has; "rows_seen", how many were ever looked at; "seen" and
        "kept", how often that was and how often what was looked at was learned from; "keep_rate",
        kept / seen. Where the source knows its parts, "parts" has the same of each, and of those of
        which it is known whether they are wanted: "precision", the share of what was kept that is
        wanted; "recall", the share of wanted looks that were kept; "base_rate", the share of all
        looks that were at wanted rows, which is the precision of chance. None where nothing was
        seen.
    """
    if not isinstance(method, SelectsRows):
        return {}
    found = {}
    for name, chosen in method.selections().items():
        source = sources.get(name)
        found[name] = {
            "rows": len(chosen.seen),
            "rows_seen": int((chosen.seen > 0).sum()),
            **_counts(chosen.seen, chosen.kept),
            **(_of_parts(chosen, source) if isinstance(source, KnowsParts) else {}),
        }
    return found


def brief(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The rates of `selection_facts`, for summary.json."""
    rates = ("keep_rate", "precision", "recall", "base_rate")
    return {
        name: {rate: source[rate] for rate in rates if rate in source}
        for name, source in facts.items()
    }


def write_selection(
    out: Path,
    method: object,
    sources: Mapping[str, Source],
    spec: InputSpec,
    facts: Mapping[str, Mapping[str, Any]],
) -> bool:
    """selection.json, schema 1, and selection.png, if there is anything to draw.

    Returns:
        False where the method chooses nothing; then nothing is written.
    """
    if not facts or not isinstance(method, SelectsRows):
        return False
    write_json(out / "selection.json", {"schema": 1, "sources": dict(facts)})
    sheet = selection_sheet(method.selections(), sources, spec)
    if sheet is not None:
        save_png(sheet, out / "selection.png")
    return True


def selection_sheet(
    selections: Mapping[str, Selection], sources: Mapping[str, Source], spec: InputSpec
) -> NDArray[np.uint8] | None:
    """The images that were kept most often, then those that were dropped most often.

    At most 30 of each for each source, by part where the source knows its parts; None if nothing
    was chosen from images that can be drawn.
    """
    if not drawable(spec):
        return None
    images: list[Tensor] = []
    captions: list[str] = []
    for name, chosen in selections.items():
        source = sources.get(name)
        if not isinstance(source, RowSource):
            continue
        prefix = f"{name} " if len(selections) > 1 else ""
        for verb, counts in (("kept", chosen.kept), ("dropped", chosen.seen - chosen.kept)):
            index = _most(counts)
            rows = source.rows(index) if len(index) else None
            if not isinstance(rows, Tensor):
                continue
            labels = [f"{prefix}{verb}"] * len(index)
            if isinstance(source, KnowsParts):
                parts = list(source.parts)
                numbers = source.part_of(index).tolist()
                labels = [f"{prefix}{verb}: {parts[number]}" for number in numbers]
            images.append(spec.denormalize(rows.float()).cpu())
            captions += labels
    if not images:
        return None
    drawn = torch.cat(images)
    scale = max(1, 48 // drawn.shape[-1])
    return contact_sheet(drawn, columns=_COLUMNS, scale=scale, labels=captions)


def _counts(seen: Tensor, kept: Tensor) -> dict[str, Any]:
    looks, takes = int(seen.sum()), int(kept.sum())
    return {"seen": looks, "kept": takes, "keep_rate": _share(takes, looks)}


def _of_parts(chosen: Selection, source: KnowsParts) -> dict[str, Any]:
    """What was taken of each part, and how that fits what was wanted."""
    part_of = source.part_of(torch.arange(len(chosen.seen))).cpu()
    parts: dict[str, dict[str, Any]] = {}
    for number, (name, wanted) in enumerate(source.parts.items()):
        own = part_of == number
        counts = _counts(chosen.seen[own], chosen.kept[own])
        parts[name] = {"wanted": wanted, "rows": int(own.sum()), **counts}
    told = [part for part in parts.values() if part["wanted"] is not None]
    if not told:
        return {"parts": parts}
    right = [part for part in told if part["wanted"]]
    seen, kept = (sum(part[key] for part in right) for key in ("seen", "kept"))
    all_seen, all_kept = (sum(part[key] for part in told) for key in ("seen", "kept"))
    return {
        "parts": parts,
        "precision": _share(kept, all_kept),
        "recall": _share(kept, seen),
        "base_rate": _share(seen, all_seen),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _most(counts: Tensor) -> Tensor:
    """Numbers of the rows with the highest counts above 0, the highest first."""
    order = counts.argsort(descending=True, stable=True)[:_SHOWN]
    return order[counts[order] > 0]
