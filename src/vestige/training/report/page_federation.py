"""Clients and rounds as the page shows them: who holds what, what is sent, and how each fares."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vestige.errors import ShapeError
from vestige.training.holdings import checked, figures, has_room, holdings_picture
from vestige.training.pictures import png
from vestige.training.report import charts, tables
from vestige.training.report.charts import Series
from vestige.training.report.holding_charts import holdings
from vestige.training.report.page_curves import chart
from vestige.training.report.page_values import exact, picture, safe
from vestige.training.report.run_folder import RunFolder
from vestige.training.report.tables import UNKNOWN, mapping, number, sequence

_LOWEST = 5
_STRIP_CLASSES = 24
_SCORES = (
    ("mean", "Mean of clients", "every client counts the same"),
    ("worst_decile", "Lowest tenth", "mean of the clients that fare worst"),
    ("std", "Spread", "standard deviation of clients"),
    ("jain", "Jain’s index", "1 where all clients are equal"),
)


def federation_view(run: RunFolder) -> dict[str, Any] | None:
    """Everything the page shows of `federated.json`; None where there is nothing to show."""
    found = run.federation
    ends = [mapping(item) for item in sequence(found.get("clients_at_end"))]
    table = _table(found)
    view = {
        "holdings": _holdings(found, table),
        "rounds": _rounds(found),
        "leaves": [_leaf(mapping(item)) for item in sequence(found.get("leaves")) if mapping(item)],
        "numbers": ", ".join(_words(item) for item in sequence(found.get("numbers"))),
        "scores": _scores(mapping(found.get("scores"))),
        "last": _last(mapping(found.get("last_rounds")), tables.is_personal(run.summary)),
        "accuracies": _accuracies(ends, mapping(found.get("scores"))),
        "lowest": _lowest(ends, table),
    }
    return {"sentence": _sentence(found), **view} if any(view.values()) else None


def _sentence(found: Mapping[str, Any]) -> str:
    clients, holds = number(found.get("clients")), mapping(found.get("holds"))
    told = f"{tables.format_count(clients)} clients" if math.isfinite(clients) else "Clients"
    if engine := found.get("engine"):
        told += f", on the engine {_words(engine)}"
    settings = [
        f"{_words(key)} {value}"
        for key, value in holds.items()
        if key not in ("partition", "classes", "counts")
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    ]
    if partition := holds.get("partition"):
        told += f". Examples were dealt out by {partition}"
        told += f" ({', '.join(settings)})" if settings else ""
    return told + "."


def _table(found: Mapping[str, Any]) -> Any:
    """Counts (clients, C), or None where they are not a whole table."""
    try:
        return checked(sequence(mapping(found.get("holds")).get("counts")))
    except ShapeError:
        return None


def _holdings(found: Mapping[str, Any], table: Any) -> dict[str, Any] | None:
    if table is None:
        return None
    names = [str(name) for name in sequence(mapping(found.get("holds")).get("classes"))]
    facts = figures(table)
    equal = facts["least"] == facts["most"]
    whole, least, most, median = (
        tables.format_count(facts[key]) for key in ("examples", "least", "most", "median")
    )
    told = f"{whole} examples, "
    told += f"{least} at each client." if equal else f"from {least} to {most} at a client, "
    told += "" if equal else f"{median} in the middle."
    if facts["empty"]:
        have = "client has" if facts["empty"] == 1 else "clients have"
        told += f" {tables.format_count(facts['empty'])} {have} none."
    if facts["examples"]:
        told += (
            f" On average a client has some of {facts['classes']:.1f} classes, as mixed as "
            f"{facts['effective_classes']:.1f} in equal parts; its largest is "
            f"{tables.format_share(facts['main_share'])} of what it holds."
        )
    bubbles = has_room(table)
    # A line of a heat strip is no thinner, so that many classes need a picture of their own.
    strip = bubbles or table.shape[1] <= _STRIP_CLASSES
    title = "Examples by client and class"
    ranked = sorted(table.sum(1).tolist(), reverse=True)
    sizes = [Series("examples", [(rank, size) for rank, size in enumerate(ranked, start=1)])]
    return {
        "sentence": told,
        "svg": safe(holdings(table, title=title, names=names)) if strip else "",
        "uri": "" if strip else picture(png(holdings_picture(table, names))),
        "bubbles": bubbles,
        # Bubbles stand under bars that say the same.
        "sizes": None
        if bubbles or equal
        else chart("Examples of a client, from most to least", sizes, x_label="client, by rank"),
    }


def _rounds(found: Mapping[str, Any]) -> dict[str, Any] | None:
    lines = [mapping(item) for item in sequence(found.get("rounds")) if mapping(item)]
    if not lines:
        return None
    count = len(lines)
    reasons: dict[str, float] = {}
    for line in lines:
        for reason, value in mapping(line.get("rejected")).items():
            reasons[str(reason)] = reasons.get(str(reason), 0.0) + number(value)
    rows = [_row("Clients asked", _sum(lines, "asked"), count)]
    rows.append(_row("Answers that counted", _sum(lines, "answered"), count))
    rows += [_row(f"Rejected: {_words(reason)}", total, count) for reason, total in reasons.items()]
    rows.append(_row("Bytes to clients", _sum(lines, "bytes_down"), count, size_of))
    rows.append(_row("Bytes from clients", _sum(lines, "bytes_up"), count, size_of))
    rows.append(_row("Seconds", _sum(lines, "seconds"), count, tables.format_seconds))
    void = sum(line.get("void") is True for line in lines)
    told = f"{tables.format_count(count)} round{'s' if count > 1 else ''}"
    told += f", {void} of them void: too few answered, and all stayed as it was" if void else ""
    return {"sentence": told + ".", "rows": rows}


def _row(name: str, total: float, rounds: int, words: Any = tables.format_count) -> dict[str, Any]:
    mean = total / rounds
    # What is rare must not read as never.
    each = f"{mean:.3g}" if mean < 100 and words is not size_of else words(mean)
    return {"name": name, "total": exact(total, words(total)), "mean": exact(mean, each)}


def _leaf(item: Mapping[str, Any]) -> dict[str, Any]:
    arrays, size = number(item.get("arrays")), number(item.get("bytes"))
    return {
        "kind": _words(item.get("kind") or UNKNOWN),
        "group": _words(item.get("group") or UNKNOWN),
        "arrays": exact(arrays, tables.format_count(arrays)),
        "bytes": exact(size, size_of(size)),
    }


def _scores(found: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"label": label, "note": note, **exact(value, _score(key, value))}
        for key, label, note in _SCORES
        if math.isfinite(value := number(found.get(key)))
    ]


def _score(key: str, value: float) -> str:
    if key == "jain":
        return f"{value:.3f}"
    return f"{100 * value:.1f} points" if key == "std" else tables.format_share(value)


def _last(found: Mapping[str, Any], personal: bool) -> str:
    """The mean of the last evaluations in words; it is not picked, as the best of them would be."""
    rounds = number(found.get("rounds"))
    told = [
        f"test {tables.metric_name(str(name))} {tables.format_score(number(value), str(name))}"
        for name, value in found.items()
        if name != "rounds" and math.isfinite(number(value))
    ]
    if not told or not math.isfinite(rounds):
        return ""
    over = f"the last {rounds:.0f} evaluations" if rounds != 1 else "the last evaluation"
    whose = "the clients’ own networks" if personal else "the global network"
    return f"Mean of {whose} over {over}: {', '.join(told)}."


def _accuracies(
    ends: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]
) -> dict[str, Any] | None:
    series = []
    for slot, (key, name) in enumerate(
        (("accuracy", "accuracy"), ("balanced_accuracy", "mean over its classes"))
    ):
        known = [value for item in ends if _is_share(value := number(item.get(key)))]
        values = sorted(known, reverse=True)
        points = [(float(rank), value) for rank, value in enumerate(values, start=1)]
        series.append(Series(name, points, slot, strong=slot == 0))
    mean = number(scores.get("mean"))
    return chart(
        "Each client on its own test part, from highest to lowest",
        series,
        x_label="client, by rank",
        share=True,
        reference=("mean", mean) if _is_share(mean) else None,
    )


def _lowest(ends: Sequence[Mapping[str, Any]], table: Any) -> list[dict[str, Any]]:
    """The clients that fare worst, with what they hold."""
    known = [item for item in ends if _is_share(number(item.get("accuracy")))]
    rows = []
    for item in sorted(known, key=lambda item: number(item.get("accuracy")))[:_LOWEST]:
        client, accuracy = number(item.get("partition")), number(item.get("accuracy"))
        train, test = number(item.get("examples")), number(item.get("test_examples"))
        classes = math.nan
        if table is not None and 0 <= client < len(table):
            classes = float((table[int(client)] > 0).sum())
        rows.append(
            {
                "name": tables.format_count(client),
                "accuracy": exact(accuracy, tables.format_share(accuracy)),
                "bar": safe(charts.bar(accuracy, title=f"client {client:.0f}")),
                "examples": exact(train, tables.format_count(train)),
                "test_examples": exact(test, tables.format_count(test)),
                "classes": exact(classes, tables.format_count(classes)),
            }
        )
    return rows


def size_of(value: float) -> str:
    """Bytes as people read them, in powers of 1,000: 812 B, 106 kB, 1.2 GB."""
    if not math.isfinite(value):
        return UNKNOWN
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.{1 if value < 100 * size else 0}f} {unit}"
    return f"{value:.0f} B"


def _sum(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    """NaN where a round does not say."""
    return math.fsum(number(line.get(key)) for line in lines)


def _is_share(value: float) -> bool:
    return 0 <= value <= 1


def _words(value: object) -> str:
    return str(value).replace("_", " ")
