"""FedEnsemble.

Paper: none of its own; a baseline of Data-Free Knowledge Distillation for Heterogeneous Federated
    Learning, Zhu, Hong, Zhou, ICML 2021, arXiv 2105.10056.

FedAvg, or a relative of it, see `federated.bases`; but what one gets is not the global network. It
is all clients' networks, each as it was when its client was last asked, whose logits are summed.

Differs from the paper: a client that was never asked has no say, and before the first round all
    answer as the global network does (its code gives every client the newest global network in each
    round, so one that is not asked answers as that does).

Cost per round: at each active client, for each local step: S forward 1, backward 1. Not comparable
    with a method that makes one network: the server keeps N networks for N clients, and each
    prediction costs up to N forwards.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from torch import nn

from vestige.core.federation import Clients, Payload, Settings, sent
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Result, Step
from vestige.federated.bases import ServerBase
from vestige.federated.local import mean_loss, needs_clients
from vestige.federated.trained import train_round
from vestige.methods.fedavg import FedAvgClient, FedAvgConfig
from vestige.models.ensembles import MemberEnsemble


class FedEnsembleConfig(FedAvgConfig):
    """Settings of FedEnsemble: those of the clients' training and of the base.

    With a `bn_policy` other than "average" the networks have the statistics that the global network
    started with, since those of the clients never leave them.
    """


class FedEnsemble:
    """Averages what clients have trained, and keeps what it averaged."""

    Config = FedEnsembleConfig
    requires = needs_clients("student")

    def __init__(
        self,
        cfg: FedEnsembleConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg, self.student = cfg, student
        self.clients = cast(Clients, sources["clients"])
        self.client = FedAvgClient(cfg, student)
        self.base = ServerBase(cfg, student, self.clients.count)
        self.ensemble = MemberEnsemble(student, self.clients.count)

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """The global network, the clients' networks and the control variates."""
        return {"student": self.student, "ensemble": self.ensemble, "base": self.base}

    def offer(self) -> tuple[Payload, Settings]:
        """The global network."""
        return {"model": sent(self.student.state_dict())}, {}

    def run(self, ctx: Context) -> Iterator[Step]:
        """Ask, keep, average."""
        cfg, clients = self.cfg, self.clients
        for number in ctx.rounds("federated", cfg.rounds):
            updates, after = train_round(clients, self.base, self.student, number, ctx.rng)
            # A void round leaves everything as it was.
            if not updates:
                continue
            for update in updates:
                self.ensemble.fill(update.partition, update.arrays["model"])
            self.student.load_state_dict(after)
            yield ctx.took("student", mean_loss(updates))

    def variant(self) -> str:
        """Which base algorithm."""
        return "" if self.cfg.base == "fedavg" else self.cfg.base

    def result(self) -> Result:
        """All clients' networks together."""
        return Result("ensemble", self.ensemble)

    def passes(self, cfg: FedEnsembleConfig) -> Mapping[str, float]:
        """None at the server: the clients train."""
        return {"student_step": 1.0}
