"""Metrics of a run as JSON lines; always written."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vestige.training.files import write_bytes, writing

logger = logging.getLogger(__name__)


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, in the order of steps; None keeps nothing.

    Args:
        path: the file, or None.
        follow: called with the rows of each `flush` after they were written.

    Attributes:
        rows: number of rows that were written.
    """

    def __init__(
        self,
        path: Path | None,
        follow: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    ) -> None:
        self.path = path
        self.follow = follow
        self.rows = 0
        self._rows: list[str] = []

    def add(self, kind: str, **values: Any) -> None:
        """Remember a row until `flush`."""
        self._rows.append(json.dumps({"kind": kind, **_finite(values)}))

    def flush(self) -> None:
        """Append the remembered rows."""
        rows = list(self._rows)
        if self.path is not None and rows:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf8") as stream:
                    stream.write("\n".join(rows) + "\n")
            self.rows += len(rows)
        self._rows.clear()
        if rows:
            self.follow([json.loads(row) for row in rows])

    def restart(self, rows: int) -> None:
        """Keep the first `rows` rows, which a checkpoint knows of; what came later is repeated."""
        self._rows.clear()
        self.rows = rows
        if self.path is None or not self.path.is_file():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        if len(lines) < rows:
            logger.warning(
                "%s has %d of the %d rows that the checkpoint knows of; the others are lost",
                self.path,
                len(lines),
                rows,
            )
        write_bytes(self.path, b"".join(lines[:rows]))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that is cut short is left out."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def scalars_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the rows of one step say, by names that are the same in every tracker.

    `ROLE/TERM` and `ROLE/total` are losses, `round/...` is what was seen in a round, `test/...`
    are scores.
    """
    found: dict[str, float | None] = {}
    for row in rows:
        if row["kind"] == "step":
            found |= {f"{row['role']}/{name}": value for name, value in row["terms"].items()}
            found[f"{row['role']}/total"] = row["total"]
        elif row["kind"] == "round":
            classes = row["classes"]
            found["round/number"] = row["round"]
            found["round/agreement"] = row["agreement"]
            found["round/train_eval_agreement"] = row["train_eval_agreement"]
            found["round/class_coverage"] = sum(map(bool, classes)) / max(1, len(classes))
        elif row["kind"] == "evaluation":
            found |= {f"test/{name}": value for name, value in row["scores"].items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _finite(value: Any) -> Any:
    # NaN and infinity are not JSON; a reader gets null instead of an error.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
