"""A part of somebody's images: those of which a teacher is least sure."""

from pathlib import Path

import torch
from torch import Tensor

from vestige.core.protocols import Source, Teacher
from vestige.core.rows import RowSource, Selection
from vestige.core.types import Inputs, predict
from vestige.errors import ContractError, DataError, RecipeError
from vestige.losses.prior import entropy_loss


def most_uncertain(
    teacher: Teacher, source: RowSource, keep: int, *, device: torch.device, batch_size: int = 512
) -> Tensor:
    """The rows of highest predictive entropy (MosaicKD's subset of foreign images, 2110.15094).

    A heap may hold images of the teacher's own classes; those are the ones it is sure of.

    Args:
        teacher: answers every row once.
        source: N rows.
        keep: how many, at most N.
        device: where the teacher is.
        batch_size: rows per forward; changes no result beyond rounding.

    Returns:
        Row numbers (keep,) int64 on `device`, ascending; of equal entropies the lower row goes
        first. No randomness.

    Raises:
        DataError: `keep` is more than there are rows, or less than 1.
    """
    if not 1 <= keep <= len(source):
        raise DataError(
            f"got a subset of {keep} of the {len(source)} images of '{source.name}', expected 1 to "
            f"{len(source)}; lower it, or leave it out to take all"
        )
    entropies = []
    with torch.no_grad():
        for start in range(0, len(source), batch_size):
            index = torch.arange(start, min(start + batch_size, len(source)), device=device)
            entropies.append(entropy_loss(predict(teacher, source.rows(index)).logits))
    order = torch.cat(entropies).argsort(descending=True, stable=True)
    return order[:keep].sort().values


class UncertainRows:
    """The rows of a source of which a teacher is least sure, once `rank` was called.

    Attributes:
        selection: which rows those are.

    Args:
        source: holds them.
        keep: how many.

    Raises:
        RecipeError: the source's inputs have no numbers.
    """

    def __init__(self, source: Source, keep: int) -> None:
        if not isinstance(source, RowSource):
            raise RecipeError(
                f"got a subset of {keep} inputs of the source '{source.name}', which have no "
                "numbers, expected a folder or a set of images; leave the subset out"
            )
        self.origin = source.origin
        self.name = source.name
        self.paths: tuple[Path, ...] = source.paths
        self.selection = Selection(len(source))
        self._source = source
        self._keep = keep
        self._index: Tensor | None = None

    def rank(self, teacher: Teacher, device: torch.device) -> None:
        """Ask the teacher once about every row; the same teacher gives the same rows."""
        self._index = most_uncertain(teacher, self._source, self._keep, device=device)
        kept = torch.zeros(len(self._source), dtype=torch.bool)
        kept[self._index.cpu()] = True
        self.selection.note(torch.arange(len(self._source)), kept)

    def __len__(self) -> int:
        return self._keep

    def draw(self, count: int, rng: torch.Generator) -> Inputs:
        """`count` rows (count, ...), uniformly with replacement; no gradient."""
        return self.rows(torch.randint(len(self), (count,), generator=rng, device=rng.device))

    def rows(self, index: Tensor) -> Inputs:
        """The rows (B, ...) with the numbers `index` (B,), in [0, keep), on its device."""
        if self._index is None:
            raise ContractError("rows were asked for before they were ranked; call rank first")
        return self._source.rows(self._index.to(index.device)[index])
