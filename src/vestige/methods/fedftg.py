"""FedFTG.

Paper: Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID Federated Learning,
    Zhang, Shen, Ding, Tao, Duan, 2022, arXiv 2203.09249.

A step at the server after any algorithm that averages weights (`base`). With w the average, w_k the
networks that the active clients sent and n_k^y their label counts, in each round:
1. labels y ~ p(y) proportional to sum_k n_k^y; weights a_k(y) = n_k^y / sum_j n_j^y (eq. 9);
2. `iterations` times, with one batch of noise z: G maximises
   sum_k a_k(y) KL(D(x; w) || D(x; w_k)) - `fidelity_weight` sum_k a_k(y) CE(D(x; w_k), y)
   - `diversity_weight` exp(-mean of |x_i - x_j| |z_i - z_j|^2) with x = G(z, y);
3. then w takes `student_steps` steps towards sum_k a_k(y) softmax(D(x; w_k)) on the same x.
The next round begins from the fine-tuned w, which is also what FedProx, SCAFFOLD and FedDyn refer
to. G is kept over the rounds, the optimizers are not. `averaged` has w from before step 2. The
server works with single clients' networks, so what they send cannot be encrypted as a sum.

Differs from the paper:
    Where the public code departs from the formulas, the formulas are the default and the code is
    an option: it has G maximise the mean difference of logits, the clients' ones constant
    (`discrepancy: l1_logits`), in one Adam step per client (`generator_update: sequential`), takes
    the mean over the classes in step 3 (`student_reduction: mean`, which divides the rate by the
    number of classes), lets BatchNorm take up statistics of fakes (`student_bn: train`) and weights
    the clients' cross-entropies by batch instead of by sample (`class_weights_per_sample: false`).
    What the clients say to the fakes is computed once per iteration, not per step: same result.
    `base: fedprox` pulls towards the global network, in the public code towards zero. Clients do
    not augment their images.

Cost per round: at each of K active clients, for each local step: S forward 1, backward 1. At the
    server `iterations` times, with g = `generator_steps`, K times as many if sequential: G forward
    g + 1, backward g; S forward g + `student_steps`, backward `student_steps`, to its input g; each
    client's network forward g + 1, backward to its input g.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from vestige.core import modes, optim
from vestige.core.federation import Clients, ClientUpdate, Payload, Settings, sent
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Batch, Loss, Prediction, Result, Step, predict
from vestige.federated.bases import BaseTraining, ServerBase
from vestige.federated.local import freeze_statistics, mean_loss, needs_clients
from vestige.federated.stacked import ClientEnsemble
from vestige.federated.trained import TrainingClient, train_round
from vestige.losses.federated import (
    ensemble_discrepancy,
    ensemble_probabilities,
    latent_diversity_loss,
    soft_cross_entropy,
    weighted_ensemble_ce,
)
from vestige.models.factory import build_conditional_generator

_LEAST_PROBABILITY = 1e-12


class FedFTGConfig(BaseTraining):
    """Settings of FedFTG; defaults are those of the reference code for CIFAR-10 where it says so.

    Attributes:
        rounds: of communication. 1000 (reference code).
        local_epochs: passes over a client's examples in a round. 5 (reference code).
        batch_size: of a client. 50 (reference code).
        client_lr: of SGD, in the first round. 0.1 (reference code).
        client_lr_decay: per round. 0.998 (reference code).
        client_weight_decay: of SGD. 1e-3 (reference code).
        clip: largest norm of a client's gradient. 10 (reference code).
        iterations: of fine-tuning in a round. 10 (reference code). 0 leaves the base algorithm.
        generator_steps: of G per iteration. 1 (reference code), of each client if sequential.
        student_steps: of the global network per iteration. 5 (reference code). Higher follows the
            clients further on images that are only fakes; 0 leaves the base algorithm.
        server_batch_size: fakes per iteration. 50 (reference code).
        student_lr: of SGD at the server, in the first round. 0.01: the reference code's 0.1 under
            its mean over 10 classes; with `student_reduction: mean` set 0.1. Higher moves further
            from the average.
        generator_lr: of Adam, in the first round. 0.01 (reference code).
        server_lr_decay: of both rates, per round. 0.998 (reference code).
        student_weight_decay: of SGD at the server. 1e-3 (reference code).
        discrepancy_weight: of the term by which G looks for fakes on which the global network and
            the clients differ. 1 (reference code). 0 leaves it out: fakes that clients know, but
            not the hard ones.
        fidelity_weight: of the clients' cross-entropy in G's loss. 1 (reference code). Higher makes
            fakes clearer, and easier.
        diversity_weight: of the term that keeps fakes apart. 1 (reference code).
        discrepancy: "kl" (paper) or "l1_logits" (reference code).
        generator_update: "joint" (paper: one step on the sum over clients) or "sequential"
            (reference code: one step per client, so K times as many).
        student_reduction: "batchmean" (paper: KL, up to a constant) or "mean" (reference code), 1
            over the number of classes of it.
        student_bn: BatchNorm of the global network while it is fine-tuned. "frozen", our choice,
            keeps the averaged statistics; "train" (reference code) replaces them within a round by
            those of fakes.
        class_weights_per_sample: weight each sample's cross-entropy by a_k of its class (paper);
            false takes the mean of the weights times the mean of the cross-entropies (reference
            code), which also asks a client for classes that it never saw.
        label_sampling: "counts" (paper) draws classes as the active clients have them, "uniform"
            those that they have with equal shares.
        ensemble_weights: "counts" (paper, eq. 9) or "uniform", 1 / K for each client and class.
        latent_dim: Z of G. 100 (reference code; 256 for CIFAR-100).
        generator_width: of G. 64 (reference code). Cost grows with its square.
        generator_head: "tanh_bn" (reference code) makes inputs of mean 0 and variance 1, "sigmoid"
            images in [0, 1], for networks that take those.
        chunk: client networks that are computed at once. 8, our choice. More are faster on a GPU
            and take more memory; 1 calls one after another, often as fast on a CPU.
    """

    rounds: int = Field(1000, ge=1)
    local_epochs: int = Field(5, ge=1)
    batch_size: int = Field(50, ge=1)
    client_lr: float = Field(0.1, gt=0)
    client_lr_decay: float = Field(0.998, gt=0, le=1)
    client_weight_decay: float = Field(1e-3, ge=0)
    clip: float | None = Field(10.0, gt=0)
    iterations: int = Field(10, ge=0)
    generator_steps: int = Field(1, ge=0)
    student_steps: int = Field(5, ge=0)
    server_batch_size: int = Field(50, ge=2)
    student_lr: float = Field(0.01, gt=0)
    generator_lr: float = Field(0.01, gt=0)
    server_lr_decay: float = Field(0.998, gt=0, le=1)
    student_weight_decay: float = Field(1e-3, ge=0)
    discrepancy_weight: float = Field(1.0, ge=0)
    fidelity_weight: float = Field(1.0, ge=0)
    diversity_weight: float = Field(1.0, ge=0)
    discrepancy: Literal["kl", "l1_logits"] = "kl"
    generator_update: Literal["joint", "sequential"] = "joint"
    student_reduction: Literal["batchmean", "mean"] = "batchmean"
    student_bn: Literal["frozen", "train"] = "frozen"
    class_weights_per_sample: bool = True
    label_sampling: Literal["counts", "uniform"] = "counts"
    ensemble_weights: Literal["counts", "uniform"] = "counts"
    latent_dim: int = Field(100, ge=1)
    generator_width: int = Field(64, ge=1)
    generator_head: Literal["tanh_bn", "sigmoid"] = "tanh_bn"
    chunk: int = Field(8, ge=1)


class FedFTG:
    """Averages what clients have trained, and fine-tunes the average with their networks."""

    Config = FedFTGConfig
    requires = needs_clients("student", "source")

    def __init__(
        self,
        cfg: FedFTGConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg, self.spec, self.student = cfg, task.spec, student
        self.clients = cast(Clients, sources["clients"])
        self.client = TrainingClient(cfg, student, counts=True)
        self.base = ServerBase(cfg, student, self.clients.count)
        form = {"latent_dim": cfg.latent_dim, "width": cfg.generator_width}
        self.generator = build_conditional_generator(
            task.spec, task.num_classes, **form, head=cfg.generator_head
        )
        self.averaged = copy.deepcopy(student).requires_grad_(False)

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """The global network, it before this round's fine-tuning, G and the control variates."""
        return {
            "student": self.student,
            "averaged": self.averaged,
            "generator": self.generator,
            "base": self.base,
        }

    def offer(self) -> tuple[Payload, Settings]:
        """The global network, fine-tuned."""
        return {"model": sent(self.student.state_dict())}, {}

    def run(self, ctx: Context) -> Iterator[Step]:
        """Ask, average, fine-tune."""
        modes.train_mode(self.student)
        self.generator.train()
        if self.cfg.student_bn == "frozen":
            freeze_statistics(self.student)
        for number in ctx.rounds("federated", self.cfg.rounds):
            updates, after = train_round(self.clients, self.base, self.student, number, ctx.rng)
            if not updates:
                continue
            self.student.load_state_dict(after)
            self.averaged.load_state_dict(after)
            yield ctx.took("student", mean_loss(updates))
            # Of clients that counted nothing nobody knows whom to believe about what.
            if self.cfg.iterations and any(update.counts.any() for update in updates):
                yield from self.fine_tuning(ctx, number, updates)

    def fine_tuning(self, ctx: Context, number: int, updates: list[ClientUpdate]) -> Iterator[Step]:
        """The alternation of G and the global network, with optimizers of this round's own."""
        cfg = self.cfg
        ensemble, rate = self.ensemble(updates, ctx.device), cfg.server_lr_decay**number
        decay = cfg.student_weight_decay
        sgd = optim.factory("sgd", rate * cfg.student_lr, momentum=0.0, weight_decay=decay)
        weights = [weight for weight in self.student.parameters() if weight.requires_grad]
        student_optimizer = ctx.optimizer("student", weights, sgd, fresh=True)
        adam = optim.factory("adam", rate * cfg.generator_lr)
        weights = list(self.generator.parameters())
        generator_optimizer = ctx.optimizer("generator", weights, adam, fresh=True)
        turns = ensemble.turns(one_by_one=cfg.generator_update == "sequential")
        noise, rng = ctx.generator("latent"), ctx.generator("labels")
        count, by_counts = cfg.iterations * cfg.server_batch_size, cfg.label_sampling == "counts"
        drawn = ensemble.labels(count, rng, by_counts=by_counts)
        for labels in drawn.split(cfg.server_batch_size):
            size = (len(labels), cfg.latent_dim)
            latent = torch.randn(size, generator=noise, device=ctx.device)
            batch = Batch(latent=latent, labels=labels)
            for _ in range(cfg.generator_steps):
                for members in turns:
                    loss_fn = partial(self.generation, ensemble=ensemble, members=members)
                    yield ctx.update("source", self.generator, loss_fn, batch, generator_optimizer)
            lesson = self.lesson(batch, ensemble) if cfg.student_steps else batch
            for _ in range(cfg.student_steps):
                yield ctx.update("student", self.student, self.imitation, lesson, student_optimizer)

    def generation(
        self, generator: Any, batch: Batch, *, ensemble: ClientEnsemble, members: range
    ) -> Loss:
        """Hard, clear and different fakes for `members`; minimised over G."""
        cfg, share = self.cfg, len(members) / ensemble.networks.count
        shares = ensemble.shares[members.start : members.stop]
        latent, labels = cast(Tensor, batch.latent), cast(Tensor, batch.labels)
        inputs = self.as_inputs(generator(latent, labels))
        with modes.evaluating(self.student):
            answer = predict(self.student, inputs)
        clients, weights = ensemble.networks(inputs, members), shares[:, labels]
        distance = ensemble_discrepancy(answer.logits, clients, weights, kind=cfg.discrepancy)
        form = "per_sample" if cfg.class_weights_per_sample else "batch_mean"
        terms = {
            "discrepancy": -batch.mean(distance),
            "fidelity": weighted_ensemble_ce(clients, labels, shares, weighting=form),
            # One term for the batch: in parts, where members come in turn.
            "diversity": share * latent_diversity_loss(latent, inputs),
        }
        total = cfg.discrepancy_weight * terms["discrepancy"]
        total = total + cfg.fidelity_weight * terms["fidelity"]
        total = total + cfg.diversity_weight * terms["diversity"]
        known = _as_prediction(ensemble_probabilities(clients, weights))
        return Loss(terms, total, inputs, known if share == 1 else None, answer)

    @torch.no_grad()
    def lesson(self, batch: Batch, ensemble: ClientEnsemble) -> Batch:
        """Fakes with what the clients say to them, each about the classes that it has."""
        labels = cast(Tensor, batch.labels)
        with modes.evaluating(self.generator):
            inputs = self.as_inputs(self.generator(batch.latent, labels))
        return Batch(inputs, labels, extra={"target": ensemble.probabilities(inputs, labels)})

    def imitation(self, student: Any, batch: Batch) -> Loss:
        """Soft cross-entropy with the clients' answers, minimised over the global network."""
        target = batch.extra["target"]
        answer = predict(student, batch.inputs)
        each = soft_cross_entropy(answer.logits, target, reduction=self.cfg.student_reduction)
        terms = {"soft_cross_entropy": batch.mean(each)}
        return Loss(
            terms, terms["soft_cross_entropy"], batch.inputs, _as_prediction(target), answer
        )

    def ensemble(self, updates: Sequence[ClientUpdate], device: torch.device) -> ClientEnsemble:
        """The networks of this round's clients, and whom to believe about which class."""
        return ClientEnsemble.of(
            updates,
            self.averaged,
            by_counts=self.cfg.ensemble_weights == "counts",
            chunk=self.cfg.chunk,
            device=device,
        )

    def as_inputs(self, made: Tensor) -> Tensor:
        """G's output as inputs of the networks; differentiable."""
        return self.spec.normalize(made) if self.cfg.generator_head == "sigmoid" else made

    def variant(self) -> str:
        """The base algorithm if it is not FedAvg, and the options that are on."""
        cfg = self.cfg
        options = {
            cfg.base: cfg.base != "fedavg",
            "without hard samples": not cfg.discrepancy_weight,
            "uniform labels": cfg.label_sampling == "uniform",
            "uniform weights": cfg.ensemble_weights == "uniform",
            "difference of logits": cfg.discrepancy == "l1_logits",
            "one step per client": cfg.generator_update == "sequential",
            "mean over classes": cfg.student_reduction == "mean",
            "BatchNorm of fakes": cfg.student_bn == "train",
            "weights by batch": not cfg.class_weights_per_sample,
        }
        return ", ".join(name for name, on in options.items() if on)

    def result(self) -> Result:
        """The global network, fine-tuned."""
        return Result("global model", self.student)

    def passes(self, cfg: FedFTGConfig) -> Mapping[str, float]:
        """Those at the server; the clients train, and their networks are called as copies."""
        turns = 1 if cfg.generator_update == "joint" else cfg.active or self.clients.count
        n, g, k = cfg.iterations, cfg.generator_steps * turns, cfg.student_steps
        passes = {
            "generator_forward": n * (g + bool(k)),
            "generator_backward": n * g,
            "generator_step": n * g,
            "student_forward": n * (g + k),
            "student_backward": n * k,
            "student_backward_to_input": n * g,
            # One more for what the clients did.
            "student_step": n * k + 1,
        }
        return {name: float(count) for name, count in passes.items() if count}


def _as_prediction(probs: Tensor) -> Prediction:
    return Prediction(probs.detach().clamp_min(_LEAST_PROBABILITY).log())
