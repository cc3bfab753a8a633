"""The numbers of a `summary.json` as people read them, and as tables for the terminal.

A summary may come from a run that is not finished or from another version, so nothing in it is
taken for granted: a missing or malformed value reads as "–".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_NAMES = {"miou": "mIoU", "iou": "IoU", "auc": "AUC", "f1": "F1", "wer": "WER", "cer": "CER"}
# Errors per word or letter: shares that may be above one.
_ERROR_RATES = ("wer", "cer")
# What "per_class" of an evaluation holds, by the score of all classes that stands beside it.
_PER_CLASS = {"accuracy": "accuracy", "miou": "IoU"}
# What one input is called, and several, by its kind.
_INPUTS = {
    "image": ("image", "images"),
    "text": ("text", "texts"),
    "audio": ("recording", "recordings"),
}
_SHARES = ("accuracy", "agreement", "iou", "f1", "auc", "rate", "recall", "precision")
UNKNOWN = "–"


@dataclass(frozen=True)
class ArmRow:
    """One arm of a run; NaN and None stand for what was not recorded.

    `asked` are rows through the teacher, `asked_back` those of them that went back to its inputs.
    """

    name: str
    title: str
    score: float
    gap_closed: float
    seconds: float
    images_made: float
    real_images_read: float
    data_free: bool | None
    headline: bool
    asked: float = math.nan
    asked_back: float = math.nan

    @property
    def passes(self) -> str:
        """Rows through the teacher, forward + backward to its inputs, as people read them."""
        return format_passes(self.asked, self.asked_back)


def arm_rows(summary: Mapping[str, Any]) -> list[ArmRow]:
    """The arms of a summary in their order; those without details come last."""
    details = [mapping(item) for item in sequence(summary.get("arm_details"))]
    scores = mapping(summary.get("arms"))
    known = {str(item.get("name")): item for item in details if item.get("name") is not None}
    rows = []
    for name in [*known, *(name for name in scores if name not in known)]:
        item = known.get(name, {})
        score = number(item.get("score"))
        free = item.get("data_free")
        passes = mapping(item.get("teacher_passes"))
        rows.append(
            ArmRow(
                name=name,
                title=str(item.get("title") or name),
                score=number(scores.get(name)) if math.isnan(score) else score,
                gap_closed=number(item.get("gap_closed")),
                seconds=number(item.get("seconds")),
                images_made=number(item.get("images_made")),
                real_images_read=number(item.get("real_images_read")),
                data_free=free if isinstance(free, bool) else None,
                headline=item.get("headline") is True,
                asked=number(passes.get("forward")),
                asked_back=number(passes.get("backward")),
            )
        )
    return rows


def arms_table(summary: Mapping[str, Any]) -> "Table":
    """One line per arm, the headline arm in bold: the score and what it cost."""
    from rich.table import Table
    from rich.text import Text

    metric = str(summary.get("metric") or "score")
    table = Table(caption=_teacher_line(summary))
    table.add_column("arm", overflow="fold")
    for heading in (
        *(
            metric_name(metric),
            "gap closed",
            "seconds",
            "teacher passes",
            f"{input_words(summary)[1]} made",
            f"real {input_words(summary)[1]} read",
        ),
    ):
        table.add_column(heading, justify="right")
    for row in arm_rows(summary):
        # Text, not str: names may hold square brackets, which rich reads as mark-up.
        table.add_row(
            Text(row.title),
            format_score(row.score, metric),
            format_share(row.gap_closed),
            format_seconds(row.seconds),
            row.passes,
            format_count(row.images_made),
            format_count(row.real_images_read),
            style="bold" if row.headline else None,
        )
    return table


def result_table(summary: Mapping[str, Any]) -> "Table":
    """One line per figure of a single run: scores, sizes, time, memory, queries, real data."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    table.add_column("figure")
    table.add_column("value", justify="right", overflow="fold")
    for label, value in result_figures(summary):
        table.add_row(Text(label), Text(value))
    return table


def input_words(*summaries: Mapping[str, Any]) -> tuple[str, str]:
    """What one input of the runs is called, and what several are.

    Summaries of earlier versions tell no kind and are of images; what is of several kinds, or of
    one without a word of its own, is just inputs.
    """
    kinds = {str(summary.get("input_kind") or "image") for summary in summaries}
    return _INPUTS.get(kinds.pop() if len(kinds) == 1 else "", ("input", "inputs"))


def method_name(summary: Mapping[str, Any]) -> str:
    """The method with what was switched on, so that nobody takes it for the published one."""
    name, variant = str(summary.get("method") or UNKNOWN), str(summary.get("variant") or "")
    return f"{name} with {variant}" if variant else name


