"""How the student does on real test data, class by class and beside its teacher."""

import math
import re
from collections.abc import Sequence
from typing import Any

from vestige.training.report import charts, heat_charts, tables
from vestige.training.report.charts import Series
from vestige.training.report.page_curves import chart
from vestige.training.report.page_values import class_names, exact, safe
from vestige.training.report.run_folder import RunFolder
from vestige.training.report.tables import mapping, number, sequence

_ALL, _WORST, _BEST = 20, 10, 5
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_CASES = (
    ("both_right", "Both right"),
    ("student_alone_right", "Student right, teacher wrong"),
    ("teacher_alone_right", "Teacher right, student wrong"),
    ("same_wrong", "Both wrong, with the same answer"),
    ("different_wrong", "Both wrong, with different answers"),
)


def per_class(run: RunFolder, who: str) -> list[float]:
    """Scores of "student" or "teacher" by class; NaN where a class has nothing to judge on."""
    values = sequence(mapping(run.evaluation.get(who)).get("per_class"))
    return [number(value) for value in values]


def title_of(run: RunFolder) -> str:
    """What the scores by class are, at the head of their table."""
    return f"{tables.heading(tables.class_score(run.evaluation))} by class"


def classes_view(run: RunFolder) -> dict[str, Any] | None:
    """Everything the page shows of `evaluation.json`, or None where there is none.

    What is shown depends on the keys that are there, not on the task: counts may be of inputs or of
    pixels, and keys that nobody knows are left out.
    """
    student = per_class(run, "student")
    agreement = _agreement(run)
    if not any(map(math.isfinite, student)):
        return {**_asked(run), "agreement": agreement} if agreement else None
    teacher = _fitting(per_class(run, "teacher"), len(student))
    counted, counts = _counts(run)
    colours = sequence(run.evaluation.get("colours"))
    names = class_names(run, len(student))
    many = len(student) > _ALL
    order = worst_first(student)
    groups = (
        [
            ("Lowest", order[:_WORST]),
            ("Highest", sorted(order[-_BEST:], key=lambda index: (-student[index], index))),
        ]
        if many
        else [("", list(range(len(student))))]
    )

    def row(index: int) -> dict[str, Any]:
        count = counts[index] if index < len(counts) else (math.nan, "–")
        colour = str(colours[index]) if index < len(colours) else ""
        own = tables.format_share(student[index])
        return {
            "name": names[index],
            "student": exact(student[index], own),
            "teacher": exact(teacher[index], tables.format_share(teacher[index])),
            "count": exact(*count),
            "colour": colour if _COLOUR.fullmatch(colour) else "",
            "bar": safe(
                charts.bar(
                    student[index],
                    title=f"{names[index]}: {own}",
                    reference=teacher[index],
                    strong=True,
                )
            ),
        }

    return {
        **_asked(run),
        "title": title_of(run),
        "counted": counted,
        "scores": _scores(run),
        "classes": len(student),
        "has_teacher": any(map(math.isfinite, teacher)),
        "groups": [(title, [row(index) for index in rows]) for title, rows in groups],
        "curve": _sorted_curve(student, teacher) if many else None,
        "confusion": _confusion(run, names),
        "confused": _confused(run, names) if many else [],
        "agreement": agreement,
    }


def worst_first(values: Sequence[float]) -> list[int]:
    """Places by ascending value, those without one left out."""
    known = [index for index, value in enumerate(values) if math.isfinite(value)]
    return sorted(known, key=lambda index: (values[index], index))


def agreement_of(run: RunFolder) -> float:
    """Share of the test inputs, or pixels, that student and teacher give the same class, or NaN."""
    return number(mapping(run.evaluation.get("agreement")).get("share"))


def _asked(run: RunFolder) -> dict[str, Any]:
    """How many test inputs there were, and pixels where each was judged."""
    inputs, pixels = (number(run.evaluation.get(key)) for key in ("inputs", "pixels"))
    return {
        "inputs": exact(inputs, tables.format_count(inputs)),
        "pixels": exact(pixels, tables.format_count(pixels)) if math.isfinite(pixels) else None,
    }


