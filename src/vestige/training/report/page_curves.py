"""What happened over time: the lines of `metrics.jsonl` as charts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vestige.training.report import charts, heat_charts, tables
from vestige.training.report.charts import Series
from vestige.training.report.page_values import class_names, in_order, safe
from vestige.training.report.run_folder import RunFolder
from vestige.training.report.tables import mapping, number, sequence

Parts = Sequence[tuple[str, RunFolder]]


def score_chart(
    parts: Parts, metric: str, teacher: float, x_key: str = "step"
) -> dict[str, Any] | None:
    """The test score of each run over "step", "student_steps" or "seconds"."""
    series = []
    for slot, (title, run) in enumerate(parts):
        points = {
            _place(line, run, x_key): number(mapping(line.get("scores")).get(metric))
            for line in run.metrics
            if line.get("kind") == "evaluation" and metric in mapping(line.get("scores"))
        }
        series.append(Series(title or "student", in_order(points), slot, strong=slot == 0))
    share = tables.is_share(metric) and all(
        -0.001 <= y <= 1.001 for one in series for _, y in one.points if math.isfinite(y)
    )
    what = {"step": "steps", "student_steps": "student steps"}.get(x_key, x_key)
    return chart(
        f"Test {tables.metric_name(metric)} over {what}",
        series,
        x_label={"step": "step", "student_steps": "student step"}.get(x_key, x_key),
        share=share,
        reference=("teacher", teacher) if math.isfinite(teacher) else None,
    )


def has_places(parts: Parts, x_key: str) -> bool:
    """Whether every evaluation of every run has a place on that axis."""
    lines = [(line, run) for _, run in parts for line in run.metrics]
    scored = [(line, run) for line, run in lines if line.get("kind") == "evaluation"]
    return bool(scored) and all(math.isfinite(_place(line, run, x_key)) for line, run in scored)


def round_chart(parts: Parts, key: str, title: str) -> dict[str, Any] | None:
    """A share that is measured once a round."""
    series = []
    by_step = any(_loops(_rounds(run)) > 1 for _, run in parts)
    x_key = "step" if by_step else "round"
    for slot, (name, run) in enumerate(parts):
        # Null where it was not measured in that round.
        points = {
            number(line.get(x_key)): number(line[key])
            for line in _rounds(run)
            if line.get(key) is not None
        }
        series.append(Series(name or "student", in_order(points), slot, strong=slot == 0))
    return chart(title, series, x_label=x_key, share=True)


def term_charts(run: RunFolder) -> list[dict[str, Any]]:
    """One small chart for each loss term of each role of each loop, with an axis of its own."""
    curves: dict[tuple[str, str, str], dict[float, float]] = {}
    lines = [line for line in run.metrics if line.get("kind") == "step"]
    several = _loops(lines) > 1
    for line in lines:
        terms = mapping(line.get("terms"))
        # A total that is the only term again would be the same curve twice.
        values = {**terms, "total": line["total"]} if "total" in line and len(terms) != 1 else terms
        loop = str(line.get("loop") or "") if several else ""
        for term, value in values.items():
            curve = curves.setdefault((loop, str(line.get("role") or ""), str(term)), {})
            curve[number(line.get("step"))] = number(value)
    out = []
    for key, points in curves.items():
        name = " · ".join(part.replace("_", " ") for part in key if part)
        line_of = Series(name, in_order(points), strong=True)
        made = chart(name, [line_of], x_label="step", width=340, height=190)
        if made:
            out.append(made)
    return out


def class_strips(parts: Parts) -> list[dict[str, Any]]:
    """One heat strip of the teacher's classes per run, all on one scale."""
    found = []
    for title, run in parts:
        lines = [line for line in _rounds(run) if sequence(line.get("classes"))]
        x_key = "step" if _loops(lines) > 1 else "round"
        columns = {
            number(line.get(x_key)): [number(count) for count in line["classes"]] for line in lines
        }
        if ordered := in_order(columns):
            found.append((title, run, x_key, ordered))
    top = max(
        (
            max(charts.shares_of(counts), default=0.0)
            for *_, columns in found
            for _, counts in columns
        ),
        default=0.0,
    )
    return [
        {
            "title": title,
            "svg": safe(
                heat_charts.heat_strip(
                    columns,
                    title=f"The teacher’s answers by class, {title or 'this run'}",
                    x_label=x_key,
                    names=class_names(run, max(len(counts) for _, counts in columns)),
                    top=top,
                )
            ),
            "even": charts.percent(1 / max(len(counts) for _, counts in columns)),
        }
        for title, run, x_key, columns in found
    ]


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    share: bool = False,
    reference: tuple[str, float] | None = None,
    width: int = 560,
    height: int = 280,
) -> dict[str, Any] | None:
    """A chart with its legend, or None where there is nothing to draw."""
    drawn = [one for one in series if one.points]
    if not drawn:
        return None
    broken = sum(not math.isfinite(y) for one in drawn for _, y in one.points)
    svg = charts.line_chart(
        drawn,
        title=title,
        x_label=x_label,
        y_format=charts.percent if share else charts.plain,
        y_range=(0.0, 1.0) if share else None,
        reference=reference,
        width=width,
        height=height,
    )
    legend = [
        {
            "name": one.name,
            "colour": charts.colour(one.slot),
            "dash": "" if one.strong else charts.DASHES[one.slot % len(charts.DASHES)],
        }
        for one in drawn
    ]
    return {
        "title": title,
        "svg": safe(svg),
        "legend": legend if len(drawn) > 1 else [],
        "broken": broken,
    }


def round_count(run: RunFolder) -> int:
    """Rounds in which the diagnosis saw something; one that was repeated counts once."""
    return len({(str(line.get("loop")), str(line.get("round"))) for line in _rounds(run)})


def _place(line: Mapping[str, Any], run: RunFolder, x_key: str) -> float:
    """Where an evaluation stands on an axis; its second may stand in another line of that step."""
    place = number(line.get(x_key))
    if math.isfinite(place) or x_key != "seconds":
        return place
    near = (other for other in run.metrics if other.get("step") == line.get("step"))
    return next((at for other in near if math.isfinite(at := number(other.get(x_key)))), math.nan)


def _rounds(run: RunFolder) -> list[Mapping[str, Any]]:
    return [line for line in run.metrics if line.get("kind") == "round"]


def _loops(lines: Sequence[Mapping[str, Any]]) -> int:
    """How many loops the lines come from; rounds are counted anew in each."""
    return len({str(line.get("loop")) for line in lines})
