"""Small things that every part of the page needs."""

import base64
import math
from collections.abc import Mapping
from typing import Any

from vestige.training.report import tables
from vestige.training.report.run_folder import RunFolder
from vestige.training.report.tables import mapping, number, sequence


def metric_of(run: RunFolder) -> str:
    """Name of the metric that a run is judged by; of a run that was cut off the first it wrote."""
    told = run.summary.get("metric") or run.evaluation.get("metric")
    scores = (mapping(line.get("scores")) for line in run.metrics)
    return str(told or next((next(iter(one)) for one in scores if one), "accuracy"))


def score_of(run: RunFolder, who: str) -> float:
    """The last step's score of "student" or "teacher", or NaN."""
    return number(mapping(run.summary.get(who)).get("score"))


def test_size(run: RunFolder) -> float:
    """How many test inputs a score of `run` rests on, or NaN."""
    known = number(run.evaluation.get("inputs"))
    if math.isfinite(known):
        return known
    found = [
        number(mapping(item).get("images"))
        for item in records_of(run) or []
        if not tables.for_training(item)
    ]
    return found[0] if len(found) == 1 else math.nan


def interval_of(run: RunFolder, score: float) -> str:
    """The 95 % interval of an accuracy for its number of test inputs, or "" for other metrics."""
    size = test_size(run)
    low, high = tables.interval_95(score, size)
    if metric_of(run) != "accuracy" or not math.isfinite(low):
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f} % (95 %, {size:,.0f} test inputs)"


def records_of(run: RunFolder) -> list[Any] | None:
    """All records of real data, or None where nothing was recorded."""
    found = [
        place["real_data"]
        for place in (run.record, run.summary)
        if isinstance(place.get("real_data"), list)
    ]
    # `run.json` has the whole records; a summary may only have their names.
    known = {tables.record_name(item) for item in (found[0] if found else [])}
    extra = [
        item
        for item in (found[1] if len(found) > 1 else [])
        if tables.record_name(item) not in known
    ]
    return [*found[0], *extra] if found else None


def images_read(run: RunFolder) -> float:
    """Real images that a student was trained on, or NaN."""
    records = records_of(run)
    if records is None:
        return math.nan
    # A record without a count makes the sum unknown, as NaN does.
    return math.fsum(
        number(mapping(item).get("images")) for item in records if tables.for_training(item)
    )


def class_names(run: RunFolder, count: int) -> list[str]:
    """Names of `count` classes; numbers where they have no names."""
    known = [str(name) for name in sequence(run.evaluation.get("classes"))]
    return [known[index] if index < len(known) else str(index) for index in range(count)]


def stopped_early(run: RunFolder) -> bool:
    """Whether a budget ended the run before its last round."""
    return run.summary.get("complete") is False


def exact(value: float, text: str) -> dict[str, str]:
    """A number for people beside the same number for machines."""
    return {"value": repr(value) if math.isfinite(value) else "", "text": text}


def safe(svg: str) -> Any:
    """Mark a chart as escaped already; the charts escape every text they are given."""
    from markupsafe import Markup

    return Markup(svg)


def picture(data: bytes) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def in_order(points: Mapping[float, Any]) -> list[tuple[float, Any]]:
    """Points by ascending x, those without a place left out."""
    return sorted((x, y) for x, y in points.items() if math.isfinite(x))
