"""One self-contained HTML page about one or several runs.

`run_folder.read_run` takes whatever a run folder holds, `view` turns it into text, charts and
pictures, and `templates/report.html.j2` lays them out. A run that was cut off still has a page,
which says what is missing.
"""

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vestige.training import charts, tables
from vestige.training.charts import Series
from vestige.training.files import write_bytes
from vestige.training.run_folder import RunFolder, read_run
from vestige.training.tables import UNKNOWN, ArmRow, mapping, number, sequence

_TEMPLATES = Path(__file__).with_name("templates")


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write one HTML page about the runs in `folders`; several are compared.

    Args:
        folders: run folders; any file in them may be missing or cut off.
        out: file to write, or a folder that gets `report.html`.

    Returns:
        The file that was written.

    Raises:
        ValueError: no folder was given.
    """
    if not folders:
        raise ValueError("got no run folder, expected at least one; name the folders to report on")
    target = out / "report.html" if out.is_dir() else out
    page = render([read_run(Path(folder)) for folder in folders])
    # Lone surrogates are valid in JSON and not in UTF-8.
    write_bytes(target, page.encode("utf-8", errors="replace"))
    return target


def render(runs: Sequence[RunFolder]) -> str:
    """The page about `runs` as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = _unique([run.name for run in runs])
    views = [
        view(run, name=name, anchor=f"run-{i}")
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    return environment.get_template("report.html.j2").render(
        runs=views, comparison=_comparison(runs, names) if len(runs) > 1 else None
    )


def view(run: RunFolder, *, name: str, anchor: str) -> dict[str, Any]:
    """Everything the template shows about one run."""
    metric = str(run.summary.get("metric") or "accuracy")
    rows = tables.arm_rows(run.summary)
    listed = {row.name for row in rows}
    rows += [_row_of(arm, key) for key, arm in run.arms.items() if key not in listed]
    rows.sort(key=lambda row: not row.headline)
    titles = {row.name: row.title for row in rows}
    parts = [(titles[row.name], run.arms[row.name]) for row in rows if row.name in run.arms]
    parts = parts if any(arm.metrics for _, arm in parts) else [("", run), *parts]
    headline = next((row for row in rows if row.headline), None)
    chosen = run.arms.get(headline.name) if headline else None
    chosen = chosen or (run if run.metrics or not parts else parts[0][1])
    everyone = [
        ("", run),
        *((row.title, run.arms[row.name]) for row in rows if row.name in run.arms),
    ]
    return {
        "name": name,
        "anchor": anchor,
        "sentence": _sentence(run, headline, metric),
        "notes": [*run.notes, *(f"{titles[k]}: {n}" for k, a in run.arms.items() for n in a.notes)],
        "figures": _figures(run, headline, metric),
        "metric": metric,
        "arms": [_arm_view(row, run, metric) for row in rows],
        "teacher": _exact(
            _score(run, "teacher"), tables.format_score(_score(run, "teacher"), metric)
        ),
        "sheets": _sheets(run, chosen, parts),
        "curve": _score_chart(parts, metric, _score(run, "teacher")),
        "agreement": _round_chart(parts, "agreement", "Agreement with the teacher on new inputs"),
        "terms": [*_term_charts(chosen), *_mode_chart(chosen)],
        "terms_of": next((title for title, arm in parts if arm is chosen), ""),
        "strips": _strips(parts),
        "warnings": sum(item["level"] == "warning" for item in _diagnosis(chosen)),
        "diagnosis": [
            (title, found)
            for title, arm in everyone
            if (found := _diagnosis(arm))
            # A run with arms repeats the findings of the arm that it is known by.
            and not (arm is run and chosen is not run and found == _diagnosis(chosen))
        ],
        "real_data": _real_data(everyone),
        "real_data_known": _records(run) is not None,
        "fingerprints": sorted(set(_fingerprints(run.record))),
        "details": _details(run),
        "recipe": run.recipe,
    }


def _sentence(run: RunFolder, headline: ArmRow | None, metric: str) -> str:
    """The result in one sentence; what is not known is not claimed."""
    score = headline.score if headline else math.nan
    score = score if math.isfinite(score) else _score(run, "student")
    if not math.isfinite(score):
        return "This run has no score yet." if run.summary else "This run has no summary yet."
    size = tables.format_size(number(mapping(run.summary.get("student")).get("parameters")))
    who = f"A student with {size} parameters" if size != UNKNOWN else "The student"
    clauses = [f"{who} reaches {tables.format_score(score, metric)} test {_words(metric)}"]
    if math.isfinite(teacher := _score(run, "teacher")):
        clauses.append(f"its teacher has {tables.format_score(teacher, metric)}")
    if _is_data_free(run, headline):
        clauses.append("no real image was read to train it")
    # A number and its percent sign stay on one line.
    return ("; ".join(clauses) + ".").replace(" %", "\u00a0%")


def _is_data_free(run: RunFolder, headline: ArmRow | None) -> bool:
    """Whether every record that speaks of the shown student says that it saw no real data."""
    if headline is None:
        records = _records(run)
        return records is not None and not any(map(tables.for_training, records))
    arm = run.arms.get(headline.name)
    records = [
        *(_records(arm) or [] if arm else []),
        *(item for item in _records(run) or [] if mapping(item).get("by") == headline.name),
    ]
    clean = not any(map(tables.for_training, records))
    return clean and headline.data_free is True and headline.real_images_read == 0


def _figures(run: RunFolder, headline: ArmRow | None, metric: str) -> list[dict[str, str]]:
    summary = run.summary
    teacher, student = mapping(summary.get("teacher")), mapping(summary.get("student"))
    score = headline.score if headline else number(student.get("score"))
    sizes = [number(one.get("parameters")) for one in (student, teacher)]
    ratio = sizes[0] / sizes[1] if sizes[1] else math.nan
    seconds = headline.seconds if headline else number(summary.get("seconds"))
    read = headline.real_images_read if headline else _images_read(run)
    best = number(student.get("best_score"))
    figures = [
        ("Student", score, tables.format_score(score, metric), f"test {_words(metric)}, last step"),
        (
            "Teacher",
            number(teacher.get("score")),
            tables.format_score(number(teacher.get("score")), metric),
            f"test {_words(metric)}",
        ),
        (
            "Student size",
            sizes[0],
            tables.format_size(sizes[0]),
            f"parameters, {tables.format_share(ratio)} of the teacher"
            if math.isfinite(ratio)
            else "parameters",
        ),
        ("Real images read", read, tables.format_count(read), "to train this student"),
        ("Time", seconds, tables.format_seconds(seconds), "seconds"),
    ]
    if headline and math.isfinite(headline.gap_closed):
        figures.insert(
            2,
            (
                "Gap closed",
                headline.gap_closed,
                tables.format_share(headline.gap_closed),
                "from baseline to reference arm",
            ),
        )
    if not headline and math.isfinite(best):
        figures.insert(
            1,
            (
                "Best step",
                best,
                tables.format_score(best, metric),
                "picked on the test set, not a result",
            ),
        )
    return [
        {"label": label, "note": note, **_exact(value, text)}
        for label, value, text, note in figures
    ]


def _arm_view(row: ArmRow, run: RunFolder, metric: str) -> dict[str, Any]:
    score = tables.format_score(row.score, metric)
    return {
        "title": row.title,
        "headline": row.headline,
        "data_free": row.data_free,
        "score": _exact(row.score, score),
        "bar": _safe(
            charts.bar(
                row.score,
                title=f"{row.title}: {score}",
                reference=_score(run, "teacher"),
                strong=row.headline,
            )
            if tables.is_share(metric)
            else ""
        ),
        "gap_closed": _exact(row.gap_closed, tables.format_share(row.gap_closed)),
        "seconds": _exact(row.seconds, tables.format_seconds(row.seconds)),
        "real": _exact(row.real_images_read, tables.format_count(row.real_images_read)),
    }


def _sheets(
    run: RunFolder, chosen: RunFolder, parts: Sequence[tuple[str, RunFolder]]
) -> list[dict[str, str]]:
    """The pictures, the shown student's first."""
    first = run.samples or chosen.samples
    found = [("", first)] if first else []
    found += [(title, arm.samples) for title, arm in parts if arm.samples and arm.samples != first]
    return [
        {"title": title, "uri": "data:image/png;base64," + base64.b64encode(data).decode("ascii")}
        for title, data in found
        if data
    ]


def _score_chart(
    parts: Sequence[tuple[str, RunFolder]], metric: str, teacher: float
) -> dict[str, Any] | None:
    series = []
    for slot, (title, arm) in enumerate(parts):
        points = {
            number(line.get("step")): number(mapping(line.get("scores")).get(metric))
            for line in arm.metrics
            if line.get("kind") == "evaluation" and metric in mapping(line.get("scores"))
        }
        series.append(Series(title or "student", _in_order(points), slot, strong=slot == 0))
    share = tables.is_share(metric) and all(
        -0.001 <= y <= 1.001 for one in series for _, y in one.points if math.isfinite(y)
    )
    return _chart(
        f"Test {_words(metric)} over steps",
        series,
        x_label="step",
        share=share,
        reference=("teacher", teacher) if math.isfinite(teacher) else None,
    )


def _round_chart(
    parts: Sequence[tuple[str, RunFolder]],
    key: str,
    title: str,
    *,
    width: int = 560,
    height: int = 280,
) -> dict[str, Any] | None:
    series = []
    by_step = any(_loops(_rounds(arm)) > 1 for _, arm in parts)
    x_key = "step" if by_step else "round"
    for slot, (name, arm) in enumerate(parts):
        # Null where it was not measured in that round.
        points = {
            number(line.get(x_key)): number(line[key])
            for line in _rounds(arm)
            if line.get(key) is not None
        }
        series.append(Series(name or "student", _in_order(points), slot, strong=slot == 0))
    return _chart(title, series, x_label=x_key, share=True, width=width, height=height)


def _term_charts(run: RunFolder) -> list[dict[str, Any]]:
    """One small chart for each loss term of each role."""
    curves: dict[tuple[str, str], dict[float, float]] = {}
    for line in run.metrics:
        if line.get("kind") != "step":
            continue
        terms = mapping(line.get("terms"))
        # A total that is the only term again would be the same curve twice.
        values = {**terms, "total": line["total"]} if "total" in line and len(terms) != 1 else terms
        for term, value in values.items():
            curve = curves.setdefault((str(line.get("role") or ""), str(term)), {})
            curve[number(line.get("step"))] = number(value)
    out = []
    for (role, term), points in curves.items():
        name = " · ".join(filter(None, (role, term)))
        line_of = Series(name, _in_order(points), strong=True)
        made = _chart(name, [line_of], x_label="step", width=340, height=190)
        if made:
            out.append(made)
    return out


def _mode_chart(run: RunFolder) -> list[dict[str, Any]]:
    """How far the student depends on the batch that its BatchNorm sees."""
    title = "student · same answer in train and eval mode"
    made = _round_chart([("", run)], "train_eval_agreement", title, width=340, height=190)
    return [made] if made else []


def _strips(parts: Sequence[tuple[str, RunFolder]]) -> list[dict[str, Any]]:
    """One heat strip per run, all on one scale."""
    found = []
    for title, arm in parts:
        lines = [line for line in _rounds(arm) if sequence(line.get("classes"))]
        x_key = "step" if _loops(lines) > 1 else "round"
        columns = {
            number(line.get(x_key)): [number(count) for count in line["classes"]] for line in lines
        }
        if ordered := _in_order(columns):
            found.append((title, x_key, ordered))
    top = max(
        (
            max(charts.shares_of(counts), default=0.0)
            for _, _, columns in found
            for _, counts in columns
        ),
        default=0.0,
    )
    return [
        {
            "title": title,
            "svg": _safe(
                charts.heat_strip(
                    columns,
                    title=f"The teacher’s answers by class, {title or 'this run'}",
                    x_label=x_key,
                    top=top,
                )
            ),
            "even": charts.percent(1 / max(len(counts) for _, counts in columns)),
        }
        for title, x_key, columns in found
    ]


def _chart(
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
        "svg": _safe(svg),
        "legend": legend if len(drawn) > 1 else [],
        "broken": broken,
    }


def _diagnosis(run: RunFolder) -> list[dict[str, str]]:
    found = [mapping(item) for item in sequence(run.summary.get("diagnosis"))]
    messages = [
        {
            "level": "ok" if item.get("level") == "ok" else "warning",
            "code": str(item.get("code") or ""),
            "message": str(item.get("message") or item.get("code") or ""),
            "knob": str(item.get("knob") or ""),
        }
        for item in found
        if item
    ]
    return sorted(messages, key=lambda message: message["level"] == "ok")


def _real_data(everyone: Sequence[tuple[str, RunFolder]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for title, run in everyone:
        for item in _records(run) or []:
            record = mapping(item)
            images = number(record.get("images"))
            row = {
                "name": tables.record_name(item),
                "origin": str(record.get("origin") or UNKNOWN),
                "by": str(record.get("by") or title or UNKNOWN),
                "purpose": str(record.get("purpose") or "not stated"),
                "training": tables.for_training(item),
                "images": _exact(images, tables.format_count(images)),
                "fingerprint": str(record.get("fingerprint") or UNKNOWN),
            }
            if row not in rows:
                rows.append(row)
    return rows


def _details(run: RunFolder) -> list[dict[str, Any]]:
    """Machine, versions and command: what one needs to run it again."""
    record = run.record
    machine = mapping(record.get("machine"))
    versions = mapping(record.get("versions")) or mapping(run.summary.get("versions"))
    how = {
        "command": record.get("command"),
        "started": record.get("started"),
        "seed": record.get("seeds", record.get("seed", run.summary.get("seed"))),
        "device": run.summary.get("device"),
    }
    figures = dict(tables.result_figures(run.summary)) if run.summary else {}
    groups = [
        ("All figures", figures),
        ("Command", how),
        ("Machine", machine),
        ("Versions", versions),
    ]
    return [
        {
            "title": title,
            "rows": [(str(key), _plain(value)) for key, value in rows.items() if value is not None],
        }
        for title, rows in groups
        if any(value is not None for value in rows.values())
    ]


def _comparison(runs: Sequence[RunFolder], names: Sequence[str]) -> dict[str, Any]:
    """What is shown above several runs: one row each, and their curves together."""
    metrics = {str(run.summary.get("metric") or "accuracy") for run in runs}
    metric = metrics.pop() if len(metrics) == 1 else ""
    shown = []
    rows = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        arms = tables.arm_rows(run.summary)
        headline = next((row for row in arms if row.headline), None)
        own = metric or str(run.summary.get("metric") or "accuracy")
        score = headline.score if headline else _score(run, "student")
        seconds = headline.seconds if headline else number(run.summary.get("seconds"))
        read = headline.real_images_read if headline else _images_read(run)
        plugins = [str(plugin) for plugin in sequence(run.summary.get("plugins"))]
        rows.append(
            {
                "name": name,
                "anchor": f"run-{index}",
                "method": " + ".join([tables.method_name(run.summary), *plugins]),
                "metric": _words(own),
                "score": _exact(score, tables.format_score(score, own)),
                "bar": _safe(
                    charts.bar(score, title=name, reference=_score(run, "teacher"), strong=True)
                    if tables.is_share(own)
                    else ""
                ),
                "teacher": _exact(
                    _score(run, "teacher"), tables.format_score(_score(run, "teacher"), own)
                ),
                "seconds": _exact(seconds, tables.format_seconds(seconds)),
                "real": _exact(read, tables.format_count(read)),
            }
        )
        source = run.arms.get(headline.name) if headline else None
        shown.append((name, source or run))
    teachers = {_score(run, "teacher") for run in runs}
    return {
        "metric": _words(metric) if metric else "",
        "rows": rows,
        "curve": _score_chart(shown, metric, teachers.pop() if len(teachers) == 1 else math.nan)
        if metric
        else None,
        "agreement": _round_chart(shown, "agreement", "Agreement with the teacher on new inputs"),
    }


def _records(run: RunFolder) -> list[Any] | None:
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


def _images_read(run: RunFolder) -> float:
    records = _records(run)
    if records is None:
        return math.nan
    # A record without a count makes the sum unknown, as NaN does.
    return math.fsum(
        number(mapping(item).get("images")) for item in records if tables.for_training(item)
    )


def _fingerprints(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every fingerprint in a record with where it stands, those of real data left out."""
    for key, item in mapping(value).items():
        here = f"{path} {key}".strip()
        if key == "real_data":
            continue
        if isinstance(item, Mapping):
            yield from _fingerprints(item, here)
        elif isinstance(item, str) and ("fingerprint" in here or "sha256" in here):
            words = here.replace("fingerprints", "").replace("fingerprint", "").replace("_", " ")
            yield " ".join(words.split()) or "run", item


def _row_of(arm: RunFolder, name: str) -> ArmRow:
    """An arm that the summary does not list, from its own folder."""
    return ArmRow(
        name,
        name,
        _score(arm, "student"),
        math.nan,
        number(arm.summary.get("seconds")),
        math.nan,
        _images_read(arm),
        None,
        False,
    )


def _rounds(run: RunFolder) -> list[Mapping[str, Any]]:
    return [line for line in run.metrics if line.get("kind") == "round"]


def _loops(lines: Sequence[Mapping[str, Any]]) -> int:
    """How many loops the lines come from; rounds are counted anew in each."""
    return len({str(line.get("loop")) for line in lines})


def _in_order(points: Mapping[float, Any]) -> list[tuple[float, Any]]:
    """Points by ascending x, those without a place left out."""
    return sorted((x, y) for x, y in points.items() if math.isfinite(x))


def _score(run: RunFolder, who: str) -> float:
    return number(mapping(run.summary.get(who)).get("score"))


def _exact(value: float, text: str) -> dict[str, str]:
    """A number for people beside the same number for machines."""
    return {"value": repr(value) if math.isfinite(value) else "", "text": text}


def _safe(svg: str) -> Any:
    """Mark a chart as escaped already; `charts` escapes every text it is given."""
    from markupsafe import Markup

    return Markup(svg)


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _unique(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]
