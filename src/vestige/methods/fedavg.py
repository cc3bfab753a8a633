"""FedAvg, FedProx, SCAFFOLD and FedDyn: the baselines of federated learning.

Papers: Communication-Efficient Learning of Deep Networks from Decentralized Data, McMahan, Moore,
    Ramage, Hampson, Agüera y Arcas, 2017, arXiv 1602.05629; Federated Optimization in Heterogeneous
    Networks, Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, 2020, arXiv 1812.06127; SCAFFOLD,
    Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, 2020, arXiv 1910.06378; Federated Learning Based
    on Dynamic Regularization, Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, 2021,
    arXiv 2111.04263.

Each round the server sends the global network to some clients. Each trains it on its own examples
and sends it back; the server averages. `base` chooses among the four, see `federated.bases`.

Differs from the papers: nothing.

Cost per round: at each active client, for each local step: S forward 1, backward 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from torch import nn

from vestige.core.federation import Clients, Payload, Settings, sent, shapes
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Requires, Result, Step
from vestige.federated.bases import BaseTraining, ServerBase
from vestige.federated.local import mean_loss, returned
from vestige.federated.trained import TrainingClient


class FedAvgConfig(BaseTraining):
    """Settings of FedAvg and its relatives: those of the clients' training and of the base."""


class FedAvg:
    """Averages what clients have trained."""

    Config = FedAvgConfig
    requires = Requires(sources=("clients",), teachers=(0, 0), roles=("student",), closed_to=("*",))

    def __init__(
        self,
        cfg: FedAvgConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg, self.student = cfg, student
        self.clients = cast(Clients, sources["clients"])
        self.client = TrainingClient(cfg, student)
        self.base = ServerBase(cfg, student, self.clients.count)

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """The global network and the control variates."""
        return {"student": self.student, "base": self.base}

    def offer(self) -> tuple[Payload, Settings]:
        """The global network."""
        return {"model": sent(self.student.state_dict())}, {}

    def run(self, ctx: Context) -> Iterator[Step]:
        """Ask, average."""
        cfg, clients = self.cfg, self.clients
        expects = {
            "model": shapes(returned(self.student, cfg.bn_policy)),
            **self.base.expects(),
        }
        for number in ctx.rounds("federated", cfg.rounds):
            active = clients.sample(cfg.active or clients.count, ctx.rng)
            model, _ = self.offer()
            beside, settings = self.base.offer(clients.sizes())
            updates = clients.ask(
                "train", number, active, {**model, **beside}, settings, expects=expects
            )
            # A void round leaves everything as it was.
            if not updates:
                continue
            self.student.load_state_dict(
                self.base.aggregate(model["model"], updates, clients.sizes())
            )
            yield ctx.took("student", mean_loss(updates))

    def variant(self) -> str:
        """Which of the four."""
        return "" if self.cfg.base == "fedavg" else self.cfg.base

    def result(self) -> Result:
        """The global network."""
        return Result("global model", self.student)

    def passes(self, cfg: FedAvgConfig) -> Mapping[str, float]:
        """None at the server: the clients train."""
        return {"student_step": 1.0}
