"""Memories of earlier synthetic inputs with a fixed number of rows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vestige.errors import ContractError


class _Memory:
    """Rows in a buffer of fixed size, the first `len` of them valid.

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

    def _write(self, where: Tensor, rows: Tensor) -> None:
        if self._rows is None:
            self._rows = rows.new_zeros((self.capacity, *rows.shape[1:]))
        # A checkpoint is read back to the CPU, whatever the device it was written from.
        self._rows = self._rows.to(rows.device)
        self._rows[where.to(rows.device)] = rows


class RingMemory(_Memory):
    """The newest `capacity` rows that were pushed; the oldest are overwritten."""

    def push(self, rows: Tensor) -> None:
        """Store rows (N, ...); of more than `capacity` rows only the last ones stay."""
        rows = rows.detach()[-self.capacity :]
        self._write((torch.arange(len(rows)) + self._pushed) % self.capacity, rows)
        self._pushed += len(rows)


class ReservoirMemory(_Memory):
    """A uniform sample of `capacity` rows of all that were ever pushed (Vitter, 1985, algorithm R).

    A ring forgets what is old; here a row of the first push is as likely to be kept as one of the
    last.
    """

    def push(self, rows: Tensor, rng: torch.Generator) -> None:
        """Offer rows (N, ...); the n-th row of all stays with probability capacity / n at first."""
        numbers = torch.arange(len(rows), device=rng.device) + self._pushed
        drawn = torch.rand(len(rows), generator=rng, device=rng.device, dtype=torch.float64)
        # Row n goes to one of n + 1 places; one beyond the capacity is none.
        place = torch.where(numbers < self.capacity, numbers, (drawn * (numbers + 1)).long())
        winner = torch.full((self.capacity,), -1, device=rng.device)
        taken = place < self.capacity
        winner.scatter_reduce_(0, place[taken], numbers[taken] - self._pushed, "amax")
        where = torch.nonzero(winner >= 0)[:, 0]
        self._write(where, rows.detach()[winner[where].to(rows.device)])
        self._pushed += len(rows)
