"""DFAD.

Paper: Data-Free Adversarial Distillation, Fang, Song, Shen, Wang, Chen, Song, 2019,
    arXiv 1912.11006.

The min-max idea came earlier in ZSKT (arXiv 1905.09768), which the authors ask to cite first.

One iteration, with D(S, T; x) the mean absolute difference of the logits over batch and classes:
1. imitation, `student_steps` times with fresh noise: x = G(z) without gradient, minimise D over S;
2. generation, once with fresh noise: maximise D over G, as -D (classification) or -log(D + 1).
S and G are in train mode throughout, T in eval mode. Rates follow a schedule per round, where a
round is `iterations` iterations (the paper's "epoch" of 50).

Differs from the paper:
    The teacher is frozen and gives its answers to the student without a graph; same result, less
    work. Schedules step at the end of a round; the reference code steps some at the start.
    Options that are off by default, because as published the generator can wander from class to
    class and the student forgets: `bn_weight` (match the teacher's BatchNorm statistics),
    `balance_weight` (spread the batch over the classes), `one_hot_weight` (fakes of which the
    teacher is sure), `replay` (mix earlier fakes into the student's batch), `student_mode: eval`
    (no batch statistics of the student for G to exploit), `units: relative` (terms that weigh the
    same for every teacher), `recolour` and `turn` (both players see fakes through views that are
    drawn anew for each, since a G of images keeps to one scheme of colours and one direction of
    textures). A run that uses one is not DFAD as published and is to be named so. On
    small networks with BatchNorm, of those that were tried alone only the first mends it
    (benchmarks/claims/dfad-remedies.json). `generator: pyramid` makes images of any size and
    `generator_head: sigmoid` images in [0, 1]; both are for inputs that the paper did not have.

Cost per round: `iterations` times: G forward `student_steps` + 1, backward 1; T forward
    `student_steps` + 1, backward to its input 1; S forward `student_steps` + 1, backward
    `student_steps` full and 1 to its input.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vestige.core import modes, optim, schedules
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Batch, Loss, Requires, Result, Step, predict
from vestige.losses.adversarial import disagreement_loss, log_form
from vestige.losses.prior import class_balance_loss, one_hot_loss
from vestige.losses.statistics import bn_statistics_loss
from vestige.methods import _untuned
from vestige.methods._fakes import as_inputs, latent, make_generator
from vestige.models.probes import BatchNormProbe
from vestige.sources.memory import RingMemory
from vestige.sources.views import draw_views, viewed
from vestige.teachers.white_box import module_of

_LEAST_LOGIT = 1e-6


class DFADConfig(BaseModel):
    """Settings of DFAD; defaults are the reference code's for CIFAR-10.

    Attributes:
        rounds: each of `iterations` iterations. 500 (reference code); more is better and slower.
        iterations: of one generation stage each. 50 (reference code).
        student_steps: imitation steps per iteration. 5 (paper). Higher follows a fast generator
            better, lower lets the generator lead.
        batch_size: 256 (reference code). Small batches hurt, since G's BatchNorm sees fewer images.
        student_optimizer: "sgd" (reference code) with momentum 0.9, or "adam".
        student_lr: 0.1 (reference code, SGD). Higher is faster until it diverges.
        student_weight_decay: 5e-4 (reference code).
        generator_lr: of Adam. 1e-3 (reference code). Higher makes the generator move on sooner.
        schedule: of both rates. "multistep" (reference code), "cosine" or "constant".
        milestones: of "multistep" as shares of the rounds, x0.1 each. 100 and 200 of 500 epochs.
        generator: "upsample" (the paper's generator A), "dcgan" (generator B, larger images) or
            "pyramid" (A with as many upsamplings as the size needs, any size).
        generator_head: of "upsample" and "pyramid". "tanh_bn" (reference code) makes batches of
            mean 0 and variance 1, "sigmoid" images in [0, 1], for teachers that take those.
        generator_width: 64 (reference code); cost grows with its square.
        latent_dim: 256 (reference code).
        log_form: use -log(D + 1) for G, as the paper does for segmentation; None follows the task.
        student_mode: of S in the generation stage. "train" (reference code) or "eval".
        bn_weight: of the BatchNorm-statistics term in G's loss. 0 (paper). Higher keeps fakes near
            the statistics of the teacher's training data, too high makes them all alike.
        balance_weight: of the class-balance term in G's loss. 0 (paper). Higher spreads a batch
            over the classes.
        one_hot_weight: of DAFL's one-hot term in G's loss. 0 (paper). Higher makes fakes of which
            the teacher is sure.
        replay: share of the student's batch taken from earlier fakes, in [0, 1), at least one row
            if above 0. 0 (paper). Higher forgets less and sees fewer new fakes.
        replay_size: earlier fakes kept. 4096, our choice: 16 batches of 256.
        units: of the terms in G's loss. "absolute" (reference code) takes logits and the sum of
            BatchNorm statistics as they are, so their balance depends on the teacher. "relative"
            divides D by the teacher's mean absolute logit and takes the mean over layers of
            dimensionless BatchNorm distances, so one `bn_weight` suits many teachers.
        recolour: strength, in [0, 1], of the random colours that fakes get before both networks see
            them, also in the generation stage. 0 (paper). 1 for teachers to which colour says
            little, less where it tells the class; of images in [0, 1], so mind `generator_head`.
        turn: above 0 each fake is, with probability 1/2, turned by up to so many degrees, zoomed by
            0.8 to 1.25 and mirrored at random. 0 (paper). 180 where no direction is up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(500, ge=1)
    iterations: int = Field(50, ge=1)
    student_steps: int = Field(5, ge=1)
    batch_size: int = Field(256, ge=2)
    student_optimizer: optim.OptimizerName = "sgd"
    student_lr: float = Field(0.1, gt=0)
    student_weight_decay: float = Field(5e-4, ge=0)
    generator_lr: float = Field(1e-3, gt=0)
    schedule: schedules.ScheduleName = "multistep"
    milestones: tuple[schedules.Share, ...] = (0.2, 0.4)
    generator: Literal["upsample", "dcgan", "pyramid"] = "upsample"
    generator_head: Literal["tanh_bn", "sigmoid"] = "tanh_bn"
    generator_width: int = Field(64, ge=1)
    latent_dim: int = Field(256, ge=1)
    log_form: bool | None = None
    student_mode: Literal["train", "eval"] = "train"
    bn_weight: float = Field(0.0, ge=0)
    balance_weight: float = Field(0.0, ge=0)
    one_hot_weight: float = Field(0.0, ge=0)
    replay: float = Field(0.0, ge=0, lt=1)
    replay_size: int = Field(4096, ge=1)
    units: Literal["absolute", "relative"] = "absolute"
    recolour: float = Field(0.0, ge=0, le=1)
    turn: float = Field(0.0, ge=0, le=180)


class DFAD:
    """Alternates a student that imitates and a generator that looks for disagreement."""

    Config = DFADConfig
    requires = Requires(tasks=("classification", "segmentation"), roles=("student", "source"))

    def __init__(
        self,
        cfg: DFADConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg = cfg
        self.teacher = teachers[0]
        self.student = student
        self.spec = task.spec
        self.generator = make_generator(cfg, task.spec)
        self.log_form = task.kind == "segmentation" if cfg.log_form is None else cfg.log_form
        self.memory = RingMemory(cfg.replay_size)
        # Found once: a teacher without BatchNorm is refused here, not in the first step.
        self.probe = BatchNormProbe(module_of(self.teacher)) if cfg.bn_weight else None

    @classmethod
    def suggest(
        cls, task: Task, teachers: Sequence[Teacher], student: nn.Module
    ) -> Mapping[str, Any]:
        """Settings for networks and inputs that nobody tuned; our choices, not the paper's."""

        def generator(settings: Mapping[str, Any]) -> nn.Module:
            return make_generator(DFADConfig(**settings), task.spec)

        return _untuned.adversarial(task, teachers[0], student, generator)

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """Student, generator and the memory of earlier fakes."""
        return {"student": self.student, "generator": self.generator, "memory": self.memory}

    def run(self, ctx: Context) -> Iterator[Step]:
        """The paper's loop: `student_steps` imitations, then one generation."""
        cfg = self.cfg
        rates = schedules.named(cfg.schedule, cfg.milestones)
        student_optimizer = ctx.optimizer(
            "student",
            self.student.parameters(),
            optim.factory(
                cfg.student_optimizer, cfg.student_lr, weight_decay=cfg.student_weight_decay
            ),
            rates,
        )
        generator_optimizer = ctx.optimizer(
            "generator",
            self.generator.parameters(),
            optim.factory("adam", cfg.generator_lr),
            rates,
        )
        modes.train_mode(self.student)
        self.generator.train()

        for _ in ctx.rounds("distill", cfg.rounds):
            for _ in range(cfg.iterations):
                for _ in range(cfg.student_steps):
                    fresh, batch = self.fakes(ctx)
                    yield ctx.update(
                        "student", self.student, self.imitation, batch, student_optimizer
                    )
                if cfg.replay:
                    self.memory.push(fresh)
                drawn = latent(cfg.batch_size, cfg.latent_dim, ctx)
                noise = Batch(latent=drawn, extra=self.views(ctx))
                yield ctx.update(
                    "source", self.generator, self.generation, noise, generator_optimizer
                )

    def imitation(self, student: Any, batch: Batch) -> Loss:
        """D(S, T; x), minimised over the student."""
        inputs = batch.inputs
        with torch.no_grad():
            teacher = predict(self.teacher, inputs)
        answer = predict(student, inputs)
        distance = batch.mean(disagreement_loss(answer.logits, teacher.logits))
        terms, fresh = {"disagreement": distance}, batch.extra.get("fresh")
        return Loss(terms, distance, inputs, teacher, answer, fresh)

    def generation(self, generator: Any, batch: Batch) -> Loss:
        """-D(S, T; G(z)), or -log(D + 1), and the options; minimised over the generator."""
        cfg = self.cfg
        inputs = as_inputs(generator(batch.latent), cfg, self.spec)
        inputs = viewed(inputs, batch.extra, self.spec)
        with self.probe or nullcontext():
            teacher = predict(self.teacher, inputs)
        with modes.evaluating(self.student) if cfg.student_mode == "eval" else nullcontext():
            answer = predict(self.student, inputs)
        distance = batch.mean(disagreement_loss(answer.logits, teacher.logits))
        relative = cfg.units == "relative"
        if relative:
            # A constant per batch: what G can gain is disagreement, not small logits.
            size = batch.mean(teacher.logits.detach().abs().flatten(1).mean(1))
            distance = distance / size.clamp_min(_LEAST_LOGIT)
        terms = {"adversarial": -(log_form(distance) if self.log_form else distance)}
        total = terms["adversarial"]
        if self.probe is not None:
            terms["bn_statistics"] = bn_statistics_loss(
                self.probe.observed(), self.probe.stored(), norm="relative" if relative else "l2"
            )
            total = total + cfg.bn_weight * terms["bn_statistics"]
        if cfg.balance_weight:
            terms["class_balance"] = class_balance_loss(teacher.logits)
            total = total + cfg.balance_weight * terms["class_balance"]
        if cfg.one_hot_weight:
            terms["one_hot"] = batch.mean(one_hot_loss(teacher.logits))
            total = total + cfg.one_hot_weight * terms["one_hot"]
        return Loss(terms, total, inputs, teacher, answer)

    @torch.no_grad()
    def fakes(self, ctx: Context) -> tuple[Tensor, Batch]:
        """Fresh fakes, and a batch that starts with them, followed by earlier ones if asked."""
        cfg = self.cfg
        wanted = min(cfg.batch_size - 1, max(1, round(cfg.replay * cfg.batch_size)))
        replayed = wanted if cfg.replay and len(self.memory) else 0
        noise = latent(cfg.batch_size - replayed, cfg.latent_dim, ctx)
        fresh = as_inputs(self.generator(noise), cfg, self.spec)
        if not replayed:
            return fresh, Batch(viewed(fresh, self.views(ctx), self.spec))
        inputs = torch.cat([fresh, self.memory.draw(replayed, ctx.rng)])
        is_new = torch.arange(len(inputs), device=inputs.device) < len(fresh)
        inputs = viewed(inputs, self.views(ctx), self.spec)
        return fresh, Batch(inputs, extra={"fresh": is_new})

    def views(self, ctx: Context) -> dict[str, Tensor]:
        """How the images of a batch are looked at; nothing is drawn where that is off."""
        cfg = self.cfg
        return draw_views(cfg.batch_size, self.spec, ctx.rng, recolour=cfg.recolour, turn=cfg.turn)

    def variant(self) -> str:
        """The options that are on, in words; "" is DFAD as published."""
        options = {
            "BN statistics": self.cfg.bn_weight > 0,
            "class balance": self.cfg.balance_weight > 0,
            "one-hot": self.cfg.one_hot_weight > 0,
            "replay": self.cfg.replay > 0,
            "student in eval mode": self.cfg.student_mode == "eval",
            "relative units": self.cfg.units == "relative",
            "recolouring": self.cfg.recolour > 0,
            "turning": self.cfg.turn > 0,
        }
        return ", ".join(name for name, on in options.items() if on)

    def result(self) -> Result:
        """The trained student."""
        return Result("student", self.student)

    def passes(self, cfg: DFADConfig) -> Mapping[str, float]:
        """Passes of each network per round; see the module docstring."""
        n, k = cfg.iterations, cfg.student_steps
        observed = n if cfg.bn_weight else 0
        passes = {
            "generator_forward": n * (k + 1),
            "generator_backward": n,
            "teacher_forward": n * (k + 1) - observed,
            "teacher_backward_to_input": n - observed,
            "teacher_observed": observed,
            "student_forward": n * (k + 1),
            "student_backward": n * k,
            "student_backward_to_input": n,
            "student_step": n * k,
            "generator_step": n,
        }
        return {name: float(count) for name, count in passes.items()}
