"""What a run left in its folder, read as far as it goes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vestige.training.report.tables import mapping, sequence

_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class RunFolder:
    """What was found in a run folder.

    Attributes:
        name: of the folder.
        summary: `summary.json`, or empty.
        record: `run.json`, or empty.
        recipe: text of `recipe.yaml`, or empty.
        metrics: the readable lines of `metrics.jsonl`.
        samples: bytes of a whole `samples.png`, or None.
        arms: sub-runs under `arms/` by folder name.
        notes: one sentence for each thing that is missing or damaged.
        evaluation: `evaluation.json`, or empty.
        over_time: bytes of a whole `samples-over-time.png`, or None.
        answers: bytes of a whole `answers.png`, or None.
        selection: `selection.json`, or empty.
        selection_picture: bytes of a whole `selection.png`, or None.
        texts: `synthetic.json`, or empty.
        provenance: `provenance.json`, or empty.
        readings: `readings.json`, or empty.
        federation: `federated.json`, or empty.
    """

    name: str
    summary: Mapping[str, Any]
    record: Mapping[str, Any]
    recipe: str
    metrics: list[Mapping[str, Any]]
    samples: bytes | None
    arms: dict[str, "RunFolder"] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    over_time: bytes | None = None
    answers: bytes | None = None
    selection: Mapping[str, Any] = field(default_factory=dict)
    selection_picture: bytes | None = None
    texts: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    readings: Mapping[str, Any] = field(default_factory=dict)
    federation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> "RunFolder":
        """The arm that the run is known by, or the run itself."""
        for item in sequence(self.summary.get("arm_details")):
            row = mapping(item)
            if row.get("headline") is True:
                return self.arms.get(str(row.get("name")), self)
        return self


def read_run(folder: Path, *, sub_run: bool = False) -> RunFolder:
    """Read a run folder as far as it goes; never raises for what is missing or damaged."""
    notes: list[str] = []
    if not folder.is_dir():
        notes.append("The folder does not exist.")
        return RunFolder(folder.name, {}, {}, "", [], None, {}, notes)
    arms = {
        path.name: read_run(path, sub_run=True)
        for path in sorted((folder / "arms").glob("*"))
        if path.is_dir()
    }
    # In a run that only gathers arms, these are the arms' own.
    gathers = bool(arms)
    card = mapping(_read_json(folder / "student.json", [], needed=False).get("input"))
    unseen = card.get("kind", "image") != "image"
    federation = _read_json(folder / "federated.json", notes, needed=False)
    # Texts and audio are no picture, and clients show nothing of what they have.
    unseen = unseen or bool(federation)
    recipe = _read(folder / "recipe.yaml", notes, needed=not sub_run)
    return RunFolder(
        name=folder.resolve().name,
        summary=_read_json(folder / "summary.json", notes),
        record=_read_json(folder / "run.json", notes, needed=not sub_run),
        recipe=(recipe or b"").decode("utf-8", errors="replace"),
        metrics=_read_lines(folder / "metrics.jsonl", notes, needed=not gathers),
        samples=_read_png(folder / "samples.png", notes, needed=not (gathers or sub_run or unseen)),
        arms=arms,
        notes=notes,
        # Not every task and input has them, and older runs do not.
        evaluation=_read_json(folder / "evaluation.json", notes, needed=False),
        over_time=_read_png(folder / "samples-over-time.png", notes, needed=False),
        answers=_read_png(folder / "answers.png", notes, needed=False),
        selection=_read_json(folder / "selection.json", notes, needed=False),
        selection_picture=_read_png(folder / "selection.png", notes, needed=False),
        texts=_read_json(folder / "synthetic.json", notes, needed=False),
        provenance=_read_json(folder / "provenance.json", notes, needed=False),
        readings=_read_json(folder / "readings.json", notes, needed=False),
        federation=federation,
    )


def _read(path: Path, notes: list[str], *, needed: bool = True) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if needed:
            notes.append(f"{path.name} is missing.")
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
    return None


def _read_json(path: Path, notes: list[str], *, needed: bool = True) -> Mapping[str, Any]:
    content = _read(path, notes, needed=needed)
    if content is None:
        return {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    notes.append(f"{path.name} is damaged or cut off and was left out.")
    return {}


def _read_lines(path: Path, notes: list[str], *, needed: bool) -> list[Mapping[str, Any]]:
    content = _read(path, notes, needed=needed)
    lines: list[Mapping[str, Any]] = []
    damaged = 0
    for text in filter(bytes.strip, (content or b"").split(b"\n")):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            damaged += 1
    if damaged:
        plural = "line is" if damaged == 1 else "lines are"
        notes.append(f"{path.name}: {damaged} {plural} damaged or cut off; {len(lines)} were read.")
    return lines


def _read_png(path: Path, notes: list[str], *, needed: bool) -> bytes | None:
    content = _read(path, notes, needed=needed)
    if content is None or (content.startswith(_PNG_START) and content.endswith(_PNG_END)):
        return content
    notes.append(f"{path.name} is damaged or cut off and was left out.")
    return None
