"""Inputs that somebody handed in, drawn at random."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vestige.errors import DataError

ORIGINS = ("foreign", "unlabelled", "client-private", "real")


class TensorSource:
    """Rows of a tensor, drawn uniformly with replacement; labels have no place here.

    Args:
        inputs: (N, ...) in the teacher's normalised space; kept as it is, in dtype and device.
        origin: "foreign" (of something else), "unlabelled", "client-private" or "real" (the
            teacher's own data, for the reference arm); it ends up in the run record.
        name: what is shown to the user, for example the name of the data set.
        paths: the files that the inputs were read from.
    """

    def __init__(
        self, inputs: Tensor, *, origin: str, name: str, paths: Sequence[Path] = ()
    ) -> None:
        if origin not in ORIGINS:
            raise DataError(
                f"got origin '{origin}' for '{name}', expected one of {', '.join(ORIGINS)}; "
                "declare where the inputs come from"
            )
        if inputs.dim() < 2 or len(inputs) == 0:
            raise DataError(
                f"got inputs of shape {tuple(inputs.shape)} for '{name}', expected (N, ...) with "
                "N > 0; hand in at least one input"
            )
        self.origin = origin
        self.name = name
        self.paths = tuple(paths)
        self._inputs = inputs.detach()

    def __len__(self) -> int:
        return len(self._inputs)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """`count` rows (count, ...), on the device of `rng`; no gradient."""
        return self.rows(torch.randint(len(self), (count,), generator=rng, device=rng.device))

    def rows(self, index: Tensor) -> Tensor:
        """The rows (B, ...) with the numbers `index` (B,), on the device of `index`."""
        return self._inputs[index.to(self._inputs.device)].to(index.device)
