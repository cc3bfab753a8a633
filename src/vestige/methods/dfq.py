"""DFQ.

Paper: Data-Free Network Quantization with Adversarial Knowledge Distillation, Choi, Choi, El-Khamy,
    Lee, CVPR Workshops 2020, arXiv 2005.04136. Settings and the form of the BatchNorm term are
    DataFree's, since no code of the authors is public.

A generator against a student that has to stay close to the teacher's training data. One iteration:
1. generator, once: -adv * KL(softmax t || softmax s) + bn * L_bn + oh * CE(t, argmax t)
   + balance * sum_k pbar_k ln pbar_k;
2. student, `student_steps` times with fresh noise: KL(softmax t || softmax s).
Temperatures are 1. In step 1 the student is in eval mode, in step 2 the generator.

Differs from the paper:
    DataFree's scripts ask for temperature 20 and do not use it; so do we not. The paper measures
    the BatchNorm mismatch by a divergence of Gaussians and trains several generators and students;
    like DataFree we take distances of means and variances, and one of each.
    `generator_mode: train` normalises the student's batches by their own statistics.
    `generator: pyramid` makes images of any size.

Cost per round: `iterations` times: G forward `student_steps` + 1, backward 1; T forward
    `student_steps` + 1, backward to its input 1; S forward `student_steps` + 1, backward
    `student_steps` and 1 to its input; without adversary the passes of S in step 1 fall away.
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
from vestige.losses.adversarial import disagreement_loss
from vestige.losses.distill import kl_divergence
from vestige.losses.prior import class_balance_loss, one_hot_loss
from vestige.losses.statistics import bn_statistics_loss
from vestige.methods import _untuned
from vestige.methods._fakes import as_inputs, known_or_asked, latent, make_generator
from vestige.models.probes import BatchNormProbe, batchnorm_layers
from vestige.teachers.white_box import module_of


class DFQConfig(BaseModel):
    """Settings of DFQ; defaults are DataFree's for CIFAR-10.

    Attributes:
        rounds: each of `iterations` iterations. 200 (DataFree).
        iterations: 40 (DataFree: 400 student steps per round).
        student_steps: per iteration. 10 (DataFree).
        batch_size: 256 (DataFree).
        adversarial_weight: of the divergence. 1 (DataFree). 0 leaves the student unasked.
        bn_weight: of the distance to the teacher's BatchNorm statistics. 1 (DataFree).
        one_hot_weight: 1 (DataFree).
        balance_weight: 20 (DataFree), with the natural logarithm.
        generator: "large" (DataFree, sides divisible by 4), "upsample", or "pyramid" (any size).
        generator_head: "sigmoid" (DataFree, images in [0, 1]) or "tanh_bn".
        generator_mode: of G in the student's steps: "eval" (DataFree) or "train".
        generator_width: 64 (DataFree); cost grows with its square.
        latent_dim: 256 (DataFree).
        generator_lr: of Adam, betas 0.5 and 0.999, constant. 1e-3 (DataFree).
        student_optimizer: "sgd" (DataFree) with momentum 0.9, or "adam".
        student_lr: 0.1 (DataFree, SGD; 0.05 for CIFAR-100 with ResNet-34).
        student_weight_decay: 1e-4 (DataFree).
        schedule: of the student's rate: "cosine" (DataFree), "multistep" or "constant".
        milestones: of "multistep" as shares of the rounds, x0.1 each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(200, ge=1)
    iterations: int = Field(40, ge=1)
    student_steps: int = Field(10, ge=1)
    batch_size: int = Field(256, ge=2)
    adversarial_weight: float = Field(1.0, ge=0)
    bn_weight: float = Field(1.0, ge=0)
    one_hot_weight: float = Field(1.0, ge=0)
    balance_weight: float = Field(20.0, ge=0)
    generator: Literal["large", "upsample", "pyramid"] = "large"
    generator_head: Literal["sigmoid", "tanh_bn"] = "sigmoid"
    generator_mode: Literal["eval", "train"] = "eval"
    generator_width: int = Field(64, ge=1)
    latent_dim: int = Field(256, ge=1)
    generator_lr: float = Field(1e-3, gt=0)
    student_optimizer: optim.OptimizerName = "sgd"
    student_lr: float = Field(0.1, gt=0)
    student_weight_decay: float = Field(1e-4, ge=0)
    schedule: schedules.ScheduleName = "cosine"
    milestones: tuple[schedules.Share, ...] = (0.5, 0.75)


