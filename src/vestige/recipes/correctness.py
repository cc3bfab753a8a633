"""Labels of written texts held against real ones, for the report alone, once a run has ended."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vestige.core.protocols import MakesRecords
from vestige.core.texts import PAIR, as_pair
from vestige.data.text import TextSet, load_texts
from vestige.errors import DataError
from vestige.metrics.text_correctness import text_correctness
from vestige.recipes.sources import record_of

logger = logging.getLogger(__name__)


def add_correctness(
    card: dict[str, Any], summary: dict[str, Any], method: object, data: str | None
) -> None:
    """Put the share of right labels into the card's quality, and what was read into the summary.

    The judge learns from the train split of the run's set, which no method sees, and is itself
    judged by its test split. Nothing is added where there is no such split, or where its classes
    are not the labels that texts were written for.

    Args:
        card: of `training.records.record_facts`.
        summary: of the run; its "real_data" gets the train split.
        method: that wrote the texts.
        data: name of the set; None where nothing judges.
    """
    if data is None or not isinstance(method, MakesRecords):
        return
    lines = [line for line in method.records() if line.get("answer") is None]
    try:
        train, test = load_texts(data, "train"), load_texts(data, "test")
        if not {str(line["Y"]) for line in lines} <= set(train.classes):
            return
        pairs = any(as_pair(text)[1] is not None for text in train.texts[:100])
        found = text_correctness(
            [_text(line, pairs=pairs) for line in lines],
            [str(line["Y"]) for line in lines],
            train.texts,
            _names(train),
            other_texts=test.texts,
            other_labels=_names(test),
        )
    except DataError as error:
        logger.info("nobody says how many labels of the written texts are right: %s", error)
        return
    card["quality"]["correctness"] = {**asdict(found), "data": f"{train.name}/{train.split}"}
    read = record_of(train, "real", "quality report", "evaluation")
    summary["real_data"].append(asdict(read))


def _names(data: TextSet) -> list[str]:
    return [data.classes[label] for label in data.labels.tolist()]


def _text(line: Mapping[str, Any], *, pairs: bool) -> str:
    return f"{line['C'] or ''}{PAIR}{line['X']}" if pairs else str(line["X"])
