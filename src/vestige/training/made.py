"""How many inputs were made for the student of a run."""

from collections.abc import Mapping, Sized
from typing import Any

from torch import Tensor

from vestige.core.protocols import Sharded
from vestige.core.types import Loss, count_rows


class Made:
    """Counts the rows of the student's updates that no update has seen before (`Loss.fresh`).

    No value is read off the device until somebody asks. Rows that a plug-in drops are not counted,
    and neither is what moves the source alone.
    """

    def __init__(self) -> None:
        self._shown = False
        self._rows = 0
        self._fresh: Tensor | None = None

    def observe(self, loss: Loss) -> None:
        """Take in one update of the student."""
        if loss.inputs is None:
            return
        self._shown = True
        if loss.fresh is None:
            self._rows += count_rows(loss.inputs)
        else:
            fresh = loss.fresh.sum()
            self._fresh = fresh if self._fresh is None else self._fresh + fresh

    def count(self, parts: Mapping[str, Any]) -> int | None:
        """Inputs made so far; None where no update has shown what the student saw.

        Args:
            parts: the method's. Of one that keeps a growing store as "pool" all inputs in it count,
                since those are what was made, however often the student has seen them.
        """
        pool = parts.get("pool")
        if isinstance(pool, Sharded) and isinstance(pool, Sized):
            return len(pool)
        return self._settled() if self._shown else None

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"rows": self._settled(), "shown": self._shown}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the counts of an earlier part of the run."""
        self._rows, self._shown, self._fresh = int(state["rows"]), bool(state["shown"]), None

    def _settled(self) -> int:
        return self._rows + (0 if self._fresh is None else int(self._fresh))
