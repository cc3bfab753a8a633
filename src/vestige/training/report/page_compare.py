"""Several runs side by side: what differs between them, and what may be compared at all."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vestige.training.report import charts, page_origins, tables
from vestige.training.report.page_classes import agreement_of, per_class, title_of, worst_first
from vestige.training.report.page_curves import has_places, round_chart, score_chart
from vestige.training.report.page_values import (
    class_names,
    exact,
    images_read,
    interval_of,
    metric_of,
    picture,
    records_of,
    safe,
    score_of,
    stopped_early,
)
from vestige.training.report.run_folder import RunFolder
from vestige.training.report.tables import UNKNOWN, mapping, number, sequence

# Aliases make a short YAML file as large as one likes, or a circle; depth makes it slow.
_LARGEST_RECIPE, _MOST_ALIASES, _DEEPEST = 5000, 20, 40
_CLASSES = 20


def comparison_view(runs: Sequence[RunFolder], names: Sequence[str]) -> dict[str, Any]:
    """What is shown above several runs.

    Scores are measured against those of the first run: a run with another metric, another teacher
    or other test data is listed, says so and is left out of the common charts.
    """
    reasons = [not_comparable(run, runs[0], names[0]) for run in runs]
    alike = [
        (name, run.headline) for name, run, why in zip(names, runs, reasons, strict=True) if not why
    ]
    metric = metric_of(runs[0])
    rows = [
        _row(run, name, index, reasons[index])
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    teachers = {score_of(run, "teacher") for run, why in zip(runs, reasons, strict=True) if not why}
    teacher = teachers.pop() if len(teachers) == 1 else math.nan
    by_student = has_places(alike, "student_steps")
    return {
        "metric": tables.metric_name(metric) if len({metric_of(run) for run in runs}) == 1 else "",
        "heading": tables.heading(metric),
        "inputs": tables.input_words(*(run.summary for run in runs))[1],
        "rows": rows,
        "has_gaps": any(row["gap_closed"]["value"] for row in rows),
        "has_agreement": any(row["agreement"]["value"] for row in rows),
        "left_out": [name for name, why in zip(names, reasons, strict=True) if why],
        # Of a run with arms the one that is shown: its own settings, not those of all arms.
        "keys": differing_keys([run.headline.recipe or run.recipe for run in runs]),
        "names": list(names),
        "curves": [
            made
            for made in (
                score_chart(
                    alike, metric, teacher, x_key="student_steps" if by_student else "step"
                ),
                score_chart(alike, metric, teacher, x_key="seconds")
                if has_places(alike, "seconds")
                else None,
                round_chart(alike, "agreement", "Same answer as the teacher on new inputs"),
            )
            if made
        ],
        "sheets": [
            {"title": name, "uri": picture(data)}
            for name, run in zip(names, runs, strict=True)
            if (data := run.samples or run.headline.samples)
        ],
        "answers": [
            {"title": name, "uri": picture(data)}
            for name, run in zip(names, runs, strict=True)
            if (data := run.answers or run.headline.answers)
        ],
        "classes": _classes(alike),
    }


def not_comparable(run: RunFolder, first: RunFolder, name: str) -> list[str]:
    """Why the scores of two runs do not speak of the same thing; empty where they do."""
    if run is first:
        return []
    reasons = []
    if metric_of(run) != metric_of(first):
        judged = [tables.metric_name(metric_of(one)) for one in (run, first)]
        reasons.append(f"judged by {judged[0]}, {name} by {judged[1]}")
    teachers = [str(one.record.get("teacher_fingerprint") or "") for one in (run, first)]
    if "" in teachers:
        if teachers[0] != teachers[1] or score_of(run, "teacher") != score_of(first, "teacher"):
            reasons.append(f"that its teacher is the one of {name} is not recorded")
    elif teachers[0] != teachers[1]:
        reasons.append(f"another teacher than {name}")
    data = [_test_data(one) for one in (run, first)]
    if None in data:
        reasons.append(f"that its test data are those of {name} is not recorded")
    elif data[0] != data[1]:
        reasons.append(f"other test data than {name}")
    return reasons


def differing_keys(recipes: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Dotted keys whose values are not the same in all recipes, with the value in each.

    A recipe that cannot be read counts as one without keys.
    """
    flat = [dict(_flat(_own_settings(_read(text)))) for text in recipes]
    keys = dict.fromkeys(key for one in flat for key in one)
    values = {key: [one.get(key, UNKNOWN) for one in flat] for key in keys}
    return [(key, found) for key, found in values.items() if len(set(found)) > 1]


