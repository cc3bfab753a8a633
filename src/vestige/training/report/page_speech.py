"""How a student writes down real test recordings, beside its teacher."""

import math
from typing import Any

from vestige.training.report import tables
from vestige.training.report.page_values import exact
from vestige.training.report.run_folder import RunFolder
from vestige.training.report.tables import mapping, number, sequence

_SCORES = ("wer", "cer", "exact")
_NAMES = {"exact": "Without an error"}


def speech_view(run: RunFolder) -> dict[str, Any] | None:
    """What the page shows of transcripts in `evaluation.json`, or None where there are none."""
    utterances = [mapping(one) for one in sequence(run.evaluation.get("utterances"))]
    if not utterances:
        return None
    scores = {who: mapping(run.evaluation.get(who)) for who in ("student", "teacher")}
    inputs, words = (number(run.evaluation.get(key)) for key in ("inputs", "words"))
    agreement = number(run.evaluation.get("same_text"))
    return {
        "inputs": exact(inputs, tables.format_count(inputs)),
        "words": exact(words, tables.format_count(words)),
        "normalizer": str(run.evaluation.get("normalizer") or ""),
        "agreement": exact(agreement, tables.format_share(agreement))
        if math.isfinite(agreement)
        else None,
        "has_teacher": bool(scores["teacher"]),
        "scores": [
            {
                "name": _NAMES.get(name) or tables.heading(name),
                **{who: _rate(values.get(name)) for who, values in scores.items()},
            }
            for name in _SCORES
        ],
        "utterances": [
            {
                "truth": str(one.get("truth") or ""),
                "student": str(one.get("student") or ""),
                "teacher": str(one.get("teacher") or ""),
                "student_wer": _rate(one.get("student_wer")),
                "teacher_wer": _rate(one.get("teacher_wer")),
            }
            for one in utterances
        ],
    }


def _rate(value: object) -> dict[str, str]:
    found = number(value)
    return exact(found, tables.format_share(found))
