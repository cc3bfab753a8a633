"""What the server and the clients of a federation say to each other; plain torch, no engine.

A method asks clients through `Clients`, which is a source of origin "client-private": inputs never
come back from it. What a client does is a `Client`, an object that holds no data and can be sent to
another process. An engine lies between the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vestige.core import seeding

Arrays = Mapping[str, Tensor]
# Named groups of arrays: "model", "generator", "head", "control".
Payload = Mapping[str, Arrays]
Setting = bool | int | float | str | list[int] | list[float]
Settings = Mapping[str, Setting]
# Of each group the arrays that must be in it, with their shapes; None where a size is the client's.
Shapes = Mapping[str, Mapping[str, tuple[int | None, ...]]]


@dataclass(frozen=True)
class ClientData:
    """What one client holds; it never leaves the client.

    Attributes:
        inputs: (N, ...), in the networks' normalised space; N may be 0.
        labels: (N,), int64, in [0, num_classes).
        num_classes: C of the federation, whether or not this client has all of them.
        test_inputs: (M, ...), the client's own held-out part, of its own mix of classes; M may
            be 0.
        test_labels: (M,), int64.
    """

    inputs: Tensor
    labels: Tensor
    num_classes: int
    test_inputs: Tensor
    test_labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> Tensor:
        """Examples of each class, (C,), int64."""
        return torch.bincount(self.labels, minlength=self.num_classes)


@dataclass(frozen=True)
class Ask:
    """What the server wants of one client.

    Attributes:
        kind: "train", or another verb of the method's own.
        round: from 0.
        partition: number of the client, from 0.
        arrays: by group, what the server sends; float tensors on the CPU.
        settings: plain values, for example the learning rate of this round.
        seed: of everything that the client draws; its own for each client, round and kind.
        device: where the client is to compute.
    """

    kind: str
    round: int
    partition: int
    arrays: Payload
    settings: Settings
    seed: int
    device: str = "cpu"

    def rng(self, stream: str = "") -> torch.Generator:
        """A generator on the CPU for `stream` of this client's draws."""
        return seeding.generator(self.seed, stream)


@dataclass(frozen=True)
class Answer:
    """What a client gives back.

    Attributes:
        arrays: by group; leaves the client.
        examples: how many examples it speaks for; leaves the client.
        counts: examples of each class, (C,), int64; leaves the client. None where the method does
            not need them.
        metrics: numbers for the curves; leave the client.
        state: by group, stays with the client and is handed to it again the next time it is asked;
            None leaves the state as it was.
    """

    arrays: Payload
    examples: int
    counts: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Payload | None = None


@dataclass(frozen=True)
class ClientUpdate:
    """A valid answer as the server sees it; attributes as in `Answer`."""

    partition: int
    arrays: Payload
    examples: int
    counts: Tensor
    metrics: Mapping[str, float]


class Client(Protocol):
    """What a client of a method does; holds settings and a network's form, and no data."""

    def answer(self, ask: Ask, data: ClientData, state: Payload) -> Answer:
        """Do what is asked.

        Torch's global generators are seeded by `ask.seed` while it runs, for dropout and the like.

        Args:
            ask: what the server sent.
            data: this client's own, on `ask.device`.
            state: what it kept last time, {} the first time.
        """
        ...

    def judged(self, ask: Ask, state: Payload) -> nn.Module:
        """The network that this client would use now, to be tested on its own held-out part."""
        ...


@runtime_checkable
class Clients(Protocol):
    """All clients of a federation as a method sees them; also a `Source`.

    Attributes:
        origin: "client-private".
        count: N, clients that there are.
    """

    origin: str
    name: str
    paths: tuple[Path, ...]
    count: int

    def sizes(self) -> Tensor:
        """Examples that each client says it has, (N,), int64, by partition."""
        ...

    def sample(self, count: int, rng: torch.Generator) -> list[int]:
        """`count` clients without replacement, uniformly, in ascending order."""
        ...

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
        """Ask clients and wait for those that answer in time.

        What is not as it must be is rejected by name and counted; the others go on.

        Args:
            kind: as in `Ask`.
            round: as in `Ask`.
            partitions: whom.
            arrays: the same for each of them.
            settings: likewise.
            expects: groups that an answer must have, no other, with the shapes of their arrays; {}
                where nothing but numbers comes back.
            each: further groups for single clients.

        Returns:
            Valid answers in ascending order of `partition`; none, if they are fewer than the least
            number that makes a round: the round is then void and the method leaves everything as
            it was.
        """
        ...


@runtime_checkable
class Federated(Protocol):
    """A method whose training happens at clients.

    Attributes:
        client: what a client does.
        clients: the federation.
    """

    client: Client
    clients: Clients

    def offer(self) -> tuple[Payload, Settings]:
        """What a client is sent so that it can test the network it would use now."""
        ...


@runtime_checkable
class RefinesAverage(Protocol):
    """A method whose server goes on where averaging ends.

    Attributes:
        averaged: the network that averaging gave in the last round, to be judged beside what the
            server made of it.
    """

    averaged: nn.Module


def shapes(arrays: Arrays) -> dict[str, tuple[int | None, ...]]:
    """The shapes of `arrays`, for `Clients.ask`."""
    return {name: tuple(value.shape) for name, value in arrays.items()}


def sent(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, detached: what goes over the wire."""
    return {name: value.detach().cpu().clone() for name, value in arrays.items()}
