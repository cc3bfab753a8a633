"""Metrics of a run as JSON lines, and events for whoever wants to follow it."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vestige.training.files import write_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Something happened: `kind` is "start", "step", "round", "evaluation", "warning" or "end"."""

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)


Callback = Callable[[Event], None]


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, in the order of steps; None keeps nothing.

    Attributes:
        path: the file, or None.
        rows: number of rows that were written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows = 0
        self._rows: list[str] = []

    def add(self, kind: str, **values: Any) -> None:
        """Remember a row until `flush`."""
        self._rows.append(json.dumps({"kind": kind, **_finite(values)}))

    def flush(self) -> None:
        """Append the remembered rows."""
        if self.path is not None and self._rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf8") as stream:
                stream.write("\n".join(self._rows) + "\n")
            self.rows += len(self._rows)
        self._rows.clear()

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
    for line in path.read_text(encoding="utf8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _finite(value: Any) -> Any:
    # NaN and infinity are not JSON; a reader gets null instead of an error.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
