"""Texts that the student learned from and got wrong, as the page shows them."""

from typing import Any

from vestige.training.report.run_folder import RunFolder
from vestige.training.report.tables import mapping, sequence


def readings_view(run: RunFolder) -> list[dict[str, Any]]:
    """What it learned from, by the class that the teacher saw; nothing where there is no text."""
    found = [mapping(one) for one in sequence(run.readings.get("classes"))]
    shown = [
        {
            "class": str(one.get("class")),
            "texts": [str(text) for text in sequence(one.get("texts"))],
        }
        for one in found
    ]
    return [one for one in shown if one["texts"]]


def mistakes_view(run: RunFolder) -> list[dict[str, str]]:
    """Test texts that the student got wrong, with everybody's answer."""
    names = [str(name) for name in sequence(run.evaluation.get("classes"))]

    def named(value: Any) -> str:
        if isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        return "" if value is None else str(value)

    return [
        {
            "text": str(one.get("text")),
            **{who: named(one.get(who)) for who in ("truth", "teacher", "student")},
        }
        for one in map(mapping, sequence(run.evaluation.get("texts")))
    ]
