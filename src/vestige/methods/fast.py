"""Fast.

Paper: Up to 100x Faster Data-free Knowledge Distillation, Fang, Mo, Wang, Song, Bei, Zhang, Song,
    AAAI 2022, arXiv 2112.06253.

A pool of images is inverted batch by batch, each in a few steps, because the generator starts from
weights that are good to start from. For a batch with wanted classes y:
1. G' = a copy of the meta generator G, z normal noise; Adam over both, `inversion_steps` times:
   x = G'(z), minimise bn * L_bn + oh * CE(T(x), y) - adv * KL(T || S) where both agree. L_bn
   compares statistics smoothed over batches: the mean of what came before counts `bn_momentum`.
2. The iteration with the lowest loss goes into the pool.
3. G takes one step along the sum of the gradients of G' (first-order MAML), or towards the last G'
   (Reptile), with Adam at `generator_lr * inversion_steps`.
After a warm-up without it, the student imitates the teacher on batches of the pool.

Differs from the paper:
    `meta: none` starts each batch from newly drawn weights, which is what CMI does: the arm that
    shows what meta learning is worth. The reference code draws the first layers of G anew once,
    after 120 batches, BatchNorm weights around 0; here it is an option, off, and around 1.
    `generator: pyramid` makes images of any size.

Cost per round: `batches_per_round * inversion_steps` times: G forward and backward; T forward and
    backward to its input, S the same with `adversarial_weight`. `student_steps` times: T forward;
    S forward, backward.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim import Optimizer

from vestige.core import modes, optim, schedules
from vestige.core.protocols import (
    Context,
    OptimizerFactory,
    Sharded,
    Source,
    Stateful,
    Task,
    Teacher,
)
from vestige.core.types import Batch, Loss, Requires, Result, Step, predict
from vestige.losses.prior import one_hot_loss
from vestige.losses.statistics import Smoothing, bn_statistics_loss
from vestige.methods import _pool, _untuned
from vestige.models.generators import reinitialize
from vestige.models.probes import BatchNormProbe
from vestige.sources.augment import draw_shifts, shift
from vestige.sources.pool import Pool
from vestige.sources.pool_mix import PoolMix
from vestige.teachers.white_box import module_of

_REPTILE = 67.0


class FastConfig(BaseModel):
    """Settings of Fast; defaults are the reference code's for CIFAR-10, WRN-40-2 to WRN-16-1.

    Attributes:
        rounds: each of `batches_per_round` batches, then `student_steps` steps. 200 (reference
            code). 0 stops after the synthesis: the result is the pool.
        warmup: batches synthesised before the student's first step, never adversarial. 20
            (reference code).
        batches_per_round: batches synthesised per round. 1 (reference code); 0 adds none.
        inversion_steps: per batch. 10 (reference code: 2, 5 or 10); fewer is faster and coarser.
        synthesis_batch_size: images per batch. 256 (reference code).
        student_steps: imitation steps per round. 400 (reference code).
        batch_size: of the student's batches. 256 (reference code).
        meta: how G learns of a batch: "fomaml" (reference code), "reptile" (its option) or "none".
        bn_weight: of the distance to the teacher's BatchNorm statistics. 10 (reference code).
        bn_momentum: share of earlier batches in these statistics, in [0, 1). 0.9 (reference code).
        one_hot_weight: of the cross entropy to the wanted class. 0.4 (reference code).
        adversarial_weight: of the disagreement with the student, once it learns. 1.1 (reference
            code).
        generator: "upsample" (the paper's, sides divisible by 4) or "pyramid" (any size).
        generator_width: 64 (reference code); cost grows with its square.
        latent_dim: 256 (reference code).
        generator_lr: of Adam for G'. 2e-3 for 10 steps (reference code; 3e-3 for 5, 5e-3 for 2).
        latent_lr: of Adam for z. 0.01 (reference code; 0.015 for 2 steps). 0 leaves z as drawn.
        renew: batch after which G's first layers are drawn anew, once. None never does (our
            choice); 140 in the reference code, warm-up included.
        temperature: of the student's imitation. 20 (reference code).
        crop_padding: of the view and the student's batches, in pixels. 4 (reference code).
        flip: mirror them at random. True (reference code); False for digits.
        student_optimizer: "sgd" (reference code) with momentum 0.9, or "adam".
        student_lr: 0.2 (reference code, SGD).
        student_weight_decay: 1e-4 (reference code).
        schedule: of the student's rate: "cosine" (reference code), "multistep" or "constant".
        milestones: of "multistep" as shares of the rounds, x0.1 each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(200, ge=0)
    warmup: int = Field(20, ge=0)
    batches_per_round: int = Field(1, ge=0)
    inversion_steps: int = Field(10, ge=1)
    synthesis_batch_size: int = Field(256, ge=2)
    student_steps: int = Field(400, ge=1)
    batch_size: int = Field(256, ge=2)
    meta: Literal["fomaml", "reptile", "none"] = "fomaml"
    bn_weight: float = Field(10.0, ge=0)
    bn_momentum: float = Field(0.9, ge=0, lt=1)
    one_hot_weight: float = Field(0.4, ge=0)
    adversarial_weight: float = Field(1.1, ge=0)
    generator: Literal["upsample", "pyramid"] = "upsample"
    generator_width: int = Field(64, ge=1)
    latent_dim: int = Field(256, ge=1)
    generator_lr: float = Field(2e-3, gt=0)
    latent_lr: float = Field(0.01, ge=0)
    renew: int | None = Field(None, ge=1)
    temperature: float = Field(20.0, gt=0)
    crop_padding: int = Field(4, ge=0)
    flip: bool = True
    student_optimizer: optim.OptimizerName = "sgd"
    student_lr: float = Field(0.2, gt=0)
    student_weight_decay: float = Field(1e-4, ge=0)
    schedule: schedules.ScheduleName = "cosine"
    milestones: tuple[schedules.Share, ...] = (0.5, 0.75)


