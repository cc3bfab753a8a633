"""What the page shows about one run: the result first, then all that it rests on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vestige.training.report import charts, page_origins, tables
from vestige.training.report.page_classes import classes_view
from vestige.training.report.page_curves import (
    Parts,
    class_strips,
    has_places,
    round_chart,
    round_count,
    score_chart,
    term_charts,
)
from vestige.training.report.page_federation import federation_view
from vestige.training.report.page_filter import filter_view
from vestige.training.report.page_readings import mistakes_view, readings_view
from vestige.training.report.page_records import records_view
from vestige.training.report.page_selection import selection_view
from vestige.training.report.page_speech import speech_view
from vestige.training.report.page_values import (
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
from vestige.training.report.tables import UNKNOWN, ArmRow, mapping, number, sequence

# As the diagnosis itself: in fewer rounds it says nothing.
_ROUNDS_TO_JUDGE = 4


def run_view(run: RunFolder, *, name: str, anchor: str) -> dict[str, Any]:
    """Everything the template shows about one run."""
    metric = metric_of(run)
    rows = tables.arm_rows(run.summary)
    listed = {row.name for row in rows}
    rows += [_row_of(arm, key) for key, arm in run.arms.items() if key not in listed]
    rows.sort(key=lambda row: not row.headline)
    titles = {row.name: row.title for row in rows}
    parts = [(titles[row.name], run.arms[row.name]) for row in rows if row.name in run.arms]
    parts = parts if any(arm.metrics for _, arm in parts) else [("", run), *parts]
    headline = next((row for row in rows if row.headline), None)
    chosen = run.headline
    if chosen is run and not run.metrics and parts:
        chosen = parts[0][1]
    everyone = [
        ("", run),
        *((row.title, run.arms[row.name]) for row in rows if row.name in run.arms),
    ]
    teacher = score_of(run, "teacher")
    return {
        "name": name,
        "anchor": anchor,
        "is_pool": _is_pool(run),
        "sentence": _sentence(run, headline, metric),
        "notes": [*run.notes, *(f"{titles[k]}: {n}" for k, a in run.arms.items() for n in a.notes)],
        "note": str(run.summary.get("note") or ""),
        "stopped": _stopped(everyone),
        "figures": _figures(run, headline, metric),
        "metric": tables.heading(metric),
        "inputs": tables.input_words(run.summary)[1],
        "arms": [_arm_view(row, run, metric) for row in rows],
        "teacher": exact(teacher, tables.format_score(teacher, metric)),
        "sheets": _sheets(run, chosen, parts),
        "gallery": _gallery(run, parts),
        "over_time": _over_time(run, chosen),
        "readings": readings_view(run if run.readings else chosen),
        "mistakes": mistakes_view(run if run.evaluation else chosen),
        "selection": selection_view(run if run.selection else chosen),
        "records": records_view(run if run.texts else chosen),
        "filtered": filter_view(run if run.provenance else chosen),
        "federation": federation_view(run if run.federation else chosen),
        "speech": speech_view(run if run.evaluation else chosen),
        "curves": [
            made
            for x_key in ("step", "seconds")
            if has_places(parts, x_key) and (made := score_chart(parts, metric, teacher, x_key))
        ],
        "answers": _answers(run, chosen, parts),
        "classes": classes_view(run if run.evaluation else chosen),
        "agreement": round_chart(parts, "agreement", "Same answer as the teacher on new inputs"),
        "modes": round_chart(
            parts, "train_eval_agreement", "Same answer of the student in train and eval mode"
        ),
        "strips": class_strips(parts),
        "in_pixels": "pixels" in (run.evaluation or chosen.evaluation),
        "terms": term_charts(chosen),
        "terms_of": next((title for title, arm in parts if arm is chosen), ""),
        "warnings": sum(item["level"] == "warning" for item in _findings(chosen)),
        "verdict": _verdict(chosen),
        "diagnosis": [
            (title, found)
            for title, arm in everyone
            if (found := _findings(arm))
            # A run with arms repeats the findings of the arm that it is known by.
            and not (arm is run and chosen is not run and found == _findings(chosen))
        ],
        "real_data": page_origins.real_data(everyone),
        "real_data_known": records_of(run) is not None,
        "origins": page_origins.origins(run),
        "details": page_origins.details(run),
        "recipe": run.recipe,
    }


def _sentence(run: RunFolder, headline: ArmRow | None, metric: str) -> str:
    """The result in one sentence; what is not known is not claimed."""
    one, several = tables.input_words(run.summary)
    score = headline.score if headline else math.nan
    score = score if math.isfinite(score) else score_of(run, "student")
    if _is_pool(run):
        count = tables.format_count(number(mapping(run.summary.get("pool")).get("images")))
        clean = f"; no real {one} was read to make them" if _is_data_free(run, headline) else ""
        return f"A pool of {count} {several} was synthesised from the teacher{clean}."
    if not math.isfinite(score):
        return "This run has no score yet." if run.summary else "This run has no summary yet."
    size = tables.format_size(number(mapping(run.summary.get("student")).get("parameters")))
    who = f"A student with {size} parameters" if size != UNKNOWN else "The student"
    reached = f"{tables.format_score(score, metric)} test {tables.metric_name(metric)}"
    clauses = [f"{who} reaches {reached}"]
    if tables.is_personal(run.summary):
        each = f", {size} parameters each," if size != UNKNOWN else ""
        clauses = [f"The clients’ own networks{each} reach {reached} in the mean"]
    if math.isfinite(teacher := score_of(run, "teacher")):
        clauses.append(f"its teacher has {tables.format_score(teacher, metric)}")
    if _is_data_free(run, headline):
        clauses.append(f"no real {one} was read to train it")
    # A number and its percent sign stay on one line.
    return ("; ".join(clauses) + ".").replace(" %", "\u00a0%")


def _stopped(everyone: Parts) -> list[str]:
    """One sentence for each run whose budget ended it, so that its score is not its last word."""
    return [
        f"{title or 'This run'} was stopped by its budget at step "
        f"{tables.format_count(number(run.summary.get('steps')))}: its score is not that of a "
        "whole run."
        for title, run in everyone
        # A run of arms is not whole if one of them is not; that arm is named.
        if stopped_early(run) and not (run.arms and any(map(stopped_early, run.arms.values())))
    ]


def _is_data_free(run: RunFolder, headline: ArmRow | None) -> bool:
    """Whether every record that speaks of the shown student says that it saw no real data."""
    if headline is None:
        records = records_of(run)
        return records is not None and not any(map(tables.for_training, records))
    arm = run.arms.get(headline.name)
    records = [
        *(records_of(arm) or [] if arm else []),
        *(item for item in records_of(run) or [] if mapping(item).get("by") == headline.name),
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
    read = headline.real_images_read if headline else images_read(run)
    best = number(student.get("best_score"))
    interval = interval_of(run, score)
    _, several = tables.input_words(summary)
    figures = [
        (
            "Mean of clients" if tables.is_personal(summary) else "Student",
            score,
            tables.format_score(score, metric),
            f"test {tables.metric_name(metric)}, last step" + (f"; {interval}" if interval else ""),
        ),
        (
            "Teacher",
            number(teacher.get("score")),
            tables.format_score(number(teacher.get("score")), metric),
            f"test {tables.metric_name(metric)}",
        ),
        (
            "Student size",
            sizes[0],
            tables.format_size(sizes[0]),
            f"parameters, {tables.format_share(ratio)} of the teacher"
            if math.isfinite(ratio)
            else "parameters",
        ),
        (
            f"Real {several} read",
            read,
            tables.format_count(read),
            "to make this pool" if _is_pool(run) else "to train this student",
        ),
        ("Time", seconds, tables.format_seconds(seconds), "seconds"),
    ]
    if headline and math.isfinite(headline.gap_closed):
        note = "from baseline to reference arm"
        closed = tables.format_share(headline.gap_closed)
        figures.insert(2, ("Gap closed", headline.gap_closed, closed, note))
    # Clients who learn from one another alone have none, and of a stranger nothing is known.
    if "teacher" in summary and summary["teacher"] is None:
        figures = [one for one in figures if one[0] != "Teacher"]
    if not headline and math.isfinite(best):
        note = "picked on the test set, not a result"
        figures.insert(1, ("Best step", best, tables.format_score(best, metric), note))
    if _is_pool(run):
        figures = [one for one in figures if not one[0].startswith("Student")]
    pool = mapping(summary.get("pool"))
    if math.isfinite(images := number(pool.get("images"))):
        note = _diversity(mapping(pool.get("diversity")))
        figures.append(
            (f"{several.capitalize()} in the pool", images, tables.format_count(images), note)
        )
    return [
        {"label": label, "note": note, **exact(value, text)} for label, value, text, note in figures
    ]


def _is_pool(run: RunFolder) -> bool:
    """Whether the run's result is a pool of images and no student."""
    return mapping(run.summary.get("result")).get("kind") == "pool"


