"""Images of a generator that is never trained: structured noise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vestige.errors import DataError


class GeneratorSource:
    """Draws from a generator at its random initialisation.

    Smooth, image-like noise: the arm that a trained generator has to beat.

    The generator runs in training mode, so each batch is normalised by its own statistics, as it is
    for a generator that learns; its running statistics move with every draw, which is why the
    source has state.

    Args:
        generator: maps noise (B, Z) to inputs of the teacher (B, ...) and has the attribute
            `latent_dim`, Z; the generator itself is used, not a copy.
    """

    origin = "generator"

    def __init__(self, generator: nn.Module) -> None:
        latent_dim = getattr(generator, "latent_dim", None)
        if not isinstance(latent_dim, int):
            raise DataError(
                f"got {type(generator).__name__} without an integer attribute 'latent_dim', "
                "expected the number of noise values per image there; set it"
            )
        self.name = f"untrained {type(generator).__name__}"
        self.paths: tuple[Path, ...] = ()
        self.generator = generator
        self._latent_dim = latent_dim

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Inputs (count, ...) made from N(0, 1) noise, on the device of `rng`; no gradient."""
        latent = torch.randn(count, self._latent_dim, generator=rng, device=rng.device)
        weight = next(self.generator.parameters(), latent)
        self.generator.train()
        with torch.no_grad():
            inputs: Tensor = self.generator(latent.to(weight.device))
        return inputs.to(rng.device)

    def state_dict(self) -> dict[str, Any]:
        """State of the generator."""
        return self.generator.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.generator.load_state_dict(state)
