"""What a filter kept and dropped, as the page shows it: counts, scores, and items to look at."""

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

from vestige.training.report import charts, tables
from vestige.training.report.charts import Series
from vestige.training.report.page_curves import chart
from vestige.training.report.page_values import exact, safe
from vestige.training.report.run_folder import RunFolder
from vestige.training.report.tables import mapping, number, sequence

# A page stays readable in a mail.
_MOST_BYTES = 3 * 2**20


def filter_view(run: RunFolder) -> list[dict[str, Any]]:
    """Everything the page shows of `provenance.json`; [] where there is none."""
    room = [_MOST_BYTES]
    stages = mapping(run.provenance.get("stages"))
    return [_stage(str(name), mapping(found), room) for name, found in stages.items()]


def _stage(name: str, found: Mapping[str, Any], room: list[int]) -> dict[str, Any]:
    counts = {str(key): number(value) for key, value in mapping(found.get("counts")).items()}
    whole = math.fsum(counts.values())
    chosen = str(found.get("chosen") or "")
    filters = {str(key): mapping(one) for key, one in mapping(found.get("filters")).items()}
    return {
        "name": name,
        "sentence": _sentence(found, counts.get("kept", math.nan), whole, chosen),
        "counts": [_count(key, value, whole, chosen) for key, value in counts.items()],
        "filters": [_filter(key, one, key == chosen) for key, one in filters.items()],
        "histograms": [made for key, one in filters.items() if (made := _histogram(key, one))],
        "names": list(filters),
        # Turn by turn, so that room for sound is left for both.
        "lists": _lists(found, list(filters), room),
    }


def _sentence(found: Mapping[str, Any], kept: float, whole: float, chosen: str) -> str:
    by = f", by the filter “{chosen}”" if chosen else ", without a filter"
    told = f"{tables.format_count(kept)} of {tables.format_count(whole)} items stay{by}."
    known, right, right_kept, known_kept = (
        number(found.get(key)) for key in ("known", "right", "right_kept", "known_kept")
    )
    if known > 0 and known_kept > 0:
        told += (
            f" The truth is known of {tables.format_count(known)}, for this page only: "
            f"{tables.format_share(right / known)} of all and "
            f"{tables.format_share(right_kept / known_kept)} of what stays are right."
        )
    return told


def _count(reason: str, value: float, whole: float, chosen: str) -> dict[str, Any]:
    share = value / whole if whole else math.nan
    named = "dropped by the filter" if reason in (chosen, "filter") else f"dropped: {reason}"
    return {
        "name": "kept" if reason == "kept" else named,
        "count": exact(value, tables.format_count(value)),
        "share": exact(share, tables.format_share(share)),
        "bar": safe(
            charts.bar(share, title=f"{reason}: {charts.percent(share)}", strong=reason == "kept")
        ),
    }


def _filter(name: str, about: Mapping[str, Any], chosen: bool) -> dict[str, Any]:
    area, threshold = number(about.get("area_under_curve")), number(about.get("threshold"))
    share = number(about.get("keep_fraction"))
    return {
        "name": name,
        "chosen": chosen,
        "better": "higher" if about.get("better") == "high" else "lower",
        "threshold": exact(threshold, _short(threshold)),
        "share": exact(share, tables.format_share(share)),
        "area": exact(area, _short(area)),
        "bar": safe(charts.bar(area, title=f"{name}: {_short(area)}", reference=0.5)),
    }


def _histogram(name: str, about: Mapping[str, Any]) -> dict[str, Any] | None:
    found = mapping(about.get("histogram"))
    low, high = number(found.get("low")), number(found.get("high"))
    series = []
    for slot, key in enumerate(("kept", "dropped")):
        values = [number(value) for value in sequence(found.get(key))]
        if not values or not math.isfinite(low) or not high > low:
            return None
        step = (high - low) / len(values)
        points = [(low + (place + 0.5) * step, value) for place, value in enumerate(values)]
        series.append(Series(key, points, slot, strong=slot == 0))
    return chart(f"Items by “{name}”", series, x_label="score", share=False)


def _lists(found: Mapping[str, Any], names: list[str], room: list[int]) -> list[dict[str, Any]]:
    both: dict[str, list[dict[str, Any]]] = {"kept": [], "dropped": []}
    rows = {key: [mapping(one) for one in sequence(found.get(key))] for key in both}
    for place in range(max(map(len, rows.values()), default=0)):
        for key, shown in both.items():
            if place < len(rows[key]):
                shown.append(_item(rows[key][place], names, room))
    return [
        {
            "title": f"Some of what was {key}",
            "items": shown,
            "has_truth": any(one["truth"] is not None for one in shown),
            "has_sound": any(one["audio"] for one in shown),
            "has_part": any(one["part"] for one in shown),
            "has_reason": any(one["reason"] for one in shown),
        }
        for key, shown in both.items()
        if shown
    ]


def _item(item: Mapping[str, Any], names: list[str], room: list[int]) -> dict[str, Any]:
    scores = mapping(item.get("scores"))
    truth = item.get("truth")
    values = [number(scores.get(name)) for name in names]
    return {
        "text": str(item.get("text") or ""),
        "truth": truth if isinstance(truth, str) else None,
        "right": item.get("right") is True,
        "known": isinstance(item.get("right"), bool),
        "reason": str(item.get("reason") or ""),
        "part": str(item.get("part") or ""),
        "scores": [exact(value, _short(value)) for value in values],
        "audio": _sound(item.get("audio"), room),
    }


def _sound(given: object, room: list[int]) -> str:
    """A recording as an address that holds it, while there is room; "" for anything else."""
    if not isinstance(given, str) or len(given) > room[0]:
        return ""
    try:
        base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError):
        return ""
    room[0] -= len(given)
    return f"data:audio/wav;base64,{given}"


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"
