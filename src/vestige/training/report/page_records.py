"""The texts that a run wrote, as the page shows them."""

import math
from collections.abc import Mapping
from typing import Any

from vestige.training.report import tables
from vestige.training.report.page_values import exact
from vestige.training.report.run_folder import RunFolder
from vestige.training.report.tables import mapping, number, sequence


def records_view(run: RunFolder) -> dict[str, Any] | None:
    """Counts by label, reasons for drops, quality and a few texts; None where none were written."""
    card = run.texts
    if not mapping(card.get("counts")):
        return None
    counts = {str(label): mapping(one) for label, one in mapping(card.get("counts")).items()}
    reasons = sorted({str(reason) for one in counts.values() for reason in mapping(_drops(one))})
    quality = mapping(card.get("quality"))
    bleu = mapping(quality.get("self_bleu"))
    return {
        "sentence": _sentence(card, counts),
        "reasons": reasons,
        "labels": [
            {
                "name": label or "contexts",
                "asked": _count(one.get("asked")),
                "kept": _count(one.get("kept")),
                "dropped": [_count(mapping(_drops(one)).get(reason, 0)) for reason in reasons],
            }
            for label, one in counts.items()
        ],
        "quality": [
            *(
                {"name": f"Self-BLEU {order}", **_share(value)}
                for order, value in sorted((str(k), number(v)) for k, v in bleu.items())
            ),
            *(
                {"name": f"distinct {order}-grams", **_share(number(value))}
                for order, value in mapping(quality.get("distinct")).items()
            ),
            {"name": "balance of the labels", **_share(number(quality.get("balance")))},
            *_correctness(mapping(quality.get("correctness"))),
            {"name": "mean words", **_plain(number(mapping(quality.get("words")).get("mean")))},
        ],
        "examples": [
            {"label": str(label), "texts": [str(text) for text in sequence(texts)]}
            for label, texts in mapping(card.get("examples")).items()
        ],
    }


def _sentence(card: Mapping[str, Any], counts: Mapping[str, Mapping[str, Any]]) -> str:
    asked = sum(number(one.get("asked")) for one in counts.values())
    kept = sum(number(one.get("kept")) for one in counts.values())
    share = tables.format_share(kept / asked) if asked else tables.UNKNOWN
    taught = str(card.get("teacher_trained_on") or "")
    return (
        f"{tables.format_count(number(card.get('texts')))} texts were kept of "
        f"{tables.format_count(asked)} that the teacher wrote ({share}); they are in "
        "synthetic.jsonl, and how they came about is in synthetic.json."
        + (f" The teacher was itself trained on {taught}." if taught else "")
    )


def _correctness(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows on the labels; none where nobody judged them."""
    agreement, judge = number(found.get("agreement")), number(found.get("judge_accuracy"))
    rows = []
    if not math.isnan(agreement):
        rows.append(
            {"name": "labels that a classifier of real texts agrees with"} | _share(agreement)
        )
    if rows and not math.isnan(judge):
        rows.append({"name": "accuracy of that classifier on test texts"} | _share(judge))
    return rows


def _drops(one: Mapping[str, Any]) -> Any:
    return one.get("dropped")


def _count(value: Any) -> dict[str, str]:
    found = number(value)
    return exact(found, tables.format_count(found))


def _share(value: float) -> dict[str, str]:
    return exact(value, tables.format_share(value))


def _plain(value: float) -> dict[str, str]:
    return exact(value, f"{value:.1f}")
