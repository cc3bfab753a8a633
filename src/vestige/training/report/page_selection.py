"""What a method chose of its sources, as the page shows it."""

import math
from collections.abc import Mapping
from typing import Any

from vestige.training.report import tables
from vestige.training.report.page_values import exact, picture
from vestige.training.report.run_folder import RunFolder
from vestige.training.report.tables import mapping, number


def selection_view(run: RunFolder) -> dict[str, Any] | None:
    """Picture, figures and a table for each source; None where nothing was chosen."""
    sources = [
        _source_view(name, mapping(found))
        for name, found in mapping(run.selection.get("sources")).items()
        if mapping(found)
    ]
    if not sources:
        return None
    return {"uri": picture(run.selection_picture) if run.selection_picture else "", "of": sources}


def _source_view(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    parts = mapping(found.get("parts"))
    rows = [_row(str(part), mapping(counts)) for part, counts in parts.items()]
    return {
        "name": name,
        "sentence": _sentence(found),
        "rows": [*rows, _row("all" if rows else name, found)],
        "by_part": bool(rows),
    }


def _row(name: str, counts: Mapping[str, Any]) -> dict[str, Any]:
    wanted = counts.get("wanted")
    values = {key: number(counts.get(key)) for key in ("rows", "seen", "kept")}
    rate = number(counts.get("keep_rate"))
    return {
        "name": name,
        "wanted": "yes" if wanted is True else "no" if wanted is False else "",
        **{key: exact(value, tables.format_count(value)) for key, value in values.items()},
        "keep_rate": exact(rate, tables.format_share(rate)),
    }


def _sentence(found: Mapping[str, Any]) -> str:
    rate = number(found.get("keep_rate"))
    told = ""
    if _known(rate):
        told = f"{tables.format_share(rate)} of what it looked at was learned from."
    precision, recall, base = (
        number(found.get(key)) for key in ("precision", "recall", "base_rate")
    )
    if not _known(precision) or not _known(base):
        return told
    return (
        f"{told} Of that {tables.format_share(precision)} is wanted, where chance gives "
        f"{tables.format_share(base)}; {tables.format_share(recall)} of the wanted looks were kept."
    )


def _known(value: float) -> bool:
    return math.isfinite(value)
