"""FedD2S, our reading: personal networks whose layers leave the federation from deep to shallow.

Paper: FedD2S: Personalized Data-Free Federated Knowledge Distillation, Atapour, Seyedmohammadi,
    Abouei, Mohammadi, Plataniotis, 2024, arXiv 2402.10846. Its text was not at hand and no code is
    public. From its abstract and a summary of it are: no shared data set; local-to-global and
    global-to-local distillation, both by cross-entropy and KL divergence; a global head that turns
    representations into soft labels; deep layers that drop out as rounds pass. What follows is a
    definition of our own with these properties. It reproduces nothing, and no figure is compared.

A network is blocks f^1 .. f^L. In round t the cut is c = D[min(t // drop_every, |D| - 1)], for the
dropping set D from deep to shallow; R(x) is what blocks 1..c make of x.
1. Upload: an active client sends R(x), p = softmax(f(x) / T) and y of its examples.
2. Local to global: the server trains the head h, blocks c+1..L of the global network, by
   CE(h(R), y) + a T^2 KL(p || softmax(h(R) / T)).
3. Global to local: the client trains by CE(f(x), y) + b [CE(h(R(x)), y) + T^2 KL(q || softmax(
   f(x) / T))] with q = softmax(h(R(x)) / T). h is frozen, and the KL term moves blocks 1..c alone:
   dropped blocks learn from the client's own labels only.
All blocks of a client stay with it.

What leaves a client: R(x), p and y of single examples, never x and no weight. The shallower the
cut, the more R(x) tells of x: the schedule makes it tell more as rounds pass. `feature_clip` and
`feature_noise` blur R(x), with no accounted guarantee; p and y are sent as they are.

Differs from the paper: unknown beyond what is said above. Losses and weights, temperature,
schedule, optimizers and warm-up are our choice. A client warms up when it is first asked.

Cost per round: at each active client S forward 1 over what it uploads, and for each local step S
forward 1, blocks c+1..L forward 2 more, backward 1, one more through either; at the server for each
batch of uploads blocks c+1..L forward 1, backward 1, and one forward more for `soft-labels`.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core import modes
from vestige.core.federation import (
    Answer,
    Ask,
    ClientData,
    Clients,
    ClientUpdate,
    Payload,
    Settings,
    sent,
)
from vestige.core.functional import functional
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Batch, Loss, Result, Step, predict
from vestige.federated import personal, uploads
from vestige.federated.local import batches, mean_loss, needs_clients
from vestige.federated.personal import PersonalTraining
from vestige.federated.uploads import Disclosure
from vestige.losses.distill import soft_label_divergence
from vestige.models.blocks import Blocks, Segment


class FedD2SConfig(PersonalTraining, Disclosure):
    """Settings of FedD2S, of the clients' training and of what they disclose; all our choice.

    Attributes:
        blocks: of each block the names of its child modules in the order in which they run; null
            takes the children of an `nn.Sequential`, see `models.blocks`.
        dropping_set: cuts from deep to shallow: blocks up to the cut take part. Null is L-1, .., 1.
            [1] drops at once all that can be dropped.
        drop_every: rounds at each cut, at the last one all that remain; null stays at the first.
            Lower makes layers personal sooner.
        warmup_epochs: passes by cross-entropy that a client makes when it is first asked, so that
            its first upload carries signal. 0 for none.
        transport: "head" sends the global head, which then judges the representations of the
            moment; "soft-labels" sends q of the uploaded examples alone, which grow old while the
            client trains, and leaves CE(h(R(x)), y) out.
        temperature: T of all soft labels, in both directions.
        head_weight: a, of what clients' soft labels tell the head beside the labels. 0 is a
            supervised head.
        client_weight: b, of what the head tells a client. 0 is training alone.
        head_epochs: passes of the server over the round's uploads.
        head_batch_size: of the server.
        head_lr: of the server's SGD.
        head_momentum: of the server's SGD; lives on from round to round.
        client_momentum: of SGD; lives on from round to round with the client's network.
    """

    client_momentum: float = Field(0.9, ge=0, lt=1)
    blocks: tuple[tuple[str, ...], ...] | None = None
    dropping_set: tuple[int, ...] | None = None
    drop_every: int | None = Field(15, ge=1)
    warmup_epochs: int = Field(1, ge=0)
    transport: Literal["head", "soft-labels"] = "head"
    temperature: float = Field(3.0, gt=0)
    head_weight: float = Field(1.0, ge=0)
    client_weight: float = Field(1.0, ge=0)
    head_epochs: int = Field(1, ge=1)
    head_batch_size: int = Field(32, ge=1)
    head_lr: float = Field(0.01, gt=0)
    head_momentum: float = Field(0.9, ge=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        cuts = self.dropping_set
        if cuts is not None and (not cuts or list(cuts) != sorted(set(cuts), reverse=True)):
            raise ValueError(
                f"got dropping_set {list(cuts)}, expected cuts from deep to shallow, each once, "
                "for example [4, 3, 2, 1]; sort them, or null for all"
            )
        return self

    def cut(self, round: int, cuts: Sequence[int]) -> int:
        """The cut in `round`, from 0, whoever was asked before."""
        passed = 0 if self.drop_every is None else round // self.drop_every
        return cuts[min(passed, len(cuts) - 1)]


class FedD2SClient:
    """Uploads representations, and trains a network of its own with the head's advice.

    Args:
        cfg: of the method.
        network: that every client starts from; never trained itself.
    """

    def __init__(self, cfg: FedD2SConfig, network: nn.Module) -> None:
        self.cfg, self.network = cfg, copy.deepcopy(network)

    def answer(self, ask: Ask, data: ClientData, state: Payload) -> Answer:
        """Representations for "upload", numbers alone for "train"."""
        return (self.upload if ask.kind == "upload" else self.train)(ask, data, state)

    def judged(self, ask: Ask, state: Payload) -> nn.Module:
        """The client's own network."""
        return personal.opened(self.network, state, ask.device)

    def upload(self, ask: Ask, data: ClientData, state: Payload) -> Answer:
        """R(x), soft labels, labels and the numbers of the examples."""
        cfg, network, kept = self.cfg, self.judged(ask, state), None
        if not state and cfg.warmup_epochs:
            warming = cfg.model_copy(
                update={"local_epochs": cfg.warmup_epochs, "local_steps": None}
            )
            lr, rng = cfg.rate(ask.round), ask.rng("warm-up")
            _, kept = personal.train(network, data, warming, state, lr=lr, rng=rng)
        shuffled = torch.randperm(len(data), generator=ask.rng("upload"))
        rows = shuffled[: cfg.upload_examples].sort().values.to(data.inputs.device)
        trunk, tail = self.split(network.eval(), ask)
        found = uploads.represented(trunk, tail, data.inputs[rows], temperature=cfg.temperature)
        uploaded = {
            "features": uploads.disclosed(found[0], cfg, rng=ask.rng("noise")),
            "soft_labels": found[1],
            "labels": data.labels[rows],
            "rows": rows,
        }
        return Answer({"upload": sent(uploaded)}, len(rows), state=kept)

    def train(self, ask: Ask, data: ClientData, state: Payload) -> Answer:
        """Nothing but its mean loss: what it has learned stays with it."""
        cfg, network = self.cfg, self.judged(ask, state)
        trunk, tail = self.split(network, ask)
        head = self.head(ask) if cfg.transport == "head" else None
        # Zeros, which pull nowhere, for examples that were not uploaded.
        advice = torch.zeros(len(data), data.num_classes, device=data.inputs.device)
        if received := ask.arrays.get("advice"):
            advice[received["rows"].to(advice.device)] = received["soft_labels"].to(advice)

        def loss_of(rows: Tensor) -> Tensor:
            labels = data.labels[rows]
            representation = trunk(data.inputs[rows])
            own = F.cross_entropy(predict(tail, representation).logits, labels)
            if not cfg.client_weight:
                return own
            # The same values; no gradient for dropped blocks.
            fixed = {name: weight.detach() for name, weight in tail.named_parameters()}
            student = predict(functional(tail, fixed), representation).logits
            if head is not None:
                logits = predict(head, representation).logits
                own = own + cfg.client_weight * F.cross_entropy(logits, labels)
                target = F.softmax(logits.detach() / cfg.temperature, 1)
            else:
                target = advice[rows]
            apart = soft_label_divergence(student, target, temperature=cfg.temperature)
            return own + cfg.client_weight * apart.mean()

        lr, rng = cfg.rate(ask.round), ask.rng("batches")
        loss, kept = personal.train(network, data, cfg, state, lr=lr, rng=rng, loss_of=loss_of)
        return Answer({}, len(data), metrics={"client_loss": loss}, state=kept)

    def head(self, ask: Ask) -> Segment:
        """The global head as it was sent, frozen."""
        _, head = self.split(copy.deepcopy(self.network).to(ask.device), ask)
        head.load_state_dict(dict(ask.arrays["head"]))
        return head.eval().requires_grad_(False)

    def split(self, network: nn.Module, ask: Ask) -> tuple[Segment, Segment]:
        """Blocks that take part in this round, and blocks that do not."""
        # From the message: a client that was not asked for long has no count of its own to go by.
        return Blocks(network, self.cfg.blocks).split_at(cast(int, ask.settings["cut"]))


