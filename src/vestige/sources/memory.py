"""A memory of earlier synthetic inputs with a fixed number of rows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vestige.errors import ContractError


class RingMemory:
    """The newest `capacity` rows that were pushed; the oldest are overwritten.

    Rows are kept as they come, on their device, without gradient: synthetic inputs are real-valued,
    so eight bits would change what is replayed.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ContractError(f"got capacity {capacity}, expected at least 1 row")
        self.capacity = capacity
        self._rows: Tensor | None = None
        self._pushed = 0

    def __len__(self) -> int:
        return min(self._pushed, self.capacity)

    def push(self, rows: Tensor) -> None:
        """Store rows (N, ...); of more than `capacity` rows only the last ones stay."""
        rows = rows.detach()[-self.capacity :]
        if self._rows is None:
            self._rows = rows.new_zeros((self.capacity, *rows.shape[1:]))
        # A checkpoint is read back to the CPU, whatever the device it was written from.
        self._rows = self._rows.to(rows.device)
        where = (torch.arange(len(rows), device=rows.device) + self._pushed) % self.capacity
        self._rows[where] = rows
        self._pushed += len(rows)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """`count` rows on the device of `rng`, uniformly with replacement from the valid ones."""
        if self._rows is None:
            raise ContractError("an empty memory was drawn from; push first")
        index = torch.randint(len(self), (count,), generator=rng, device=rng.device)
        return self._rows[index.to(self._rows.device)].to(rng.device)

    def state_dict(self) -> Mapping[str, Any]:
        """The valid rows and the number pushed so far."""
        rows = None if self._rows is None else self._rows[: len(self)]
        return {"rows": rows, "pushed": self._pushed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._rows, self._pushed = None, int(state["pushed"])
        if state["rows"] is not None:
            rows: Tensor = state["rows"]
            self._rows = rows.new_zeros((self.capacity, *rows.shape[1:]))
            self._rows[: len(self)] = rows