class Fast:
    """Inverts the teacher in a few steps per batch, and teaches a student from the pool."""

    Config = FastConfig
    requires = Requires(
        tasks=("classification",), optional_sources=("pool",), roles=("student", "source")
    )

    def __init__(
        self,
        cfg: FastConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        _pool.check_pool(cfg.rounds, cfg.warmup, cfg.batches_per_round, sources.get("pool"))
        self.cfg = cfg
        self.spec = task.spec
        self.num_classes = task.num_classes
        self.teacher = teachers[0]
        self.student = student
        self.meta = _pool.make_generator(cfg, task.spec)
        self.generator = copy.deepcopy(self.meta)
        self.pool = Pool(task.spec, device=next(student.parameters()).device)
        pools = PoolMix(self.pool, sources.get("pool"))
        self.imitation = _pool.Imitation(cfg, self.teacher, student, pools, task.spec)
        self.statistics = BatchNormProbe(module_of(self.teacher)) if cfg.bn_weight else None
        self.smoothing = Smoothing(cfg.bn_momentum)
        self.adversarial_weight = 0.0

    @classmethod
    def suggest(
        cls, task: Task, teachers: Sequence[Teacher], student: nn.Module
    ) -> Mapping[str, Any]:
        """Settings for networks and inputs that nobody tuned; our choices, not the paper's."""
        return _untuned.fast_inversion(task, teachers[0], student)

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """Student, the meta generator, its copy, the statistics of earlier batches and the pool."""
        return {
            "student": self.student,
            "meta": self.meta,
            "generator": self.generator,
            "statistics": self.smoothing,
            "pool": self.pool,
        }

    def run(self, ctx: Context) -> Iterator[Step]:
        """The paper's loop: synthesise a batch, then teach the student from the pool."""
        cfg = self.cfg
        student_optimizer = self.imitation.optimizer(ctx)
        meta_optimizer = ctx.optimizer(
            "meta", self.meta.parameters(), self.adam(cfg.generator_lr * cfg.inversion_steps)
        )
        modes.train_mode(self.student)
        self.generator.train()

        if cfg.warmup:
            for _ in ctx.rounds("synthesis", cfg.warmup):
                yield from self.synthesise(ctx, meta_optimizer, adversarial_weight=0.0)
        if cfg.rounds:
            for _ in ctx.rounds("distill", cfg.rounds):
                for _ in range(cfg.batches_per_round):
                    yield from self.synthesise(ctx, meta_optimizer, cfg.adversarial_weight)
                yield from self.imitation.steps(ctx, student_optimizer)

    def synthesise(
        self, ctx: Context, meta_optimizer: Optimizer, adversarial_weight: float
    ) -> Iterator[Step]:
        """One batch of images for the pool, and one step of the meta generator."""
        cfg, count = self.cfg, self.cfg.synthesis_batch_size
        labels, latent = _pool.draw_targets(ctx, count, self.num_classes, cfg.latent_dim)
        if cfg.meta == "none":
            reinitialize(self.generator, ctx.rng)
        else:
            self.generator.load_state_dict(self.meta.state_dict())
        weights = list(self.generator.parameters())
        summed = [torch.zeros_like(weight) for weight in weights]

        def collect(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for so_far, weight in zip(summed, weights, strict=True):
                if weight.grad is not None:
                    so_far.add_(weight.grad)

        optimizers = [
            ctx.optimizer("generator", weights, self.adam(cfg.generator_lr), fresh=True),
            ctx.optimizer("latent", [latent], self.adam(cfg.latent_lr), fresh=True),
        ]
        if cfg.meta == "fomaml":
            optimizers[0].register_step_pre_hook(collect)
        self.adversarial_weight = adversarial_weight
        best = _pool.Best()
        for _ in range(cfg.inversion_steps):
            shifts = draw_shifts(count, cfg.crop_padding, ctx.rng, flip=cfg.flip)
            batch = Batch(labels=labels, latent=latent, extra={"shifts": shifts})
            step = ctx.update("source", self.generator, self.inversion, batch, *optimizers)
            best.keep(step)
            yield step
        self.pool.add(best.kept["inputs"], labels, loss=best.loss)
        self.smoothing.update()
        if cfg.meta == "reptile":
            summed = [
                _REPTILE * (a - b).detach()
                for a, b in zip(self.meta.parameters(), weights, strict=True)
            ]
        if cfg.meta != "none":
            grads = dict(zip(self.meta.parameters(), summed, strict=True))
            yield ctx.apply("auxiliary", grads, meta_optimizer)
        if self.pool.shard_count() == cfg.renew:
            reinitialize(self.meta.get_submodule("project"), ctx.rng)

    def inversion(self, generator: Any, batch: Batch) -> Loss:
        """L_inv of one view, minimised over G' and z."""
        cfg = self.cfg
        images = generator(batch.latent)
        view = self.spec.normalize(shift(images, batch.extra["shifts"]))
        with self.statistics or nullcontext():
            teacher = predict(self.teacher, view)
        terms = {"one_hot": batch.mean(one_hot_loss(teacher.logits, batch.labels))}
        total = cfg.one_hot_weight * terms["one_hot"]
        if self.statistics is not None:
            observed = self.smoothing.mixed(self.statistics.observed())
            terms["bn_statistics"] = bn_statistics_loss(observed, self.statistics.stored())
            total = total + cfg.bn_weight * terms["bn_statistics"]
        answer = None
        if self.adversarial_weight:
            answer, hard = _pool.hardness(self.student, view, teacher, batch)
            terms["adversarial"] = -hard
            total = total + self.adversarial_weight * terms["adversarial"]
        return Loss(terms, total, self.spec.normalize(images), teacher, answer)

    def adam(self, lr: float) -> OptimizerFactory:
        """Adam as DCGAN has it."""
        return optim.factory("adam", lr, betas=(0.5, 0.999))

    def variant(self) -> str:
        """The options that are on, in words; "" is Fast as published."""
        cfg = self.cfg
        options = {
            "no meta learning": cfg.meta == "none",
            "Reptile": cfg.meta == "reptile",
            "not adversarial": not cfg.adversarial_weight,
            "no BN statistics": not cfg.bn_weight,
        }
        return ", ".join(name for name, on in options.items() if on)

    def result(self) -> Result:
        """The trained student, or the pool where none was trained."""
        return Result("student", self.student) if self.cfg.rounds else Result("pool", self.pool)

    def passes(self, cfg: FastConfig) -> Mapping[str, float]:
        """Passes of each network per round of the student's loop; see the module docstring."""
        passes = _pool.passes_of(cfg, inversions=cfg.batches_per_round * cfg.inversion_steps)
        learned = 0.0 if cfg.meta == "none" else float(cfg.batches_per_round)
        return {**passes, "meta_step": learned}
