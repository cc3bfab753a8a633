"""One pool of what is being made and of what was made before."""

from collections.abc import Sized
from pathlib import Path

import torch
from torch import Tensor

from vestige.core.protocols import Source
from vestige.errors import DataError
from vestige.sources.pool import Pool


class PoolMix:
    """Draws from a growing pool and from earlier inputs, each row as likely as any other.

    Args:
        own: the pool that grows.
        earlier: inputs that are there already and have a length, such as an opened pool; None for
            none.

    Raises:
        DataError: `earlier` has no length, so there is no share that it should have.
    """

    origin = "synthetic"
    name = "pool"

    def __init__(self, own: Pool, earlier: Source | None = None) -> None:
        if earlier is not None and not isinstance(earlier, Sized):
            raise DataError(
                f"got the source {earlier.name!r} as a pool, which has no end, expected inputs of "
                "a known number: kind 'pool' or 'images'"
            )
        self.own = own
        self.earlier = earlier
        self.paths: tuple[Path, ...] = () if earlier is None else tuple(earlier.paths)

    def __len__(self) -> int:
        return len(self.own) + (len(self.earlier) if isinstance(self.earlier, Sized) else 0)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """`count` inputs, uniformly with replacement over both; on the device of `rng`.

        Raises:
            DataError: both are empty.
        """
        if self.earlier is None or not len(self) - len(self.own):
            return self.own.draw(count, rng)
        index = torch.randint(len(self), (count,), generator=rng, device=rng.device)
        mine = int((index < len(self.own)).sum())
        if mine == count:
            return self.own.draw(count, rng)
        earlier = self.earlier.draw(count - mine, rng)
        if not isinstance(earlier, Tensor):
            raise DataError(
                f"got inputs of several tensors from {self.earlier.name!r}, expected images (N, C, "
                "H, W) as a pool"
            )
        return torch.cat([self.own.draw(mine, rng), earlier]) if mine else earlier
