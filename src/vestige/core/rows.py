"""Sources whose rows have numbers, and what a method took of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vestige.core.types import Inputs
from vestige.errors import ContractError


@runtime_checkable
class RowSource(Protocol):
    """A source with a fixed number of rows, numbered from 0: images somebody handed in.

    It is a `core.protocols.Source` besides, whose `draw` takes rows uniformly with replacement.
    """

    origin: str
    name: str
    paths: tuple[Path, ...]

    def __len__(self) -> int: ...

    def draw(self, count: int, rng: torch.Generator) -> Inputs: ...

    def rows(self, index: Tensor) -> Inputs:
        """The inputs (B, ...) with the numbers `index` (B,), on the device of `index`."""
        ...


@runtime_checkable
class KnowsParts(Protocol):
    """A source that was put together from parts; a method must not ask, a report may.

    Attributes:
        parts: names of the parts, each with whether its rows are of the teacher's classes; None
            where nobody knows.
    """

    parts: Mapping[str, bool | None]

    def part_of(self, index: Tensor) -> Tensor:
        """Which part, by its position in `parts`, each row (B,) came from; (B,) int64."""
        ...


@runtime_checkable
class KnowsTexts(Protocol):
    """A source of recordings that somebody wrote down; a method must not ask, a report may.

    Attributes:
        ids: (N,) what each row is called in the record.
    """

    ids: list[str]

    def texts_of(self, index: Tensor) -> list[str | None]:
        """What is said in each row (B,): "" where nothing is, None where nobody knows."""
        ...


class Selection:
    """How often each row of a source was looked at, and how often it was learned from.

    Counts stay on the CPU and are part of a checkpoint; nothing is decided by them.

    Attributes:
        seen: (N,) int32.
        kept: (N,) int32, at most `seen`.
    """

    def __init__(self, rows: int) -> None:
        self.seen = torch.zeros(rows, dtype=torch.int32)
        self.kept = torch.zeros(rows, dtype=torch.int32)

    def note(self, index: Tensor, kept: Tensor) -> None:
        """Rows `index` (B,) were looked at and those of the mask `kept` (B,), bool, were taken."""
        if kept.dtype != torch.bool or kept.shape != index.shape:
            raise ContractError(
                f"got kept {tuple(kept.shape)} of dtype {kept.dtype} for {tuple(index.shape)} "
                "rows, expected one truth value per row"
            )
        index, kept = index.cpu(), kept.cpu()
        self.seen.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        self.kept.index_add_(0, index, kept.to(torch.int32))

    def state_dict(self) -> Mapping[str, Any]:
        """Both counts."""
        return {"seen": self.seen, "kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.seen, self.kept = state["seen"], state["kept"]


@runtime_checkable
class SelectsRows(Protocol):
    """A method that learns from a part of a source only, and says from which."""

    def selections(self) -> Mapping[str, Selection]:
        """What was taken, by the names of the method's sources."""
        ...
