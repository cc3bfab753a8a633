"""A federation without an engine: clients are called one after another."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vestige.core import seeding
from vestige.core.federation import (
    Ask,
    Client,
    ClientData,
    ClientUpdate,
    Payload,
    Settings,
    Shapes,
)


class DirectClients:
    """The `Clients` of `core.federation`; `client` is set by whoever made the method."""

    origin, name = "client-private", "direct"
    paths: tuple[Path, ...] = ()

    def __init__(self, parts: Sequence[ClientData], *, seed: int = 0) -> None:
        self.parts, self.seed, self.count = list(parts), seed, len(parts)
        self.client: Client | None = None
        self.states: dict[int, Payload] = {}
        self.asked: list[Ask] = []
        # What clients had before each asking, so that a run can go back to it.
        self.before: dict[tuple[int, int], dict[int, Payload]] = {}
        self.turn = (-1, -1)

    def sizes(self) -> Tensor:
        return torch.tensor([len(part) for part in self.parts])

    def sample(self, count: int, rng: torch.Generator) -> list[int]:
        return sorted(torch.randperm(self.count, generator=rng)[:count].tolist())

    def ask(
        self,
        kind: str,
        round: int,
        partitions: Sequence[int],
        arrays: Payload,
        settings: Settings | None = None,
        *,
        expects: Shapes,
        each: Mapping[int, Payload] | None = None,
    ) -> list[ClientUpdate]:
        assert self.client is not None
        self.turn = (round, self.turn[1] + 1 if round == self.turn[0] else 0)
        self.states = dict(self.before.setdefault(self.turn, dict(self.states)))
        found = []
        for partition in partitions:
            seed = seeding.derive(self.seed, f"client {partition}/{round}/{kind}")
            groups = {**arrays, **(each or {}).get(partition, {})}
            ask = Ask(kind, round, partition, groups, settings or {}, seed)
            self.asked.append(ask)
            data = self.parts[partition]
            with seeding.seeded(seed, "client"):
                answer = self.client.answer(ask, data, self.states.get(partition, {}))
            if answer.state is not None:
                self.states[partition] = answer.state
            assert answer.arrays.keys() == expects.keys()
            counts = (
                torch.zeros(data.num_classes).long() if answer.counts is None else answer.counts
            )
            found.append(
                ClientUpdate(partition, answer.arrays, answer.examples, counts, answer.metrics)
            )
        return found


def skewed(
    clients: int, shape: tuple[int, ...], classes: int, *, each: int = 24, seed: int = 0
) -> list[ClientData]:
    """Clients whose classes differ: client k holds mostly class k % C, of separable inputs."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, *shape, generator=rng)
    parts = []
    for number in range(clients):
        labels = torch.randint(classes, (2 * each,), generator=rng)
        labels[: int(1.6 * each)] = number % classes
        labels = labels[torch.randperm(len(labels), generator=rng)]
        inputs = centres[labels] + 0.5 * torch.randn(2 * each, *shape, generator=rng)
        parts.append(
            ClientData(inputs[:each], labels[:each], classes, inputs[each:], labels[each:])
        )
    return parts
