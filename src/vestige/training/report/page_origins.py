"""Where everything comes from: real data, teacher, machine, versions, command."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vestige.training.report import tables
from vestige.training.report.page_values import exact, records_of
from vestige.training.report.run_folder import RunFolder
from vestige.training.report.tables import UNKNOWN, mapping, number


def real_data(everyone: Sequence[tuple[str, RunFolder]]) -> list[dict[str, Any]]:
    """One row for each thing that was read: what, by whom, for what, how much of it."""
    rows: list[dict[str, Any]] = []
    for title, run in everyone:
        for item in records_of(run) or []:
            record = mapping(item)
            images = number(record.get("images"))
            row = {
                "name": tables.record_name(item),
                "origin": str(record.get("origin") or UNKNOWN),
                "by": str(record.get("by") or title or UNKNOWN),
                "purpose": str(record.get("purpose") or "not stated"),
                "training": tables.for_training(item),
                "images": exact(images, tables.format_count(images)),
                "fingerprint": str(record.get("fingerprint") or UNKNOWN),
            }
            if row not in rows:
                rows.append(row)
    return rows


def origins(run: RunFolder) -> list[tuple[str, str, bool]]:
    """Label, text and whether it is a digest: the teacher's past and every fingerprint."""
    trained_on = str(run.record.get("teacher_trained_on") or "")
    told = [("teacher trained on, by its card", trained_on, False)] if trained_on else []
    return told + [(key, value, True) for key, value in sorted(set(_fingerprints(run.record)))]


def details(run: RunFolder) -> list[dict[str, Any]]:
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
        (
            f"{tables.input_words(run.summary)[1].capitalize()} that were decoded",
            dict(_decoded(record)),
        ),
        ("Command", how),
        ("Machine", machine),
        ("Versions", versions),
    ]
    return [
        {
            "title": title,
            "rows": [(str(key), plain(value)) for key, value in rows.items() if value is not None],
        }
        for title, rows in groups
        if any(value is not None for value in rows.values())
    ]


def _decoded(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each source of images, or each part of it, with what it holds and what was left out."""
    for name, about in mapping(record.get("sources")).items():
        parts = mapping(mapping(about).get("parts"))
        for part, told in parts.items():
            yield f"{name}: {part}", _images(mapping(told))
        if not parts and mapping(about).get("data"):
            yield str(name), _images(mapping(about))


def _images(about: Mapping[str, Any]) -> str:
    rows, skipped = number(about.get("rows")), number(about.get("skipped"))
    told = [f"{tables.format_count(rows)} of {about.get('data')}"]
    if skipped > 0:
        first = "; ".join(map(str, tables.sequence(about.get("first_skipped"))))
        files = "1 file" if skipped == 1 else f"{tables.format_count(skipped)} files"
        told.append(f"{files} left out ({first})")
    if shift := tables.sequence(about.get("shift")):
        told.append(f"shifted by {', '.join(map(str, shift))}")
    return ", ".join(told)


def plain(value: object) -> str:
    """A value of a record as text."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        return UNKNOWN


def _fingerprints(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every fingerprint in a record with where it stands, those of real data left out."""
    for key, item in mapping(value).items():
        here = f"{path} {key}".strip()
        if key == "real_data":
            continue
        if isinstance(item, Mapping):
            yield from _fingerprints(item, here)
        elif isinstance(item, str) and item and ("fingerprint" in here or "sha256" in here):
            words = here.replace("fingerprints", "").replace("_", " ")
            yield " ".join(words.split()) or "run", item