class FedD2S:
    """Trains a global head on what clients upload, and hands it to them."""

    Config = FedD2SConfig
    requires = needs_clients("student")

    def __init__(
        self,
        cfg: FedD2SConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg, self.student, self.num_classes = cfg, student, task.num_classes
        self.clients = cast(Clients, sources["clients"])
        self.client = FedD2SClient(cfg, student)
        blocks = Blocks(student, cfg.blocks)
        self.shapes = blocks.shapes(task.spec)
        self.cuts = cfg.dropping_set or tuple(range(len(blocks) - 1, 0, -1))
        # Refuses cuts that these blocks do not have.
        self.heads = {cut: blocks.split_at(cut)[1] for cut in self.cuts}

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """The global network, of which blocks behind the last cut are trained."""
        return {"student": self.student}

    def offer(self) -> tuple[Payload, Settings]:
        """Nothing: a client has its network."""
        return {}, {}

    def run(self, ctx: Context) -> Iterator[Step]:
        """Uploads, local to global, global to local."""
        cfg, clients = self.cfg, self.clients
        # Blocks join when the cut moves; until then they get no gradient and stay. Not fused: that
        # kernel fails where only some weights have a momentum.
        factory = partial(torch.optim.SGD, lr=cfg.head_lr, momentum=cfg.head_momentum, foreach=True)
        optimizer = ctx.optimizer("head", self.heads[min(self.cuts)].parameters(), factory)
        modes.train_mode(self.student)
        for number in ctx.rounds("federated", cfg.rounds):
            cut = cfg.cut(number, self.cuts)
            active = clients.sample(cfg.active or clients.count, ctx.rng)
            expects = uploads.expected(self.shapes[cut - 1], self.num_classes)
            answers = clients.ask("upload", number, active, {}, {"cut": cut}, expects=expects)
            given = uploads.usable(answers, self.num_classes)
            # A void round leaves everything as it was.
            if not given:
                continue
            head = self.heads[cut]
            pool = uploads.pooled(given, ctx.device)
            steps = cfg.head_epochs * -(-len(pool) // cfg.head_batch_size)
            for rows in batches(len(pool), cfg.head_batch_size, steps, ctx.rng):
                yield ctx.update("student", head, self.imitation, pool.rows(rows), optimizer)
            partitions = [one.partition for one in given]
            offered, each = self.advice(head, given, ctx.device)
            updates = clients.ask(
                "train", number, partitions, offered, {"cut": cut}, expects={}, each=each
            )
            if updates:
                yield ctx.took("student", mean_loss(updates))

    def imitation(self, head: Any, batch: Batch) -> Loss:
        """Local to global: CE and KL of the head on uploads, minimised over the head."""
        cfg = self.cfg
        logits = predict(head, batch.inputs).logits
        labels = cast(Tensor, batch.labels)
        told = batch.mean(F.cross_entropy(logits, labels, reduction="none"))
        target = batch.extra["soft_labels"]
        apart = batch.mean(soft_label_divergence(logits, target, temperature=cfg.temperature))
        return Loss({"cross_entropy": told, "distillation": apart}, told + cfg.head_weight * apart)

    def advice(
        self, head: Segment, given: Sequence[ClientUpdate], device: torch.device
    ) -> tuple[Payload, Mapping[int, Payload] | None]:
        """The head for all, or for each client soft labels of its own examples."""
        if self.cfg.transport == "head":
            return {"head": sent(head.state_dict())}, None
        each = {}
        with modes.evaluating(self.student):
            for one in given:
                arrays = one.arrays["upload"]
                features = arrays["features"].to(device).float()
                told = uploads.soft_labels(head, features, temperature=self.cfg.temperature)
                each[one.partition] = {
                    "advice": sent({"soft_labels": told, "rows": arrays["rows"]})
                }
        return {}, each

    def variant(self) -> str:
        """The options that are on, in words; "" is the schedule with a head that is sent."""
        static = "static cut" if self.cfg.drop_every is None or len(self.cuts) == 1 else ""
        told = "soft labels" if self.cfg.transport == "soft-labels" else ""
        return ", ".join(filter(None, (static, told)))

    def result(self) -> Result:
        """The clients keep their networks; here is the global one, a head on untrained blocks."""
        return Result("personal models", self.student)

    def passes(self, cfg: FedD2SConfig) -> Mapping[str, float]:
        """Not told: they go by how much the clients upload."""
        return {}
