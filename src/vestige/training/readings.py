"""What a student learned from, where it is no picture: texts to read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vestige.core.protocols import ReadsInputs, Task
from vestige.training.files import write_json
from vestige.training.outcome import Outcome

_EACH = 6
_CLASSES = 20


def write_readings(
    out: Path, outcome: Outcome, task: Task, teacher: Any, classes: Sequence[str]
) -> bool:
    """readings.json, schema 1: the latest inputs by the class that the teacher saw in them.

    At most 6 of each of the 20 classes with the most inputs.

    Args:
        out: run folder.
        outcome: with the latest inputs.
        task: that may know how to read them.
        teacher: the network that they were made for.
        classes: names, or ().

    Returns:
        False if there is nothing to read; then nothing is written.
    """
    if outcome.samples is None or not isinstance(task, ReadsInputs):
        return False
    inputs, answers = outcome.samples
    texts = task.readings(inputs, teacher)
    found: dict[int, list[str]] = {}
    for text, answer in zip(texts, answers.tolist(), strict=True):
        found.setdefault(int(answer), []).append(text)
    most = sorted(found, key=lambda label: (-len(found[label]), label))[:_CLASSES]
    shown = [
        {
            "class": classes[label] if 0 <= label < len(classes) else str(label),
            "inputs": len(found[label]),
            "texts": found[label][-_EACH:],
        }
        for label in sorted(most)
    ]
    write_json(out / "readings.json", {"schema": 1, "classes": shown})
    return True
