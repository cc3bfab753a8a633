"""FedAvg, FedProx, SCAFFOLD and FedDyn: the baselines of federated learning.

Paper: Communication-Efficient Learning of Deep Networks from Decentralized Data, McMahan, Moore,
    Ramage, Hampson, Agüera y Arcas, 2017, arXiv 1602.05629; Federated Optimization in Heterogeneous
    Networks, Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, 2020, arXiv 1812.06127; SCAFFOLD,
    Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, 2020, arXiv 1910.06378; Federated Learning Based
    on Dynamic Regularization, Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, 2021,
    arXiv 2111.04263.

Each round the server sends the global network to some clients. Each trains it on its own examples
and sends it back; the server averages. `base` chooses among the four, see `federated.bases`.

After the last round each client may tune the global network for itself (`tune_epochs`), the usual
reference of personalised federated learning.

Differs from the paper: nothing without `tune_epochs`.

Cost per round: at each active client, for each local step: S forward 1, backward 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from pydantic import Field
from torch import nn

from vestige.core.federation import (
    Answer,
    Ask,
    ClientData,
    Clients,
    Payload,
    Settings,
    sent,
)
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Result, Step
from vestige.federated import personal
from vestige.federated.bases import BaseTraining, ServerBase
from vestige.federated.local import mean_loss, needs_clients
from vestige.federated.trained import TrainingClient, train_round


class FedAvgConfig(BaseTraining):
    """Settings of FedAvg and its relatives: those of the clients' training and of the base.

    Attributes:
        tune_epochs: passes of each client over its own examples after the last round, from the
            global network; what comes of it stays with the client, who uses it from then on. 0, the
            papers', leaves all with the global network. Higher fits a client's own mix of classes
            better, and may forget what the others have told.
    """

    tune_epochs: int = Field(0, ge=0)


class FedAvgClient:
    """Trains the global network on its own examples, and tunes it for itself in the end.

    Args:
        cfg: of the method.
        network: gives the form; never trained itself.
    """

    def __init__(self, cfg: FedAvgConfig, network: nn.Module) -> None:
        self.cfg, self.training = cfg, TrainingClient(cfg, network)

    def answer(self, ask: Ask, data: ClientData, state: Payload) -> Answer:
        """The trained network; nothing where the client tunes it for itself."""
        cfg = self.cfg
        if ask.kind != "tune":
            return self.training.answer(ask, data, state)
        network = self.training.judged(ask, state)
        tuning = cfg.model_copy(update={"local_epochs": cfg.tune_epochs, "local_steps": None})
        lr, rng = cfg.rate(ask.round), ask.rng("batches")
        loss, kept = personal.train(network, data, tuning, {}, lr=lr, rng=rng)
        return Answer({}, len(data), metrics={"cross_entropy": loss}, state={**state, **kept})

    def judged(self, ask: Ask, state: Payload) -> nn.Module:
        """The global network, or what this client has tuned it to."""
        if "network" in state:
            return personal.opened(self.training.network, state, ask.device)
        return self.training.judged(ask, state)


class FedAvg:
    """Averages what clients have trained."""

    Config = FedAvgConfig
    requires = needs_clients("student")

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
        self.client = FedAvgClient(cfg, student)
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
        for number in ctx.rounds("federated", cfg.rounds):
            updates, after = train_round(clients, self.base, self.student, number, ctx.rng)
            # A void round leaves everything as it was.
            if not updates:
                continue
            self.student.load_state_dict(after)
            yield ctx.took("student", mean_loss(updates))
        # Everyone, whoever was active: each is to have a network of its own.
        for _ in ctx.rounds("tune", 1) if cfg.tune_epochs else ():
            model, _ = self.offer()
            updates = clients.ask("tune", cfg.rounds, range(clients.count), model, expects={})
            if updates:
                yield ctx.took("student", mean_loss(updates))

    def variant(self) -> str:
        """Which of the four, and whether clients tune it for themselves."""
        base = "" if self.cfg.base == "fedavg" else self.cfg.base
        return ", ".join(filter(None, (base, "tuned" if self.cfg.tune_epochs else "")))

    def result(self) -> Result:
        """The global network."""
        return Result("global model", self.student)

    def passes(self, cfg: FedAvgConfig) -> Mapping[str, float]:
        """None at the server: the clients train."""
        return {"student_step": 1.0}