class DFQ:
    """An adversarial generator that keeps to the teacher's statistics and classes."""

    Config = DFQConfig
    requires = Requires(tasks=("classification",), roles=("student", "source"))

    def __init__(
        self,
        cfg: DFQConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg = cfg
        self.spec = task.spec
        self.teacher = teachers[0]
        self.student = student
        self.generator = make_generator(cfg, task.spec)
        self.probe = BatchNormProbe(module_of(self.teacher)) if cfg.bn_weight else None

    @classmethod
    def suggest(
        cls, task: Task, teachers: Sequence[Teacher], student: nn.Module
    ) -> Mapping[str, Any]:
        """Settings for networks and inputs that nobody tuned; our choices, not the paper's."""
        teacher = teachers[0]
        bare = isinstance(teacher, nn.Module) and not batchnorm_layers(teacher)
        return _untuned.generative(
            task,
            teacher,
            student,
            lambda given: make_generator(DFQConfig(**given), task.spec),
            {
                "student_steps": 10,
                "bn_weight": 0.0 if bare else 1.0,
                "balance_weight": 5.0,
                "generator_mode": "train",
            },
        )

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """Student and generator."""
        return {"student": self.student, "generator": self.generator}

    def run(self, ctx: Context) -> Iterator[Step]:
        """One generation, then `student_steps` imitations on fresh images."""
        cfg = self.cfg
        student_optimizer = ctx.optimizer(
            "student",
            self.student.parameters(),
            optim.factory(
                cfg.student_optimizer, cfg.student_lr, weight_decay=cfg.student_weight_decay
            ),
            schedules.named(cfg.schedule, cfg.milestones),
        )
        generator_optimizer = ctx.optimizer(
            "generator",
            self.generator.parameters(),
            optim.factory("adam", cfg.generator_lr, betas=(0.5, 0.999)),
        )
        modes.train_mode(self.student)
        self.generator.train()

        for _ in ctx.rounds("distill", cfg.rounds):
            for _ in range(cfg.iterations):
                noise = Batch(latent=latent(cfg.batch_size, cfg.latent_dim, ctx))
                yield ctx.update(
                    "source", self.generator, self.generation, noise, generator_optimizer
                )
                for _ in range(cfg.student_steps):
                    batch = Batch(self.fakes(ctx))
                    yield ctx.update(
                        "student", self.student, self.imitation, batch, student_optimizer
                    )

    def generation(self, generator: Any, batch: Batch) -> Loss:
        """The generator's four terms, minimised over it."""
        cfg = self.cfg
        inputs = as_inputs(generator(batch.latent), cfg, self.spec)
        with self.probe or nullcontext():
            teacher = predict(self.teacher, inputs)
        terms = {
            "one_hot": batch.mean(one_hot_loss(teacher.logits)),
            "class_balance": class_balance_loss(teacher.logits),
        }
        total = cfg.one_hot_weight * terms["one_hot"] + cfg.balance_weight * terms["class_balance"]
        answer = None
        if cfg.adversarial_weight:
            with modes.evaluating(self.student):
                answer = predict(self.student, inputs)
            divergence = disagreement_loss(answer.logits, teacher.logits, kind="kl")
            terms["adversarial"] = -batch.mean(divergence)
            total = total + cfg.adversarial_weight * terms["adversarial"]
        if self.probe is not None:
            terms["bn_statistics"] = bn_statistics_loss(self.probe.observed(), self.probe.stored())
            total = total + cfg.bn_weight * terms["bn_statistics"]
        return Loss(terms, total, inputs, teacher, answer)

    @torch.no_grad()
    def fakes(self, ctx: Context) -> Tensor:
        """Fresh images as inputs of the teacher."""
        noise = latent(self.cfg.batch_size, self.cfg.latent_dim, ctx)
        evaluated = self.cfg.generator_mode == "eval"
        with modes.evaluating(self.generator) if evaluated else nullcontext():
            return as_inputs(self.generator(noise), self.cfg, self.spec)

    def imitation(self, student: Any, batch: Batch) -> Loss:
        """KL(T || S) at temperature 1, minimised over the student."""
        inputs, teacher = batch.inputs, known_or_asked(self.teacher, batch)
        answer = predict(student, inputs)
        distance = batch.mean(kl_divergence(answer.logits, teacher.logits))
        return Loss({"distillation": distance}, distance, inputs, teacher, answer)

    def variant(self) -> str:
        """The options that are on, in words; "" is DFQ as DataFree has it."""
        options = {
            "no adversary": not self.cfg.adversarial_weight,
            "no BN statistics": not self.cfg.bn_weight,
            "generator in train mode": self.cfg.generator_mode == "train",
        }
        return ", ".join(name for name, on in options.items() if on)

    def result(self) -> Result:
        """The trained student."""
        return Result("student", self.student)

    def passes(self, cfg: DFQConfig) -> Mapping[str, float]:
        """Passes of each network per round; see the module docstring."""
        n, k = cfg.iterations, cfg.iterations * cfg.student_steps
        asked = n if cfg.adversarial_weight else 0
        observed = n if cfg.bn_weight else 0
        passes = {
            "generator_forward": n + k,
            "generator_backward": n,
            "generator_step": n,
            "teacher_forward": n + k - observed,
            "teacher_backward_to_input": n - observed,
            "teacher_observed": observed,
            "student_forward": asked + k,
            "student_backward_to_input": asked,
            "student_backward": k,
            "student_step": k,
        }
        return {name: float(count) for name, count in passes.items()}
