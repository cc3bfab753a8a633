"""Pure noise as inputs: the source that needs nothing."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vestige.core.types import InputSpec
from vestige.errors import DataError


class NoiseSource:
    """Independent noise in every element.

    Args:
        spec: what one input looks like.
        distribution: "normal" draws N(0, 1) in the teacher's normalised space; "uniform" draws
            values in [0, 1) and normalises them, so that it stays within the range of images.
    """

    origin = "noise"

    def __init__(
        self, spec: InputSpec, *, distribution: Literal["normal", "uniform"] = "normal"
    ) -> None:
        if distribution not in ("normal", "uniform"):
            raise DataError(f"got distribution '{distribution}', expected 'normal' or 'uniform'")
        self.name = f"{distribution} noise"
        self.paths: tuple[Path, ...] = ()
        self._spec = spec
        self._distribution = distribution

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Noise (count, ...), float32, on the device of `rng`; no gradient."""
        shape = (count, *self._spec.shape)
        if self._distribution == "normal":
            return torch.randn(shape, generator=rng, device=rng.device)
        return self._spec.normalize(torch.rand(shape, generator=rng, device=rng.device))
