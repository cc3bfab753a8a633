"""FedGen.

Paper: Data-Free Knowledge Distillation for Heterogeneous Federated Learning, Zhu, Hong, Zhou,
    ICML 2021, arXiv 2105.10056.

Clients whose classes differ train one classifier; the server learns a generator G(z | eps, y) of
features z, which enter a network's last linear layer, the head h. In round r, from 0:
1. A client takes SGD steps on CE(x, y) and, from the second round on, on
   (B_g / B) a_r CE(h(z2), y2), with y2 uniform over the classes that are known and z2 = G(eps, y2),
   and b_r KL(h(G(eps, y)) || p(x)), whose first argument carries no gradient;
   a_r = max(1e-4, a_0 0.98^r), likewise b_r. It sends its network and the counts of its labels.
2. The server trains G on the clients' own heads h_k, before they are averaged:
   sum_k a_k(y) CE(h_k(z), y) + exp(-mean_ij |eps_i - eps_j|^2 / d_eps |z_i - z_j|_1 / d_z), with
   a_k(y) = n_k(y) / sum_j n_j(y) and y uniform over the classes that these clients have.
3. It averages the networks by a base algorithm, FedAvg as published.
Each client's head and counts are seen by the server one by one, so secure aggregation, which hides
them, cannot be had.

`lean` sends the head alone, both ways: each client keeps its own extractor, which starts as the one
it was built with. The global network is then the averaged head on the first, untrained extractor
and good for nothing by itself; what there is to use is each client's own network, see `judged`.

Differs from the paper: with a_0 or b_0 of 0 its term is off (the public code's floor keeps it
    alive). Each sample is weighted by a_k(y) (its code loses that by a broadcast; `label_weighting:
    batch_mean`), and a client has no say on a class that it did not draw (in its code counts begin
    at 1; `count_smoothing: 1`). A class is known once an asked client has had it, not before the
    first round. BatchNorm's statistics are averaged, too (its code leaves them with the clients;
    `bn_policy: local`). The rate of a client goes by the round, not by when it was last asked. The
    lean variant works; in its code it sends nothing. Paper and code differ on the server's term:
    `objective: pooled_logits` is the paper's, as far as it is known to us.

Cost per round: at each active client, for each local step: S forward 1, backward 1, G forward 2
    without gradient. At the server `generator_steps` times: G forward 1, backward 1; all heads at
    once. Sent down are S and G, up S and C counts.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from vestige.core import modes, optim
from vestige.core.federation import (
    Answer,
    Ask,
    ClientData,
    Clients,
    ClientUpdate,
    Payload,
    Settings,
    shapes,
)
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.schedules import Schedule
from vestige.core.types import Batch, Loss, Result, Step, predict
from vestige.federated.bases import BaseTraining, ClientBase, ServerBase
from vestige.federated.labels import SeenLabels, class_shares, uniform_labels
from vestige.federated.latents import GeneratedFeatures
from vestige.federated.local import mean_loss, needs_clients, train_locally
from vestige.federated.sharing import Sharing
from vestige.federated.terms import Terms
from vestige.losses.distill import kl_divergence
from vestige.losses.federated import latent_diversity_loss, pooled_logits, weighted_ensemble_ce
from vestige.models.heads import find_head, stacked_linear
from vestige.models.latent_generators import LatentGenerator


class FedGenConfig(BaseTraining):
    """Settings of FedGen; defaults are those of its public code for MNIST.

    Attributes:
        rounds: of communication. 200.
        local_steps: mini-batch steps of a client in a round. 20, which the code calls epochs. More
            save rounds, and let clients drift further apart within one.
        client_lr_decay: per round. 0.99.
        latent_dim: values of noise, d_eps. 32; 64 for CIFAR.
        hidden_dim: of the generator. 256; 128 for CelebA. Higher costs more at the clients, too.
        embedding: the generator learns codes of the labels. False: one-hot.
        noise: "uniform" in [0, 1), or "normal".
        generator_steps: of the server in a round. 50. Fewer leave it behind the heads.
        generator_batch_size: of the server. 32.
        generator_lr: of Adam, in the first round. 3e-4; 1e-4 for EMNIST. Higher follows the heads
            faster, and is noisier.
        generator_lr_decay: per round. 0.98.
        generator_weight_decay: L2 penalty. 1e-2.
        ensemble_weight: of the cross-entropy of the clients' heads. 1. Higher makes features that
            are surer of their class.
        diversity_weight: of the diversity term. 1; 0 lets features of a class be all the same.
        adversarial_weight: of KL(all heads || global head of before), which the generator
            maximises. 0, off.
        objective: "per_client_ce" sums the clients' losses; "pooled_logits" takes the loss of
            their mean answer, by a_k(y).
        label_weighting: of "per_client_ce": "per_sample", or "batch_mean" as the public code.
        label_weights: a_k(y) by "counts", or "uniform", 1 / K for K clients.
        counts: of labels that a client sends: "drawn" in its batches of the round, or "held" in
            all of its examples.
        count_smoothing: added to each count before a_k(y). 0; 1 in the code, which lets clients
            without a class, whose heads are untrained on it, vote.
        train_generator: False leaves the generator as it was drawn, for comparison.
        generated_weight: a_0, of the cross-entropy of the client's head on generated features. 10;
            higher trusts the generator more against the client's own examples. 0 is off.
        consistency_weight: b_0, of the KL between answers to generated features and to examples of
            the same class. 10; 1 for EMNIST. 0 is off.
        term_decay: of a_r and b_r per round. 0.98. Lower leaves clients to their examples sooner.
        least_weight: floor of a_r and b_r, where they are on. 1e-4.
        generated_batch_size: generated features per client step, B_g. 32.
        lean: only the head is sent, see above.
    """

    rounds: int = Field(200, ge=1)
    local_steps: int | None = Field(20, ge=1)
    client_lr_decay: float = Field(0.99, gt=0, le=1)
    latent_dim: int = Field(32, ge=1)
    hidden_dim: int = Field(256, ge=1)
    embedding: bool = False
    noise: Literal["uniform", "normal"] = "uniform"
    generator_steps: int = Field(50, ge=1)
    generator_batch_size: int = Field(32, ge=2)
    generator_lr: float = Field(3e-4, gt=0)
    generator_lr_decay: float = Field(0.98, gt=0, le=1)
    generator_weight_decay: float = Field(1e-2, ge=0)
    ensemble_weight: float = Field(1.0, ge=0)
    diversity_weight: float = Field(1.0, ge=0)
    adversarial_weight: float = Field(0.0, ge=0)
    objective: Literal["per_client_ce", "pooled_logits"] = "per_client_ce"
    label_weighting: Literal["per_sample", "batch_mean"] = "per_sample"
    label_weights: Literal["counts", "uniform"] = "counts"
    counts: Literal["drawn", "held"] = "drawn"
    count_smoothing: float = Field(0.0, ge=0)
    train_generator: bool = True
    generated_weight: float = Field(10.0, ge=0)
    consistency_weight: float = Field(10.0, ge=0)
    term_decay: float = Field(0.98, gt=0, le=1)
    least_weight: float = Field(1e-4, ge=0)
    generated_batch_size: int = Field(32, ge=1)
    lean: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.lean and self.base != "fedavg":
            raise ValueError(
                f"got lean: true with base {self.base!r}, expected 'fedavg': there is no global "
                "extractor to correct; set base: fedavg or lean: false"
            )
        if self.objective == "pooled_logits" and self.label_weighting == "batch_mean":
            raise ValueError(
                "got label_weighting 'batch_mean' with objective 'pooled_logits', whose answers "
                "are pooled per sample; set label_weighting: per_sample"
            )
        if self.label_weights == "uniform" and self.count_smoothing:
            raise ValueError(
                f"got count_smoothing {self.count_smoothing} with label_weights 'uniform', which "
                "reads no counts; set count_smoothing: 0"
            )
        return self

    def weight(self, start: float, round: int) -> float:
        """A weight that is `start` in round 0: decayed, not below the floor; 0 stays 0."""
        return float(max(self.least_weight, start * self.term_decay**round)) if start else 0.0

    @property
    def generated_share(self) -> float:
        """Generated features for each example of a client's step, B_g / B."""
        return self.generated_batch_size / self.batch_size

    @property
    def uses_generator(self) -> bool:
        """Whether the clients' losses have a term with it."""
        return bool(self.generated_weight or self.consistency_weight)

    def made(self, num_classes: int, feature_dim: int) -> LatentGenerator:
        """A generator of these sizes, its weights drawn by torch's global generator."""
        return LatentGenerator(
            self.latent_dim,
            num_classes,
            feature_dim,
            hidden_dim=self.hidden_dim,
            embedding=self.embedding,
        )

    def optimizer(self, generator: nn.Module, ctx: Context) -> Optimizer:
        """Adam over the generator, its rate falling by rounds."""
        factory = optim.factory("adam", self.generator_lr, weight_decay=self.generator_weight_decay)
        schedule = Schedule(lambda share: self.generator_lr_decay ** (share * self.rounds))
        return ctx.optimizer("generator", generator.parameters(), factory, schedule)

    def noise_of(self, rows: int, rng: torch.Generator) -> Tensor:
        """Noise for so many features, (B, Z), on the device of `rng`."""
        draw = torch.rand if self.noise == "uniform" else torch.randn
        return draw(rows, self.latent_dim, generator=rng, device=rng.device)

    def ensemble_loss(self, logits: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        """The server's term of all heads' answers (K, B, C) to features of these labels."""
        if self.objective == "pooled_logits":
            return F.cross_entropy(pooled_logits(logits, labels, shares), labels)
        return weighted_ensemble_ce(logits, labels, shares, weighting=self.label_weighting)

    def shares(self, counts: Tensor) -> Tensor:
        """a_k(y) of clients with these counts, both (K, C)."""
        if self.label_weights == "uniform":
            return torch.full(counts.shape, 1 / len(counts), device=counts.device)
        return class_shares(counts, self.count_smoothing)

    @property
    def differs(self) -> str:
        """The options that are on, in words; "" is FedGen as published."""
        options = {
            self.base: self.base != "fedavg",
            "lean": self.lean,
            "pooled logits": self.objective == "pooled_logits",
            "weights per batch": self.label_weighting == "batch_mean",
            "uniform weights": self.label_weights == "uniform",
            "random generator": not self.train_generator,
            "adversarial": self.adversarial_weight > 0,
            "no generator at the clients": not self.uses_generator,
        }
        return ", ".join(name for name, on in options.items() if on)


class FedGenClient:
    """Trains the global network on its own examples and on generated features.

    Args:
        cfg: of the method.
        network: gives the form, and in lean mode the first extractor; never trained itself.
        generator: gives the form.
        head: name of the last layer.
        sharing: what goes to the server.
    """

    def __init__(
        self,
        cfg: FedGenConfig,
        network: nn.Module,
        generator: LatentGenerator,
        head: str,
        sharing: Sharing,
    ) -> None:
        self.cfg, self.head, self.sharing = cfg, head, sharing
        self.network, self.generator = copy.deepcopy(network), copy.deepcopy(generator)

    def answer(self, ask: Ask, data: ClientData, state: Payload) -> Answer:
        """The trained network or its head, and how many labels there were of each class."""
        cfg, network = self.cfg, self.judged(ask, state)
        base = ClientBase(cfg, ask, network, state, len(data))
        seen = Terms(data.num_classes, ask.device)
        # It has a stream of its own, so that the batches are those of FedAvg.
        told = GeneratedFeatures.received(ask, self.generator, cfg.noise_of)
        loss = partial(self.loss, seen=seen, told=told, round=ask.round)
        lr, steps, rng = cfg.rate(ask.round), cfg.steps_of(len(data)), ask.rng("batches")
        train_locally(network, data, cfg, lr=lr, rng=rng, loss_fn=loss, correction=base.correct)
        beside, kept = base.kept(network, steps=steps, lr=lr)
        return Answer(
            {"model": self.sharing.returned(network), **beside},
            len(data),
            counts=(seen.counts if cfg.counts == "drawn" else data.counts()).cpu(),
            metrics=seen.means(),
            state={**kept, **self.sharing.kept(network)},
        )

    def loss(
        self,
        network: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        seen: Terms,
        told: GeneratedFeatures | None,
        round: int,
    ) -> Tensor:
        """Step 1 of the algorithm for one batch; `seen` takes note of it."""
        cfg, head = self.cfg, network.get_submodule(self.head)
        logits = predict(network, inputs).logits
        terms = {"cross_entropy": F.cross_entropy(logits, labels)}
        if told is not None and cfg.consistency_weight:
            # Without gradient: the head learns by examples here, not by what they are to match.
            with torch.no_grad():
                wanted = head(told.of(labels))
            divergence = kl_divergence(logits, wanted).mean()
            terms["consistency"] = cfg.weight(cfg.consistency_weight, round) * divergence
        if told is not None and cfg.generated_weight:
            drawn = told.labels(cfg.generated_batch_size, labels.device)
            generated = cfg.generated_share * F.cross_entropy(head(told.of(drawn)), drawn)
            terms["generated"] = cfg.weight(cfg.generated_weight, round) * generated
        return seen.add(labels, terms)

    def judged(self, ask: Ask, state: Payload) -> nn.Module:
        """The global network, with what stays with this client: statistics, or the extractor."""
        network = copy.deepcopy(self.network).to(ask.device)
        self.sharing.opened(network, ask.arrays["model"], state)
        return network


class FedGen:
    """Averages what clients have trained, and learns features on which their heads agree."""

    Config = FedGenConfig
    requires = needs_clients("source", "student")

    def __init__(
        self,
        cfg: FedGenConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg, self.student = cfg, student
        self.clients = cast(Clients, sources["clients"])
        name, self.head = find_head(student, task.spec.shape, task.num_classes)
        self.head_arrays = [f"{name}.{key}".lstrip(".") for key in self.head.state_dict()]
        self.sharing = Sharing(cfg.bn_policy, self.head_arrays if cfg.lean else None)
        self.generator = cfg.made(task.num_classes, self.head.in_features)
        self.seen = SeenLabels(task.num_classes)
        self.client = FedGenClient(cfg, student, self.generator, name, self.sharing)
        self.base = ServerBase(cfg, student, self.clients.count)

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """The two networks, the control variates and the classes that are known."""
        networks = {"student": self.student, "generator": self.generator}
        return {**networks, "base": self.base, "seen": self.seen}

    def offer(self) -> tuple[Payload, Settings]:
        """The global network, or its head."""
        return {"model": self.sharing.offered(self.student)}, {}

    def run(self, ctx: Context) -> Iterator[Step]:
        """Ask, learn from the clients' heads, average."""
        cfg, clients = self.cfg, self.clients
        optimizer = cfg.optimizer(self.generator, ctx)
        expects = {"model": shapes(self.sharing.returned(self.student)), **self.base.expects()}
        modes.train_mode(self.generator)
        for number in ctx.rounds("federated", cfg.rounds):
            active = clients.sample(cfg.active or clients.count, ctx.rng)
            model, _ = self.offer()
            known = self.seen.classes() if cfg.uses_generator else []
            generator, labels = GeneratedFeatures.message(self.generator, known)
            beside, settings = self.base.offer(clients.sizes())
            arrays, settings = {**model, **generator, **beside}, {**labels, **settings}
            updates = clients.ask("train", number, active, arrays, settings, expects=expects)
            # A void round leaves everything as it was.
            if not updates:
                continue
            yield from self.learn(ctx, updates, optimizer)
            after = self.base.aggregate(model["model"], updates, clients.sizes())
            self.student.load_state_dict(after, strict=not cfg.lean)
            yield ctx.took("student", mean_loss(updates))

    def learn(
        self, ctx: Context, updates: Sequence[ClientUpdate], optimizer: Optimizer
    ) -> Iterator[Step]:
        """Step 2 of the algorithm: the generator learns from the heads of these clients."""
        cfg, rng = self.cfg, ctx.generator("latent")
        counts = torch.stack([update.counts for update in updates]).to(ctx.device)
        self.seen.add(counts)
        # Clients may have had nothing to count.
        if not cfg.train_generator or not counts.any():
            return
        heads = [
            torch.stack([update.arrays["model"][name] for update in updates]).to(ctx.device)
            for name in self.head_arrays
        ]
        loss_fn = partial(self.generation, heads=heads, shares=cfg.shares(counts))
        for _ in range(cfg.generator_steps):
            labels = uniform_labels(counts.any(0), cfg.generator_batch_size, rng)
            batch = Batch(latent=cfg.noise_of(len(labels), rng), labels=labels)
            yield ctx.update("source", self.generator, loss_fn, batch, optimizer)

    def generation(
        self, generator: Any, batch: Batch, *, heads: Sequence[Tensor], shares: Tensor
    ) -> Loss:
        """What all heads say of generated features; minimised over the generator.

        Args:
            generator: in train mode.
            batch: noise and labels.
            heads: weights (K, C, D) of the clients' last layers, and biases (K, C) if they have
                some; no gradient.
            shares: a_k(y), (K, C).
        """
        cfg, noise, labels = self.cfg, cast(Tensor, batch.latent), cast(Tensor, batch.labels)
        features = generator(noise, labels)
        logits = stacked_linear(features, *heads)
        ensemble = cfg.ensemble_loss(logits, labels, shares)
        diversity = latent_diversity_loss(noise, features)
        terms = {"ensemble": ensemble, "diversity": diversity}
        total = cfg.ensemble_weight * ensemble + cfg.diversity_weight * diversity
        if cfg.adversarial_weight:
            pooled = pooled_logits(logits, labels, shares)
            terms["adversarial"] = -kl_divergence(self.head(features), pooled).mean()
            total = total + cfg.adversarial_weight * terms["adversarial"]
        return Loss(terms, total)

    def variant(self) -> str:
        """The options that are on; "" is FedGen as published."""
        return self.cfg.differs

    def result(self) -> Result:
        """The global network; in lean mode each client's own, of which only the head is global."""
        return Result("personal models" if self.cfg.lean else "global model", self.student)

    def passes(self, cfg: FedGenConfig) -> Mapping[str, float]:
        """Those of the server: the clients' networks are theirs."""
        steps = float(cfg.generator_steps if cfg.train_generator else 0)
        names = ("generator_forward", "generator_backward", "generator_step")
        return {"student_step": 1.0, **dict.fromkeys(names, steps)}
