"""Rows of a growing store: in memory, or in a file that is mapped only while it is read."""

import math
import os
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vestige.errors import DataError


class Rows(Protocol):
    """Rows of one shape and dtype that are appended and read."""

    count: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def append(self, rows: Tensor) -> None:
        """Add rows (B, ...) behind the others."""
        ...

    def at(self, index: Tensor) -> Tensor:
        """Rows of these numbers (N,), a copy."""
        ...

    def between(self, start: int, stop: int) -> Tensor:
        """Rows from `start` up to `stop`; a view where that costs nothing."""
        ...


class MemoryRows:
    """In one tensor that doubles when it is full."""

    def __init__(self, like: Tensor, device: torch.device) -> None:
        self.count = 0
        self.dtype, self.shape = like.dtype, tuple(like.shape[1:])
        self._buffer = torch.empty((0, *self.shape), dtype=self.dtype, device=device)

    def append(self, rows: Tensor) -> None:
        """Add rows (B, ...) behind the others."""
        needed = self.count + len(rows)
        if needed > len(self._buffer):
            # Doubling: copying at every append would cost a square of the size.
            larger = self._buffer.new_empty((max(needed, 2 * self.count), *self.shape))
            larger[: self.count] = self._buffer[: self.count]
            self._buffer = larger
        self._buffer[self.count : needed] = rows
        self.count = needed

    def at(self, index: Tensor) -> Tensor:
        """Rows of these numbers (N,), a copy on the device of the store."""
        return self._buffer[index.to(self._buffer.device)]

    def between(self, start: int, stop: int) -> Tensor:
        """Rows from `start` up to `stop`, a view."""
        return self._buffer[start:stop]


class FileRows:
    """In a file, so that memory does not grow with their number.

    A mapping that stayed open would gather all pages that were ever read, and one made for each
    read takes four times as long for a batch out of a million images as asking for each row.

    Args:
        path: of the file; None makes one in the directory for temporary files, which goes with
            this object.
        shape: of one row.
        dtype: of the rows.
        offset: bytes before the first row.
        count: rows that are there.
    """

    def __init__(
        self,
        path: Path | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        offset: int = 0,
        count: int = 0,
    ) -> None:
        self._folder = None
        if path is None:
            self._folder = tempfile.TemporaryDirectory(prefix="vestige-pool-")
            path = Path(self._folder.name) / "rows"
            path.touch()
        self.path, self.shape, self.dtype, self.count = path, shape, dtype, count
        self._offset = offset
        self._numpy = torch.empty((), dtype=dtype).numpy().dtype

    def append(self, rows: Tensor) -> None:
        """Add rows (B, ...) behind the others."""
        with self.path.open("ab") as file:
            file.write(np.ascontiguousarray(rows.cpu().numpy()).data)
        self.count += len(rows)

    def at(self, index: Tensor) -> Tensor:
        """Rows of these numbers (N,), a copy on the CPU.

        Raises:
            DataError: the file has become shorter.
        """
        rows = np.empty((len(index), *self.shape), self._numpy)
        places = rows.reshape(len(index), math.prod(self.shape)).view(np.uint8)
        with self.path.open("rb", buffering=0) as file:
            for place, row in zip(places, index.tolist(), strict=True):
                start = self._offset + row * len(place)
                if os.preadv(file.fileno(), [place.data], start) != len(place):
                    raise DataError(
                        f"got {self.path}, which ends before row {row:,} of {self.count:,}, "
                        "expected a file that nobody changes while it is read; make it again"
                    )
        return torch.from_numpy(rows)

    def between(self, start: int, stop: int) -> Tensor:
        """Rows from `start` up to `stop`, a copy on the CPU."""
        return torch.from_numpy(np.array(self._mapped()[start:stop]))

    def _mapped(self) -> np.ndarray:
        if not self.count:
            return np.empty((0, *self.shape), self._numpy)
        return np.memmap(
            self.path, self._numpy, "r", offset=self._offset, shape=(self.count, *self.shape)
        )