def _diversity(found: Mapping[str, Any]) -> str:
    """How the images of a pool differ, to the teacher; "" where nobody measured it."""
    distance, classes, repeats = (
        number(found.get(key)) for key in ("pairwise_distance", "effective_classes", "repeats")
    )
    if not all(map(math.isfinite, (distance, classes, repeats))):
        return ""
    return (
        f"to the teacher {classes:.1f} classes, mean distance {distance:.2f}, "
        f"{tables.format_share(repeats)} with a near repeat"
    )


def _arm_view(row: ArmRow, run: RunFolder, metric: str) -> dict[str, Any]:
    score = tables.format_score(row.score, metric)
    arm = run.arms.get(row.name)
    return {
        "title": row.title,
        "headline": row.headline,
        "data_free": row.data_free,
        "stopped": arm is not None and stopped_early(arm),
        "score": exact(row.score, score),
        "interval": interval_of(arm or run, row.score),
        "bar": safe(
            charts.bar(
                row.score,
                title=f"{row.title}: {score}",
                reference=score_of(run, "teacher"),
                strong=row.headline,
            )
            if tables.is_share(metric)
            else ""
        ),
        "gap_closed": exact(row.gap_closed, tables.format_share(row.gap_closed)),
        "seconds": exact(row.seconds, tables.format_seconds(row.seconds)),
        "asked": exact(row.asked, tables.format_count(row.asked)),
        "asked_back": exact(row.asked_back, tables.format_count(row.asked_back)),
        "made": exact(row.images_made, tables.format_count(row.images_made)),
        "real": exact(row.real_images_read, tables.format_count(row.real_images_read)),
    }


