"""What became of every item that a method looked at: provenance.jsonl and provenance.json.

The truth, where a source knows it, is put beside each item here, after the run: a method that
filters never sees it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vestige.core.filtering import Filtered, FiltersItems, Item, area_under_curve
from vestige.core.protocols import Source
from vestige.core.rows import KnowsParts, KnowsTexts
from vestige.core.transcripts import Normalize, normalizer
from vestige.training.clips import wave_base64
from vestige.training.files import write_json, write_lines

LINES, FACTS = "provenance.jsonl", "provenance.json"
# Items that the page shows, of each kind, and how many of them it plays.
_SHOWN, _HEARD, _SECONDS = 60, 24, 12.0
_BINS = 20


def write_provenance(
    out: Path, method: object, sources: Mapping[str, Source], task: object
) -> dict[str, Any]:
    """Write a line for each item, and what a page shows of them.

    Args:
        out: run folder.
        method: any; what it says of its items is read.
        sources: of the run; one of them may know the truth about its rows.
        task: of the run; says how texts are compared.

    Returns:
        By source or stage "counts", "chosen" and "filters", for summary.json; {} for a method that
        filters nothing, and then nothing is written.
    """
    if not isinstance(method, FiltersItems):
        return {}
    stages = {
        name: _Stage(found, sources.get(name), _comparing(task))
        for name, found in method.filtered().items()
    }
    if not stages:
        return {}
    write_lines(out / LINES, (line for name, one in stages.items() for line in one.lines(name)))
    facts = {name: one.facts() for name, one in stages.items()}
    write_json(out / FACTS, {"schema": 1, "stages": facts})
    return {name: _brief(one) for name, one in facts.items()}


def _brief(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the summary."""
    filters = {
        name: {key: value for key, value in about.items() if key != "histogram"}
        for name, about in facts["filters"].items()
    }
    keys = ("counts", "chosen", "known", "right", "known_kept", "right_kept")
    return {**{key: facts[key] for key in keys}, "filters": filters}


def _comparing(task: object) -> Normalize:
    """How texts of this task are compared: as it judges them, else by their words alone."""
    name = getattr(task, "normalizer", None)
    return normalizer(name) if isinstance(name, str) else lambda text: " ".join(text.split())  # type: ignore[arg-type]


class _Stage:
    """One stage of filtering, gone through once while its lines are written."""

    def __init__(self, found: Filtered, source: object, normal: Normalize) -> None:
        self._found, self._source, self._normal = found, source, normal
        self._scores: dict[str, list[float]] = {name: [] for name in found.filters}
        self._kept: list[bool] = []
        self._right: list[bool | None] = []
        self._shown: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        count = len(found.items)
        kept = int(found.counts.get("kept", 0))
        # Spread over all of them, as the first ones may be of one sort.
        self._every = {
            True: max(1, -(-kept // _SHOWN)),
            False: max(1, -(-(count - kept) // _SHOWN)),
        }
        self._met = {True: 0, False: 0}

    def lines(self, name: str) -> Iterator[str]:
        """A JSON object for each item."""
        for item in self._found.items:
            values = {
                "stage": name,
                "text": item.text,
                "kept": item.kept,
                "reason": item.reason,
                "scores": dict(item.scores),
                **item.about,
                **self._told(item),
            }
            self._note(item, values)
            yield json.dumps(values, ensure_ascii=False, allow_nan=False)

    def facts(self) -> dict[str, Any]:
        """What the page shows; after `lines`."""
        known = [row for row, right in enumerate(self._right) if right is not None]
        right = torch.tensor([bool(self._right[row]) for row in known])
        filters: dict[str, dict[str, Any]] = {}
        for name, about in self._found.filters.items():
            values = torch.tensor(self._scores[name], dtype=torch.float64)
            area = area_under_curve(values[known], right, about["better"]) if known else None
            filters[name] = {
                **about,
                "area_under_curve": area if area is not None else about.get("area_under_curve"),
                "histogram": self._histogram(values),
            }
        return {
            "counts": dict(self._found.counts),
            "chosen": self._found.chosen,
            "filters": filters,
            "known": len(known),
            "right": int(right.sum()) if known else None,
            "right_kept": sum(bool(self._right[row]) and self._kept[row] for row in known)
            if known
            else None,
            "known_kept": sum(self._kept[row] for row in known) if known else None,
            "kept": self._shown[True],
            "dropped": self._shown[False],
        }

    def _told(self, item: Item) -> dict[str, Any]:
        """What the source knows of an item's row, beyond what the method was told."""
        row = item.about.get("row")
        if not isinstance(row, int):
            return {}
        index, told = torch.tensor([row]), dict[str, Any]()
        if isinstance(self._source, KnowsTexts):
            truth = self._source.texts_of(index)[0]
            told = {"file": self._source.ids[row], "truth": truth}
            if truth is not None:
                told["right"] = self._normal(truth) == self._normal(item.text)
        if isinstance(self._source, KnowsParts) and len(self._source.parts) > 1:
            told["part"] = list(self._source.parts)[int(self._source.part_of(index)[0])]
        return told

    def _note(self, item: Item, values: Mapping[str, Any]) -> None:
        self._kept.append(item.kept)
        self._right.append(values.get("right"))
        for name, scores in self._scores.items():
            value = item.scores.get(name)
            scores.append(float("nan") if value is None else value)
        shown, met = self._shown[item.kept], self._met[item.kept]
        self._met[item.kept] += 1
        if met % self._every[item.kept] or len(shown) >= _SHOWN:
            return
        sound = {}
        if item.audio is not None and len(shown) < _HEARD:
            most = round(_SECONDS * item.sample_rate_hz)
            sound = {"audio": wave_base64(item.audio[:most], item.sample_rate_hz)}
        shown.append({**values, **sound})

    def _histogram(self, values: Any) -> dict[str, Any] | None:
        """How many of the kept and of the dropped have a score between two edges."""
        finite = values[torch.isfinite(values)]
        if not len(finite):
            return None
        low, high = float(finite.min()), float(finite.max())
        if high <= low:
            high = low + 1.0
        kept = torch.tensor(self._kept)
        counts = {
            name: _counts(values[chosen], low, high)
            for name, chosen in (("kept", kept), ("dropped", ~kept))
        }
        return {"low": low, "high": high, **counts}


def _counts(values: Any, low: float, high: float) -> Sequence[int]:
    finite = values[torch.isfinite(values)]
    return [int(count) for count in torch.histc(finite, _BINS, low, high).tolist()]
