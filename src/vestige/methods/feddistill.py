"""FedDistill.

Paper: Communication-Efficient On-Device Machine Learning: Federated Distillation and Augmentation
    under Non-IID Private Data, Jeong, Oh, Kim, Park, Bennis, Kim, 2018, arXiv 1811.11479; here in
    the form in which FedGen (arXiv 2105.10056) compares itself with it.

Clients send what their networks answer on the average, not the networks. Each round:
1. A client takes SGD steps on CE(x, y) and, from the second round on, on
   l KL(softmax(m(y)) || p(x)), with m(y) the global mean logits of class y.
2. It sends the mean of its own logits over the examples of each class that it drew, m_k(y).
3. The server takes m(y) = mean of m_k(y) over the clients that drew class y.
A class that no client of the round drew keeps the m(y) it had. One that none ever drew has no term.

As published no weights are shared: each client keeps its own network, which starts as the one it
was built with, and the global network stays as it was made and is good for nothing; what there is
to use is each client's own network, see `judged`. `share_weights` averages the networks as well,
by a base algorithm: FedDistill+.

Differs from the paper: in the paper, as far as it is known to us, m(y) leaves out the client that
    learns from it; FedGen's code, like this one, does not. In FedGen's code a client's mean runs
    over all rounds and is drawn to 0 by a count that begins at 1, and clients without a class take
    part with a mean of 0, which `average_over: all` does as well.

Cost per round: at each active client, for each local step: S forward 1, backward 1. Sent are C x C
    numbers each way; with `share_weights` S as well.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.federation import (
    Answer,
    Ask,
    ClientData,
    Clients,
    Payload,
    Settings,
    sent,
    shapes,
)
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Result, Step, predict
from vestige.federated.bases import BaseTraining, ClientBase, ServerBase
from vestige.federated.class_logits import ClassLogits, sums_by_class
from vestige.federated.local import mean_loss, needs_clients, train_locally
from vestige.federated.sharing import Sharing
from vestige.federated.terms import Terms
from vestige.losses.distill import kl_divergence


class FedDistillConfig(BaseTraining):
    """Settings of FedDistill; defaults are those of FedGen's public code.

    Attributes:
        rounds: of communication. 200.
        local_steps: mini-batch steps of a client in a round. 20.
        client_lr_decay: per round. 0.99.
        share_weights: average the networks, too. False; True is FedDistill+.
        distillation_weight: l. 1; higher holds answers nearer to the mean of their class, 0 leaves
            each client to itself, or to the base algorithm.
        average_over: m(y) is the mean over the clients that are "holders" of class y, or over "all"
            that answered, those without it counting 0: softer answers to rare classes.
    """

    rounds: int = Field(200, ge=1)
    local_steps: int | None = Field(20, ge=1)
    client_lr_decay: float = Field(0.99, gt=0, le=1)
    share_weights: bool = False
    distillation_weight: float = Field(1.0, ge=0)
    average_over: Literal["holders", "all"] = "holders"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.share_weights and self.base != "fedavg":
            raise ValueError(
                f"got base {self.base!r} with share_weights: false, which averages no networks; "
                "set base: fedavg or share_weights: true"
            )
        return self


class FedDistillClient:
    """Trains a network on its own examples and on the mean answers of all clients.

    Args:
        cfg: of the method.
        network: gives the form, and where no weights are shared the first ones; never trained
            itself.
        sharing: what goes to the server of the network.
    """

    def __init__(self, cfg: FedDistillConfig, network: nn.Module, sharing: Sharing) -> None:
        self.cfg, self.network, self.sharing = cfg, copy.deepcopy(network), sharing

    def answer(self, ask: Ask, data: ClientData, state: Payload) -> Answer:
        """Mean logits by class, how many examples they are of, and the network if it is shared."""
        cfg, classes = self.cfg, data.num_classes
        network = self.judged(ask, state)
        base = ClientBase(cfg, ask, network, state, len(data))
        seen = Terms(classes, ask.device)
        sums = torch.zeros(classes, classes, device=ask.device)
        told = "class-logits" in ask.arrays
        means = ask.arrays["class-logits"]["means"].to(ask.device) if told else sums.clone()
        known = torch.zeros(classes, dtype=torch.bool, device=ask.device)
        known[cast(list[int], ask.settings.get("labels", []))] = True

        def loss(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
            logits = predict(network, inputs).logits
            sums.add_(sums_by_class(logits, labels))
            terms = {"cross_entropy": F.cross_entropy(logits, labels)}
            if told and cfg.distillation_weight:
                apart = kl_divergence(logits, means[labels]) * known[labels]
                terms["distillation"] = cfg.distillation_weight * apart.mean()
            return seen.add(labels, terms)

        lr, steps, rng = cfg.rate(ask.round), cfg.steps_of(len(data)), ask.rng("batches")
        train_locally(network, data, cfg, lr=lr, rng=rng, loss_fn=loss, correction=base.correct)
        beside, kept = base.kept(network, steps=steps, lr=lr)
        own = {"means": sums / seen.counts.clamp_min(1)[:, None]}
        model = {"model": self.sharing.returned(network)} if cfg.share_weights else {}
        return Answer(
            {"class-logits": sent(own), **model, **beside},
            len(data),
            counts=seen.counts.cpu(),
            metrics=seen.means(),
            state={**kept, **self.sharing.kept(network)},
        )

    def judged(self, ask: Ask, state: Payload) -> nn.Module:
        """The global network with what stays with this client: statistics, or all of it."""
        network = copy.deepcopy(self.network).to(ask.device)
        self.sharing.opened(network, ask.arrays.get("model", {}), state)
        return network


class FedDistill:
    """Averages what clients answer to each class, and their networks if asked."""

    Config = FedDistillConfig
    requires = needs_clients("student")

    def __init__(
        self,
        cfg: FedDistillConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg, self.student = cfg, student
        self.clients = cast(Clients, sources["clients"])
        self.sharing = Sharing(cfg.bn_policy, None if cfg.share_weights else ())
        self.client = FedDistillClient(cfg, student, self.sharing)
        self.base = ServerBase(cfg, student, self.clients.count)
        self.answers = ClassLogits(task.num_classes, over_all=cfg.average_over == "all")

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """The global network, the control variates and the mean answers."""
        return {"student": self.student, "base": self.base, "answers": self.answers}

    def offer(self) -> tuple[Payload, Settings]:
        """The global network, if there is one."""
        return {"model": self.sharing.offered(self.student)} if self.cfg.share_weights else {}, {}

    def run(self, ctx: Context) -> Iterator[Step]:
        """Ask, average the answers, average the networks."""
        cfg, clients, answers = self.cfg, self.clients, self.answers
        expects = {"class-logits": {"means": tuple(answers.means.shape)}, **self.base.expects()}
        if cfg.share_weights:
            expects["model"] = shapes(self.sharing.returned(self.student))
        for number in ctx.rounds("federated", cfg.rounds):
            active = clients.sample(cfg.active or clients.count, ctx.rng)
            model, _ = self.offer()
            beside, settings = self.base.offer(clients.sizes())
            means, known = answers.message()
            arrays, settings = {**model, **means, **beside}, {**known, **settings}
            updates = clients.ask("train", number, active, arrays, settings, expects=expects)
            # A void round leaves everything as it was.
            if not updates:
                continue
            answers.add(
                torch.stack([update.arrays["class-logits"]["means"] for update in updates]),
                torch.stack([update.counts for update in updates]),
            )
            if cfg.share_weights:
                after = self.base.aggregate(model["model"], updates, clients.sizes())
                self.student.load_state_dict(after)
            yield ctx.took("student", mean_loss(updates))

    def variant(self) -> str:
        """The options that are on; "" is FedDistill as published."""
        cfg = self.cfg
        options = {
            "shared weights": cfg.share_weights,
            cfg.base: cfg.base != "fedavg",
            "mean over all clients": cfg.average_over == "all",
        }
        return ", ".join(name for name, on in options.items() if on)

    def result(self) -> Result:
        """The global network; without shared weights each client's own."""
        return Result("global model" if self.cfg.share_weights else "personal models", self.student)

    def passes(self, cfg: FedDistillConfig) -> Mapping[str, float]:
        """None at the server: the clients train."""
        return {"student_step": 1.0}