def result_figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of a single run that are known, each with its label, ready to show."""
    metric = str(summary.get("metric") or "score")
    name = metric_name(metric)
    teacher, student = mapping(summary.get("teacher")), mapping(summary.get("student"))
    plugins = [str(plugin) for plugin in sequence(summary.get("plugins"))]
    memory = number(summary.get("peak_memory_mib"))
    result, passes = mapping(summary.get("result")), mapping(summary.get("teacher_passes"))
    whose = "clients' mean" if is_personal(summary) else "student"
    figures = [
        ("method", " + ".join([method_name(summary), *plugins])),
        (f"{whose} {name}, last step", format_score(number(student.get("score")), metric)),
        (f"{whose} {name}, best step", format_score(number(student.get("best_score")), metric)),
        (f"teacher {name}", format_score(number(teacher.get("score")), metric)),
        ("student parameters", format_size(number(student.get("parameters")))),
        ("teacher parameters", format_size(number(teacher.get("parameters")))),
        ("steps", format_count(number(summary.get("steps")))),
        ("seconds", format_seconds(number(summary.get("seconds")))),
        ("peak memory", UNKNOWN if math.isnan(memory) else f"{memory:,.0f} MiB"),
        ("teacher queries", format_count(number(summary.get("teacher_queries")))),
        ("of them back to the inputs", format_count(number(passes.get("backward")))),
        (f"{input_words(summary)[1]} made", format_count(number(summary.get("images_made")))),
        ("result", str(result.get("path") or UNKNOWN)),
    ]
    if isinstance(summary.get("real_data"), list):
        records = sequence(summary["real_data"])
        names = sorted({record_name(record) for record in records if for_training(record)})
        figures.append(("real data read for training", ", ".join(names) or "none"))
    return [(label, value) for label, value in figures if value != UNKNOWN]


def is_personal(summary: Mapping[str, Any]) -> bool:
    """Whether each client of the run has a network of its own, and the score is their mean."""
    return mapping(summary.get("result")).get("kind") == "personal models"


def for_training(record: object) -> bool:
    """Whether a record of real data says, or leaves open, that a student was trained on it."""
    purpose = str(mapping(record).get("purpose") or "").strip().lower()
    return not purpose.startswith(("evaluat", "test"))


def record_name(record: object) -> str:
    """The name of a record of real data, which is a mapping or the bare name."""
    return str(record.get("name") or UNKNOWN) if isinstance(record, Mapping) else str(record)


def metric_name(metric: str) -> str:
    """A metric as people write it."""
    return _NAMES.get(metric.lower(), metric.replace("_", " "))


def heading(metric: str) -> str:
    """A metric at the head of a column."""
    name = metric_name(metric)
    return name if name != name.lower() else name.capitalize()


def class_score(evaluation: Mapping[str, Any]) -> str:
    """What the scores by class in an `evaluation.json` are; "score" where it does not say."""
    known = mapping(evaluation.get("student"))
    return next((name for key, name in _PER_CLASS.items() if key in known), "score")


def is_share(metric: str) -> bool:
    """Whether a metric is a share of one and reads best as a percentage."""
    return metric.lower() in _ERROR_RATES or any(word in metric.lower() for word in _SHARES)


def format_score(value: float, metric: str) -> str:
    """A score: "96.8 %" for shares in [0, 1], else four digits."""
    bounded = -1.0 <= value <= 1.0 or (metric.lower() in _ERROR_RATES and math.isfinite(value))
    if is_share(metric) and bounded:
        return format_share(value)
    return f"{value:.4g}" if math.isfinite(value) else UNKNOWN


def format_share(value: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else UNKNOWN


def format_count(value: float) -> str:
    """A whole number with thousands separated."""
    return f"{value:,.0f}" if math.isfinite(value) else UNKNOWN


def format_passes(forward: float, backward: float) -> str:
    """Rows forward through the teacher, and back to its inputs: 1,200 + 240; 1,200 where none."""
    there, back = format_count(forward), format_count(backward)
    return f"{there} + {back}" if backward > 0 else there


def format_size(value: float) -> str:
    """A number of parameters: 812, 3.6k, 24k, 11.2M."""
    if not math.isfinite(value):
        return UNKNOWN
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.{1 if value < 100 * size else 0}f}".removesuffix(".0") + unit
    return f"{value:.0f}"


def format_seconds(value: float) -> str:
    """Seconds with one decimal below 100."""
    if not math.isfinite(value):
        return UNKNOWN
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def interval_95(share: float, count: float) -> tuple[float, float]:
    """Wilson's interval for a share seen in `count` draws; NaN where either is not known."""
    if not (0 <= share <= 1 and count > 0 and math.isfinite(count)):
        return math.nan, math.nan
    z = 1.959964
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return max(0.0, (middle - reach) / whole), min(1.0, (middle + reach) / whole)


def number(value: object) -> float:
    """A number read from JSON, or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def mapping(value: object) -> Mapping[str, Any]:
    """A mapping read from JSON, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> list[Any]:
    """A list read from JSON, or an empty one."""
    return value if isinstance(value, list) else []


def _teacher_line(summary: Mapping[str, Any]) -> str | None:
    teacher = mapping(summary.get("teacher"))
    score = number(teacher.get("score"))
    if math.isnan(score):
        return None
    metric = str(summary.get("metric") or "score")
    return (
        f"teacher {format_score(score, metric)}, "
        f"{format_size(number(teacher.get('parameters')))} parameters"
    )
