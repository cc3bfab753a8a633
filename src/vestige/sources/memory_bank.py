"""Features of everything that was synthesised before."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vestige.errors import ContractError, ShapeError


class MemoryBank:
    """A ring of feature rows; only rows that were pushed are ever drawn (CMI, arXiv 2105.08584).

    Memory is taken as rows come, up to `capacity` rows, on the device of the first ones.

    Args:
        capacity: largest number of rows; the oldest are overwritten.
        width: numbers in a row.
        dtype: of what is kept; half precision takes half the memory, and a feature in it is off by
            at most one part in 2,000.
    """

    def __init__(self, capacity: int, width: int, *, dtype: torch.dtype = torch.float16) -> None:
        if capacity < 1 or width < 1:
            raise ContractError(
                f"got capacity {capacity} and width {width}, expected at least 1 of both"
            )
        self.capacity = capacity
        self.width = width
        self.dtype = dtype
        self._rows: Tensor | None = None
        self._pushed = 0

    def __len__(self) -> int:
        """Number of valid rows."""
        return min(self._pushed, self.capacity)

    def push(self, rows: Tensor) -> None:
        """Store rows (N, width), of which only the last `capacity` stay; no gradient.

        Raises:
            ShapeError: rows of another width.
        """
        if rows.dim() != 2 or rows.shape[1] != self.width:
            raise ShapeError(f"got rows {tuple(rows.shape)}, expected (N, {self.width})")
        start, total = self._pushed, len(rows)
        rows = rows.detach()[-self.capacity :].float()
        # Far out features would become infinite; the largest finite number is as far out.
        limit = min(torch.finfo(self.dtype).max, torch.finfo(torch.float32).max)
        rows = rows.clamp(-limit, limit).to(self.dtype)
        self._pushed += total
        kept = self._grown(rows)
        where = torch.arange(start + total - len(rows), start + total, device=rows.device)
        kept[where % self.capacity] = rows

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """At most `count` different valid rows, at random, float32, on the device of `rng`.

        Returns:
            (min(count, len), width), no gradient; (0, width) from an empty bank.
        """
        if self._rows is None:
            return torch.empty(0, self.width, device=rng.device)
        index = torch.randperm(len(self), generator=rng, device=rng.device)[:count]
        return self._rows[index.to(self._rows.device)].to(rng.device, torch.float32)

    def _grown(self, rows: Tensor) -> Tensor:
        """Space for all valid rows, doubled when it is full."""
        before = self._rows
        if before is None or len(before) < len(self):
            space = min(self.capacity, max(len(self), 2 * (0 if before is None else len(before))))
            self._rows = torch.zeros(space, self.width, dtype=self.dtype, device=rows.device)
            if before is not None:
                self._rows[: len(before)] = before
        # A checkpoint is read back to the CPU, whatever the device it was written from.
        self._rows = self._rows.to(rows.device) if self._rows is not None else rows
        return self._rows

    def state_dict(self) -> Mapping[str, Any]:
        """The valid rows and the number pushed so far."""
        rows = None if self._rows is None else self._rows[: len(self)]
        return {"rows": rows, "pushed": self._pushed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ShapeError: rows of another width, or the state of a bank of another capacity.
        """
        rows, pushed = state["rows"], int(state["pushed"])
        expected = (min(pushed, self.capacity), self.width)
        if rows is not None and tuple(rows.shape) != expected:
            raise ShapeError(
                f"got {pushed} pushed rows of which {tuple(rows.shape)} are kept, expected "
                f"{expected}; make the bank with the capacity and width that its state was saved "
                "with"
            )
        self._pushed = pushed
        self._rows = None if rows is None else rows.to(self.dtype).clone()