def _sheets(
    run: RunFolder, chosen: RunFolder, parts: Sequence[tuple[str, RunFolder]]
) -> list[dict[str, str]]:
    """The pictures, the shown student's first."""
    first = run.samples or chosen.samples
    found = [("", first)] if first else []
    found += [(title, arm.samples) for title, arm in parts if arm.samples and arm.samples != first]
    return [{"title": title, "uri": picture(data)} for title, data in found if data]


def _gallery(run: RunFolder, parts: Sequence[tuple[str, RunFolder]]) -> list[dict[str, str]]:
    """The pictures of all arms, each with its name; only of methods that are compared."""
    found = [(title, arm.samples) for title, arm in parts if title and arm.samples]
    if not run.summary.get("note") or len(found) < 2:
        return []
    return [{"title": title, "uri": picture(data)} for title, data in found if data]


def _answers(
    run: RunFolder, chosen: RunFolder, parts: Sequence[tuple[str, RunFolder]]
) -> list[dict[str, str]]:
    """What was answered to a few test inputs, by the shown student first."""
    first = run.answers or chosen.answers
    of = next((title for title, arm in parts if arm is chosen), "")
    found = [(of, first)] if first else []
    found += [(title, arm.answers) for title, arm in parts if arm.answers and arm.answers != first]
    return [{"title": title, "uri": picture(data)} for title, data in found if data]


def _over_time(run: RunFolder, chosen: RunFolder) -> str:
    data = run.over_time or chosen.over_time
    return picture(data) if data else ""


def _findings(run: RunFolder) -> list[dict[str, str]]:
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


def _verdict(run: RunFolder) -> str:
    """What no finding means: all well, or too short to tell."""
    if _findings(run) or not isinstance(run.summary.get("diagnosis"), list):
        return ""
    # Without a student there was nothing to measure, and with clients no teacher to follow.
    if _is_pool(run) or run.summary.get("federated"):
        return ""
    rounds = round_count(run)
    if not rounds:
        return "Nothing was measured: no student update told what teacher and student answered."
    if rounds < _ROUNDS_TO_JUDGE:
        return (
            f"{rounds} round{'s are' if rounds > 1 else ' is'} too few to judge; it takes at least "
            f"{_ROUNDS_TO_JUDGE}."
        )
    return (
        f"Nothing suspicious in {rounds} rounds: the inputs cover the classes and keep doing so, "
        "the student follows its teacher on them, and its two modes agree."
    )


def _row_of(arm: RunFolder, name: str) -> ArmRow:
    """An arm that the summary does not list, from its own folder."""
    return ArmRow(
        name,
        name,
        score_of(arm, "student"),
        math.nan,
        number(arm.summary.get("seconds")),
        math.nan,
        images_read(arm),
        None,
        False,
    )
