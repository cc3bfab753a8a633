"""PRE-DFKD.

Paper: Robust and Resource-Efficient Data-Free Knowledge Distillation by Generative Pseudo Replay,
    Binici, Aggarwal, Pham, Leman, Mitra, AAAI 2022, arXiv 2201.03019.

A small autoencoder remembers what the generator made before, so that the student does not forget
and no image is stored. One iteration, with J the symmetric distance of the softened predictions:
1. generation, once: oh * CE(t, argmax t) + balance * sum_k pbar_k log10 pbar_k - act * mean |f| +
   1 - clamp(J, 0, 1), with the teacher's logits t = T(G(z)), constant in J, its mean prediction
   pbar over the batch and what enters its last layer, f;
2. `student_steps` times with fresh noise: the mean absolute difference of the logits on B new and
   B / 8 remembered images, minimised over S. Codes of remembered images take one Adam step first,
   towards images of which the teacher is sure and that spread over the classes;
3. after the first `memory_steps` of these: encoder and memory generator reconstruct B / 2 of the
   new images and B / 8 that they remember themselves: the mean absolute differences of images and
   of the teacher's logits, and the divergence of the codes from N(0, 1). In the very first
   iteration there is nothing to remember yet.
S and G are in train mode throughout; the memory generator is in eval mode for the student.

Differs from the paper:
    The gradient of the codes' step does not reach the memory generator, to whose gradient the
    reference code adds it by an oversight; `leak_latent_grad` does so, too. A class without any
    probability costs 0, where the reference code has NaN. `generator: pyramid` makes images of any
    size and `generator_head: sigmoid` images in [0, 1]; an encoder fits any size. As in the
    reference code the student is shown images of a memory generator that has learned nothing yet.

Cost per round: `iterations` times: G forward `student_steps` + 1, backward 1; S forward
    `student_steps` + 1, backward `student_steps` full and 1 to its input; with m = `student_steps`
    + `memory_steps` replays: T forward m + `student_steps` + 2 `memory_steps` + 1, backward to its
    input m + `memory_steps` + 1; memory generator forward 2 m + `memory_steps`, backward m +
    `memory_steps`; encoder forward and backward `memory_steps`. `leak_latent_grad` adds one pass of
    memory generator and teacher, forward and backward, to each memory step.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vestige.core import modes, optim, schedules
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Batch, Loss, Requires, Result, Step, predict
from vestige.losses.adversarial import js_disagreement
from vestige.losses.distill import l1_logits
from vestige.losses.prior import activation_loss, class_balance_loss, one_hot_loss
from vestige.methods import _untuned
from vestige.methods._fakes import as_inputs, latent, make_generator
from vestige.models.probes import FeatureProbe, penultimate_layer
from vestige.models.replay_vae import initialize_uniform, replay_networks
from vestige.sources.replay import GenerativeReplay
from vestige.teachers.white_box import module_of


class PreDFKDConfig(BaseModel):
    """Settings of PRE-DFKD; defaults are the reference code's for CIFAR-100.

    Attributes:
        rounds: each of `iterations` iterations. 400 (reference code).
        iterations: 36 (reference code).
        student_steps: 10 (reference code).
        memory_steps: of the student's steps, after which the memory is taught. 4 (reference code).
            Higher remembers better and costs more; at most `student_steps` of them take place.
        batch_size: B, 1024 (reference code). Small batches hurt: the balance is one of a batch.
        replay: remembered images as a share of B, at least 2. 1/8 (reference code). Higher forgets
            less and sees relatively fewer new images. 0: without memory, to compare with.
        student_optimizer: "sgd" (reference code) with momentum 0.9, or "adam" (for MNIST).
        student_lr: 0.1 (reference code, SGD).
        student_weight_decay: 5e-4 (reference code).
        schedule: of the student's rate: "cosine" (reference code), "multistep" or "constant".
        milestones: of "multistep" as shares of the rounds, x0.1 each.
        generator_lr: of Adam, constant. 0.02 (reference code).
        memory_lr: of Adam, of both networks of the memory. 5e-4 (reference code: generator_lr/40).
        latent_lr: of the codes' one step. 0.02 (reference code: generator_lr).
        one_hot_weight: 1 (reference code), of G and of the codes' step.
        balance_weight: 5 (reference code), of G and of the codes' step; base 10.
        activation_weight: 0.1 (reference code).
        adversarial_weight: of 1 - clamp(J, 0, 1). 1 (reference code). Higher leads the student
            more.
        js_temperature: of J, 3 (reference code).
        divergence_weight: of the codes' divergence. 1e-5 (reference code).
        leak_latent_grad: as the reference code by an oversight; off.
        spectral_norm: of G's convolutions, on (reference code); keeps it from moving in leaps.
        generator: "upsample" (the paper's) or "pyramid" (any size).
        generator_head: "tanh_bn" (reference code) or "sigmoid" (images in [0, 1]).
        generator_width: 64 (reference code), also of the memory; cost grows with its square.
        latent_dim: 1000 (reference code), also of the memory's codes.
        inner_eps: eps of the inner BNs of all three. 0.8 (reference code).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(400, ge=1)
    iterations: int = Field(36, ge=1)
    student_steps: int = Field(10, ge=1)
    memory_steps: int = Field(4, ge=1)
    batch_size: int = Field(1024, ge=2)
    replay: float = Field(0.125, ge=0, le=1)
    student_optimizer: optim.OptimizerName = "sgd"
    student_lr: float = Field(0.1, gt=0)
    student_weight_decay: float = Field(5e-4, ge=0)
    schedule: schedules.ScheduleName = "cosine"
    milestones: tuple[schedules.Share, ...] = (0.5, 0.75)
    generator_lr: float = Field(0.02, gt=0)
    memory_lr: float = Field(5e-4, gt=0)
    latent_lr: float = Field(0.02, ge=0)
    one_hot_weight: float = Field(1.0, ge=0)
    balance_weight: float = Field(5.0, ge=0)
    activation_weight: float = Field(0.1, ge=0)
    adversarial_weight: float = Field(1.0, ge=0)
    js_temperature: float = Field(3.0, gt=0)
    divergence_weight: float = Field(1e-5, ge=0)
    leak_latent_grad: bool = False
    spectral_norm: bool = True
    generator: Literal["upsample", "pyramid"] = "upsample"
    generator_head: Literal["tanh_bn", "sigmoid"] = "tanh_bn"
    generator_width: int = Field(64, ge=1)
    latent_dim: int = Field(1000, ge=1)
    inner_eps: float = Field(0.8, gt=0)


class PreDFKD:
    """A student that learns from new images and from those that a small network remembers."""

    Config = PreDFKDConfig
    requires = Requires(tasks=("classification",), roles=("student", "source", "auxiliary"))

    def __init__(
        self,
        cfg: PreDFKDConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg = cfg
        self.spec = task.spec
        self.teacher = teachers[0]
        self.student = student
        self.generator = make_generator(
            cfg, task.spec, inner_eps=cfg.inner_eps, spectral=cfg.spectral_norm
        )
        initialize_uniform(self.generator)
        self.encoder, self.memory_generator = replay_networks(
            task.spec,
            latent_dim=cfg.latent_dim,
            width=cfg.generator_width,
            generator=cfg.generator,
            head=cfg.generator_head,
            inner_eps=cfg.inner_eps,
        )
        self.memory = GenerativeReplay(
            self.teacher,
            self.encoder,
            self.memory_generator,
            lambda made: as_inputs(made, cfg, task.spec),
            one_hot_weight=cfg.one_hot_weight,
            balance_weight=cfg.balance_weight,
            latent_lr=cfg.latent_lr,
            divergence_weight=cfg.divergence_weight,
            leak_latent_grad=cfg.leak_latent_grad,
        )
        network = module_of(self.teacher)
        self.probe = FeatureProbe(network, [penultimate_layer(network)], of="input")

    @classmethod
    def suggest(
        cls, task: Task, teachers: Sequence[Teacher], student: nn.Module
    ) -> Mapping[str, Any]:
        """Settings for networks and inputs that nobody tuned; our choices, not the paper's."""
        return _untuned.generative(
            task,
            teachers[0],
            student,
            lambda given: make_generator(PreDFKDConfig(**given), task.spec),
            {"student_steps": 5, "memory_steps": 2, "memory_lr": 2e-3, "batch_size": 128},
        )

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """The four networks that are trained."""
        return {
            "student": self.student,
            "generator": self.generator,
            "encoder": self.encoder,
            "memory_generator": self.memory_generator,
        }

    def run(self, ctx: Context) -> Iterator[Step]:
        """The paper's loop: one generation, then imitations, the memory taught after some."""
        cfg = self.cfg
        imitator = optim.factory(
            cfg.student_optimizer, cfg.student_lr, weight_decay=cfg.student_weight_decay
        )
        student_optimizer = ctx.optimizer(
            "student",
            self.student.parameters(),
            imitator,
            schedules.named(cfg.schedule, cfg.milestones),
        )
        generator_optimizer = ctx.optimizer(
            "generator", self.generator.parameters(), optim.factory("adam", cfg.generator_lr)
        )
        memory = [*self.encoder.parameters(), *self.memory_generator.parameters()]
        memory_optimizer = ctx.optimizer("memory", memory, optim.factory("adam", cfg.memory_lr))
        modes.train_mode(self.student)
        self.generator.train()

        for round_index in ctx.rounds("distill", cfg.rounds):
            for iteration in range(cfg.iterations):
                noise = Batch(latent=latent(cfg.batch_size, cfg.latent_dim, ctx))
                yield ctx.update(
                    "source", self.generator, self.generation, noise, generator_optimizer
                )
                own = self.replayed if round_index or iteration else 0
                for step in range(cfg.student_steps):
                    fresh, batch = self.fakes(ctx)
                    yield ctx.update(
                        "student", self.student, self.imitation, batch, student_optimizer
                    )
                    if self.replayed and step < cfg.memory_steps:
                        half = fresh[: max(2, cfg.batch_size // 2)]
                        target, net = self.memory.target(half, own, ctx.rng), self.memory_generator
                        yield ctx.update(
                            "auxiliary", net, self.memory.loss, target, memory_optimizer
                        )

    def generation(self, generator: Any, batch: Batch) -> Loss:
        """What a good image is to the teacher, and 1 - J; minimised over the generator."""
        cfg = self.cfg
        inputs = as_inputs(generator(batch.latent), cfg, self.spec)
        with self.probe:
            teacher = predict(self.teacher, inputs)
        (features,) = self.probe.features()
        answer = predict(self.student, inputs)
        known = teacher.logits.detach()
        distance = js_disagreement(
            answer.logits, known, temperature=cfg.js_temperature, reduction="element"
        )
        terms = {
            "one_hot": batch.mean(one_hot_loss(teacher.logits)),
            "class_balance": class_balance_loss(teacher.logits, base=10.0),
            "activation": batch.mean(activation_loss(features)),
            "adversarial": 1 - batch.mean(distance).clamp(0, 1),
        }
        total = (
            cfg.one_hot_weight * terms["one_hot"]
            + cfg.balance_weight * terms["class_balance"]
            + cfg.activation_weight * terms["activation"]
            + cfg.adversarial_weight * terms["adversarial"]
        )
        return Loss(terms, total, inputs, teacher, answer)

    def imitation(self, student: Any, batch: Batch) -> Loss:
        """The mean absolute difference of the logits, minimised over the student."""
        inputs = batch.inputs
        with torch.no_grad():
            teacher = predict(self.teacher, inputs)
        answer = predict(student, inputs)
        distance = batch.mean(l1_logits(answer.logits, teacher.logits))
        fresh = batch.extra.get("fresh")
        return Loss({"disagreement": distance}, distance, inputs, teacher, answer, fresh)

    def fakes(self, ctx: Context) -> tuple[Tensor, Batch]:
        """New images, and a batch that starts with them, followed by remembered ones."""
        cfg = self.cfg
        with torch.no_grad():
            noise = latent(cfg.batch_size, cfg.latent_dim, ctx)
            fresh = as_inputs(self.generator(noise), cfg, self.spec)
        old = [self.memory.draw(self.replayed, ctx.rng)] if self.replayed else []
        inputs = torch.cat([fresh, *old])
        is_new = torch.arange(len(inputs), device=inputs.device) < len(fresh)
        return fresh, Batch(inputs, extra={"fresh": is_new})

    @property
    def replayed(self) -> int:
        """Remembered images in a batch; a single one would have no batch statistics."""
        return max(2, round(self.cfg.replay * self.cfg.batch_size)) * bool(self.cfg.replay)

    def result(self) -> Result:
        """The trained student."""
        return Result("student", self.student)

    def passes(self, cfg: PreDFKDConfig) -> Mapping[str, float]:
        """Passes of each network per round; see the module docstring."""
        n, k = cfg.iterations, cfg.student_steps
        m = min(cfg.memory_steps, k) if cfg.replay else 0
        # Of the memory's own replays those of the first iteration are left out.
        own = m * (n - 1 / cfg.rounds)
        replays, leaked = n * k * bool(cfg.replay) + own, own * cfg.leak_latent_grad
        passes = {
            "generator_forward": n * (k + 1),
            "generator_backward": n,
            "generator_step": n,
            "teacher_forward": n * (k + 2 * m + 1) + replays + leaked,
            "teacher_backward_to_input": n * (m + 1) + replays + leaked,
            "student_forward": n * (k + 1),
            "student_backward": n * k,
            "student_backward_to_input": n,
            "student_step": n * k,
            "encoder_forward": n * m,
            "encoder_backward": n * m,
            "encoder_step": n * m,
            "memory_generator_forward": n * m + 2 * replays + leaked,
            "memory_generator_backward": n * m + replays + leaked,
            "memory_generator_step": n * m,
        }
        return {name: float(count) for name, count in passes.items()}