def _counts(run: RunFolder) -> tuple[str, list[tuple[float, str]]]:
    """What each class is judged on: a heading, and numbers as machines and people read them."""
    pixels = [number(value) for value in sequence(run.evaluation.get("pixels_per_class"))]
    if pixels:
        # Their number says little; that a class is rare explains much.
        shares = charts.shares_of(pixels) or [math.nan] * len(pixels)
        return "Pixels", [(share, tables.format_share(share)) for share in shares]
    inputs = [number(value) for value in sequence(run.evaluation.get("inputs_per_class"))]
    return "Inputs" if inputs else "", [(value, tables.format_count(value)) for value in inputs]


def _scores(run: RunFolder) -> list[dict[str, Any]]:
    """Scores over all classes, where there are several; one alone is the headline already."""
    known = [mapping(run.evaluation.get(who)) for who in ("student", "teacher")]
    names = [name for name, value in known[0].items() if math.isfinite(number(value))]
    if len(names) < 2:
        return []
    rows = []
    for name in names:
        values = [number(one.get(name)) for one in known]
        cells = [exact(value, tables.format_score(value, name)) for value in values]
        rows.append({"name": tables.heading(name), "student": cells[0], "teacher": cells[1]})
    return rows


def _fitting(values: list[float], count: int) -> list[float]:
    return values if len(values) == count else [math.nan] * count


def _sorted_curve(student: Sequence[float], teacher: Sequence[float]) -> dict[str, Any] | None:
    """Both from their lowest class to their highest: what a table of a few classes cannot show."""
    series = []
    for slot, (name, values) in enumerate((("student", student), ("teacher", teacher))):
        ranked = sorted(value for value in values if math.isfinite(value))
        points = [(float(rank), value) for rank, value in enumerate(ranked, start=1)]
        series.append(Series(name, points, slot, strong=slot == 0))
    title = "All classes, each network’s from lowest to highest"
    return chart(title, series, x_label="class, by rank", share=True)


def _confusion(run: RunFolder, names: Sequence[str]) -> list[dict[str, Any]]:
    found = mapping(run.evaluation.get("confusion"))
    out = []
    for who in ("student", "teacher"):
        rows = [[number(value) for value in sequence(row)] for row in sequence(found.get(who))]
        if rows and len(rows) <= heat_charts.CONFUSION_CLASSES:
            in_shares = "pixels" in run.evaluation
            title = f"What the {who} answers, by true class"
            title += ", in percent of its pixels" if in_shares else ""
            svg = heat_charts.confusion(rows, title=title, names=names, in_shares=in_shares)
            out.append({"title": title, "svg": safe(svg)})
    return out


def _confused(run: RunFolder, names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for item in map(mapping, sequence(run.evaluation.get("confused"))):
        pair = [number(item.get(key)) for key in ("class", "taken_for")]
        if all(0 <= index < len(names) for index in pair):
            count = number(item.get("count"))
            first, second = (names[int(index)] for index in pair)
            rows.append(
                {
                    "class": first,
                    "taken_for": second,
                    "count": exact(count, tables.format_count(count)),
                }
            )
    return rows


def _agreement(run: RunFolder) -> dict[str, Any] | None:
    found, inputs = mapping(run.evaluation.get("agreement")), number(run.evaluation.get("inputs"))
    share = number(found.get("share"))
    if not math.isfinite(share):
        return None
    rows = []
    for key, title in _CASES if any(key in found for key, _ in _CASES) else ():
        count = number(found.get(key))
        part = count / inputs if inputs > 0 else math.nan
        rows.append(
            {
                "title": title,
                "count": exact(count, tables.format_count(count)),
                "share": exact(part, tables.format_share(part)),
                "bar": safe(
                    charts.bar(
                        part, title=f"{title}: {charts.percent(part)}", strong=key == "both_right"
                    )
                ),
            }
        )
    of = "pixels" if "pixels" in run.evaluation else "inputs"
    return {"share": exact(share, tables.format_share(share)), "of": of, "rows": rows}
