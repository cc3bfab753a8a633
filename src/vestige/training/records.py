"""The data set that a run wrote: synthetic.jsonl, and its card synthetic.json."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vestige.core.protocols import MakesRecords
from vestige.metrics.text_quality import text_quality
from vestige.training.files import write_bytes
from vestige.training.summary import RunFacts

_SHOWN = 3


def record_facts(method: object, facts: RunFacts) -> dict[str, Any]:
    """The card of what `method` wrote; {} where it writes nothing, or wrote nothing yet.

    Returns:
        "texts", how many; "counts" by label, asked, kept and dropped with reasons; "prompts",
        "decoding"; "quality", see `metrics.text_quality`; "examples", a few of each label; method,
        seed, teacher and command of the run; and what else the method says.
    """
    if not isinstance(method, MakesRecords):
        return {}
    lines = list(method.records())
    if not lines:
        return {}
    texts, labels = [str(one["X"]) for one in lines], [str(one["Y"]) for one in lines]
    known = [one["logprob"] for one in lines if one.get("logprob") is not None]
    examples: dict[str, list[str]] = {}
    for text, label in zip(texts, labels, strict=True):
        if len(examples.setdefault(label, [])) < _SHOWN:
            examples[label].append(text)
    return {
        "schema": 1,
        "texts": len(lines),
        "method": facts.method,
        "variant": facts.variant,
        "seed": facts.seed,
        "teacher_fingerprint": facts.teacher_fingerprint,
        "teacher_score": facts.teacher_score,
        "teacher_trained_on": facts.teacher_trained_on,
        "command": facts.command,
        "started": facts.started,
        "quality": asdict(text_quality(texts, labels)),
        "mean_logprob": sum(known) / len(known) if known else None,
        "examples": examples,
        **method.record_card(),
    }


def brief_records(card: Mapping[str, Any]) -> dict[str, Any]:
    """What summary.json says of it."""
    quality = card["quality"]
    kept = {label: found["kept"] for label, found in card["counts"].items()}
    asked = sum(found["asked"] for found in card["counts"].values())
    return {
        "texts": card["texts"],
        "asked": asked,
        "kept_by_label": kept,
        "self_bleu": quality["self_bleu"],
        "balance": quality["balance"],
        "correctness": quality.get("correctness"),
    }


def write_records(out: Path, method: object, card: Mapping[str, Any]) -> bool:
    """Write both files, each whole or not at all, the card last.

    Returns:
        False where there is nothing to write.
    """
    if not card or not isinstance(method, MakesRecords):
        return False
    lines = (json.dumps(dict(one), ensure_ascii=False) + "\n" for one in method.records())
    # Lone surrogates are valid in JSON and not in UTF-8.
    write_bytes(out / "synthetic.jsonl", "".join(lines).encode("utf8", errors="replace"))
    content = json.dumps(dict(card), indent=2, ensure_ascii=False) + "\n"
    write_bytes(out / "synthetic.json", content.encode("utf8", errors="replace"))
    return True
