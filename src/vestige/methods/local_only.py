"""Local-only: every client trains alone; the reference that a federation has to beat.

Paper: none of its own; a usual reference where each client is tested on its own mix of classes,
    for example in Think Locally, Act Globally: Federated Learning with Local and Global
    Representations, Liang, Liu, Ziyin, Allen, Auerbach, Brent, Salakhutdinov, Morency, 2020,
    arXiv 2001.01523. A client that knows few classes does well alone.

All clients start from one initialisation. In each round the active ones train their own network on
their own examples and keep it, momentum and running statistics included. Nothing is sent but their
mean losses.

Differs from the paper: nothing.

Cost per round: at each active client, for each local step: S forward 1, backward 1.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from torch import nn

from vestige.core.federation import Answer, Ask, ClientData, Clients, Payload, Settings
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Result, Step
from vestige.federated import personal
from vestige.federated.local import mean_loss, needs_clients
from vestige.federated.personal import PersonalTraining


class LocalOnlyConfig(PersonalTraining):
    """Settings of clients that train alone: those of the clients' training."""


class LocalOnlyClient:
    """Trains its own network on its own examples.

    Args:
        cfg: of the method.
        network: that every client starts from; never trained itself.
    """

    def __init__(self, cfg: LocalOnlyConfig, network: nn.Module) -> None:
        self.cfg, self.network = cfg, copy.deepcopy(network)

    def answer(self, ask: Ask, data: ClientData, state: Payload) -> Answer:
        """Numbers alone."""
        network = self.judged(ask, state)
        lr, rng = self.cfg.rate(ask.round), ask.rng("batches")
        loss, kept = personal.train(network, data, self.cfg, state, lr=lr, rng=rng)
        return Answer({}, len(data), metrics={"cross_entropy": loss}, state=kept)

    def judged(self, ask: Ask, state: Payload) -> nn.Module:
        """The client's own network."""
        return personal.opened(self.network, state, ask.device)


class LocalOnly:
    """Lets clients train, and averages nothing."""

    Config = LocalOnlyConfig
    requires = needs_clients("student")

    def __init__(
        self,
        cfg: LocalOnlyConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg, self.student = cfg, student
        self.clients = cast(Clients, sources["clients"])
        self.client = LocalOnlyClient(cfg, student)

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """The network that clients start from."""
        return {"student": self.student}

    def offer(self) -> tuple[Payload, Settings]:
        """Nothing: a client has its network."""
        return {}, {}

    def run(self, ctx: Context) -> Iterator[Step]:
        """Ask."""
        cfg, clients = self.cfg, self.clients
        for number in ctx.rounds("federated", cfg.rounds):
            active = clients.sample(cfg.active or clients.count, ctx.rng)
            updates = clients.ask("train", number, active, {}, expects={})
            # A void round leaves everything as it was.
            if updates:
                yield ctx.took("student", mean_loss(updates))

    def result(self) -> Result:
        """The clients keep their networks; here is the one that they started from."""
        return Result("personal models", self.student)

    def passes(self, cfg: LocalOnlyConfig) -> Mapping[str, float]:
        """None at the server: the clients train."""
        return {"student_step": 1.0}
