"""Generated features as a client uses them: knowledge of classes that it may not have."""

import copy
from collections.abc import Callable, Sequence
from typing import Self, cast

import torch
from torch import Tensor

from vestige.core.federation import Ask, Payload, Settings, sent
from vestige.federated.labels import uniform_labels
from vestige.models.latent_generators import LatentGenerator

Noise = Callable[[int, torch.Generator], Tensor]


class GeneratedFeatures:
    """Draws features of labels from a generator that the server sent, without gradient.

    Args:
        generator: on the client's device; set to eval mode.
        known: classes that it was to learn.
        noise: of so many rows, from a generator of random numbers.
        rng: on the CPU; draws noise and labels.
    """

    def __init__(
        self,
        generator: LatentGenerator,
        known: Sequence[int],
        noise: Noise,
        rng: torch.Generator,
    ) -> None:
        self._generator = generator.requires_grad_(False).eval()
        self._known = torch.zeros(generator.num_classes, dtype=torch.bool)
        self._known[list(known)] = True
        self._noise, self._rng = noise, rng

    @staticmethod
    def message(generator: LatentGenerator, known: Sequence[int]) -> tuple[Payload, Settings]:
        """What the server sends: the generator, and the classes that it was to learn.

        Nothing as long as there is no such class.
        """
        if not known:
            return {}, {}
        return {"generator": sent(generator.state_dict())}, {"labels": list(known)}

    @classmethod
    def received(cls, ask: Ask, form: LatentGenerator, noise: Noise) -> Self | None:
        """What `message` told; None where it sent nothing.

        Args:
            ask: its stream "latent" draws.
            form: a generator of the same sizes; copied.
            noise: as for the class.
        """
        if "generator" not in ask.arrays:
            return None
        generator = copy.deepcopy(form).to(ask.device)
        generator.load_state_dict(dict(ask.arrays["generator"]))
        return cls(generator, cast(list[int], ask.settings["labels"]), noise, ask.rng("latent"))

    @torch.no_grad()
    def of(self, labels: Tensor) -> Tensor:
        """One feature vector for each label (B,): (B, D), on its device."""
        noise = self._noise(len(labels), self._rng).to(labels.device)
        features: Tensor = self._generator(noise, labels)
        return features

    def labels(self, count: int, device: torch.device) -> Tensor:
        """Labels (n,) of known classes, each class as likely as any other."""
        return uniform_labels(self._known, count, self._rng).to(device)