def _row(run: RunFolder, name: str, index: int, reasons: Sequence[str]) -> dict[str, Any]:
    summary, metric = run.summary, metric_of(run)
    headline = next((row for row in tables.arm_rows(summary) if row.headline), None)
    score = headline.score if headline else score_of(run, "student")
    seconds = headline.seconds if headline else number(summary.get("seconds"))
    read = headline.real_images_read if headline else images_read(run)
    gap = headline.gap_closed if headline else math.nan
    made, queries = number(summary.get("images_made")), number(summary.get("teacher_queries"))
    back = number(mapping(summary.get("teacher_passes")).get("backward"))
    agreement = agreement_of(run.headline if run.headline.evaluation else run)
    plugins = [str(plugin) for plugin in sequence(summary.get("plugins"))]
    bar = charts.bar(score, title=name, reference=score_of(run, "teacher"), strong=not reasons)
    return {
        "name": name,
        "anchor": f"run-{index}",
        "method": " + ".join([tables.method_name(summary), *plugins]),
        "metric": tables.metric_name(metric),
        "seed": page_origins.plain(summary.get("seed", UNKNOWN)),
        "reasons": list(reasons),
        "stopped": stopped_early(run),
        "score": exact(score, tables.format_score(score, metric)),
        "interval": interval_of(run, score),
        "bar": safe(bar if tables.is_share(metric) else ""),
        "teacher": exact(
            score_of(run, "teacher"), tables.format_score(score_of(run, "teacher"), metric)
        ),
        "gap_closed": exact(gap, tables.format_share(gap)),
        "agreement": exact(agreement, tables.format_share(agreement)),
        "steps": exact(
            number(summary.get("steps")), tables.format_count(number(summary.get("steps")))
        ),
        "queries": exact(queries, tables.format_count(queries)),
        "back": exact(back, tables.format_count(back)),
        "made": exact(made, tables.format_count(made)),
        "seconds": exact(seconds, tables.format_seconds(seconds)),
        "real": exact(read, tables.format_count(read)),
    }


def _test_data(run: RunFolder) -> tuple[Any, ...] | None:
    """What tells test data apart: their digests, or where there is none their name and size."""
    found = [
        mapping(item)
        for item in records_of(run) or []
        if isinstance(item, Mapping) and not tables.for_training(item)
    ]
    marks = [
        str(item.get("fingerprint") or "")
        or f"{item.get('name')} {item.get('images')} {page_origins.plain(item.get('split'))}"
        for item in found
    ]
    return tuple(sorted(marks)) if marks else None


def _classes(runs: Sequence[tuple[str, RunFolder]]) -> dict[str, Any] | None:
    """The score of each class in the runs that know it; of many those with the lowest mean."""
    known = [(name, run, values) for name, run in runs if (values := per_class(run, "student"))]
    if len(known) < 2 or len({len(values) for _, _, values in known}) > 1:
        return None
    count = len(known[0][2])
    means = [
        math.fsum(values[index] for *_, values in known) / len(known) for index in range(count)
    ]
    shown = list(range(count)) if count <= _CLASSES else worst_first(means)[:_CLASSES]
    names = class_names(known[0][1], count)
    rows = []
    for index in shown:
        cells = []
        for *_, values in known:
            value = values[index]
            shade = f"{100 * min(1.0, max(0.0, value)):.0f}" if math.isfinite(value) else ""
            cells.append({"shade": shade, **exact(value, tables.format_share(value))})
        rows.append({"name": names[index], "cells": cells})
    return {
        "title": title_of(known[0][1]),
        "names": [name for name, *_ in known],
        "rows": rows,
        "left_out": count - len(shown),
    }


def _read(text: str) -> object:
    import yaml

    try:
        aliases = depth = 0
        for event in yaml.parse(text):
            aliases += isinstance(event, yaml.AliasEvent)
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if aliases > _MOST_ALIASES or depth > _DEEPEST:
                return None
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None


def _own_settings(recipe: object) -> object:
    """A recipe whose `shared` settings, those of all arms, stand in its `config`, as they act."""
    found = mapping(recipe)
    shared, config = found.get("shared"), found.get("config")
    if not isinstance(shared, Mapping) or not isinstance(config, Mapping):
        return recipe
    rest = {key: value for key, value in found.items() if key != "shared"}
    return {**rest, "config": {**shared, **config}}


def _flat(value: object) -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as text; lists count as one value."""
    waiting = [("", value)]
    for _ in range(_LARGEST_RECIPE):
        if not waiting:
            return
        key, item = waiting.pop()
        if isinstance(item, Mapping) and item:
            waiting.extend(
                (f"{key}.{name}" if key else str(name), inner)
                for name, inner in reversed(list(item.items()))
            )
        elif key:
            # 0 and 0.0 are one setting.
            if isinstance(item, float) and item.is_integer() and abs(item) < 1e15:
                item = int(item)
            yield key, page_origins.plain(item)
