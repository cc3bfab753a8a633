"""DAFL.

Paper: Data-Free Learning of Student Networks, Chen, Wang, Xu, Yang, Liu, Shi, Xu, Xu, Tian, ICCV
    2019, arXiv 1904.01186.

The teacher judges a generator's images as a discriminator would, without an adversary. One
iteration, with one batch x = G(z) for both players:
1. generator: oh * CE(t, argmax t) + balance * sum_k pbar_k log10 pbar_k - act * mean |f|, with the
   teacher's logits t, its mean prediction pbar over the batch and what enters its last layer, f;
2. student: KL(softmax t || softmax S(x)) on the same images and answers.
The reference code adds both losses and goes back once; no gradient of the one reaches the other's
network, so two updates on what was computed once are the same.

Differs from the paper:
    `log_base: e` is DataFree's form. `generator: pyramid` makes images of any size and
    `generator_head: sigmoid` images in [0, 1], for inputs that the paper did not have.

Cost per round: `iterations` times: G forward, backward; T forward, backward to its input; S
    forward, backward.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from vestige.core import modes, optim, schedules
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Batch, Loss, Requires, Result, Step, predict
from vestige.errors import ContractError
from vestige.losses.distill import kl_divergence
from vestige.losses.prior import activation_loss, class_balance_loss, one_hot_loss
from vestige.methods import _untuned
from vestige.methods._fakes import as_inputs, known_or_asked, latent, make_generator
from vestige.models.probes import FeatureProbe, penultimate_layer
from vestige.teachers.white_box import module_of


class DAFLConfig(BaseModel):
    """Settings of DAFL; defaults are the reference code's for CIFAR-10.

    Attributes:
        rounds: each of `iterations` iterations. 2000 (reference code).
        iterations: 120 (reference code).
        batch_size: 1024 (reference code). Small batches hurt: the balance is one of a batch.
        one_hot_weight: 0.05 (reference code; 1 for MNIST, 0.5 for CIFAR-100).
        balance_weight: 5 (reference code; 20 for CIFAR-100).
        log_base: of the balance: "10" (reference code) or "e", in which a weight counts 2.3 times.
        activation_weight: 0.01 (reference code; 0.1 for MNIST and CIFAR-100).
        generator: "upsample" (the paper's) or "pyramid" (any size).
        generator_head: "tanh_bn" (reference code) or "sigmoid" (images in [0, 1]).
        generator_width: 64 (reference code); cost grows with its square.
        latent_dim: 1000 (reference code).
        inner_eps: eps of the generator's inner BNs. 0.8 (reference code).
        generator_lr: of Adam, constant. 0.02 (reference code).
        student_optimizer: "sgd" (reference code) with momentum 0.9, or "adam" (for MNIST).
        student_lr: 0.1 (reference code, SGD).
        student_weight_decay: 5e-4 (reference code).
        schedule: of the student's rate: "multistep" (reference code), "cosine" or "constant".
        milestones: of "multistep" as shares of the rounds, x0.1 each. 800 and 1600 of 2000.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(2000, ge=1)
    iterations: int = Field(120, ge=1)
    batch_size: int = Field(1024, ge=2)
    one_hot_weight: float = Field(0.05, ge=0)
    balance_weight: float = Field(5.0, ge=0)
    log_base: Literal["10", "e"] = "10"
    activation_weight: float = Field(0.01, ge=0)
    generator: Literal["upsample", "pyramid"] = "upsample"
    generator_head: Literal["tanh_bn", "sigmoid"] = "tanh_bn"
    generator_width: int = Field(64, ge=1)
    latent_dim: int = Field(1000, ge=1)
    inner_eps: float = Field(0.8, gt=0)
    generator_lr: float = Field(0.02, gt=0)
    student_optimizer: optim.OptimizerName = "sgd"
    student_lr: float = Field(0.1, gt=0)
    student_weight_decay: float = Field(5e-4, ge=0)
    schedule: schedules.ScheduleName = "multistep"
    milestones: tuple[schedules.Share, ...] = (0.4, 0.8)


class DAFL:
    """A generator whose images the teacher is sure of, and a student that follows."""

    Config = DAFLConfig
    requires = Requires(tasks=("classification",), roles=("student", "source"))

    def __init__(
        self,
        cfg: DAFLConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg = cfg
        self.spec = task.spec
        self.teacher = teachers[0]
        self.student = student
        self.generator = make_generator(cfg, task.spec, inner_eps=cfg.inner_eps)
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
            lambda given: make_generator(DAFLConfig(**given), task.spec),
            {
                "batch_size": 128,
                "one_hot_weight": 1.0,
                "balance_weight": 20.0,
                "activation_weight": 0.1,
                "generator_lr": 2e-2,
                "student_lr": 4e-3,
            },
        )

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """Student and generator."""
        return {"student": self.student, "generator": self.generator}

    def run(self, ctx: Context) -> Iterator[Step]:
        """The paper's loop: one batch, which moves the generator and then the student."""
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
            "generator", self.generator.parameters(), optim.factory("adam", cfg.generator_lr)
        )
        modes.train_mode(self.student)
        self.generator.train()

        for _ in ctx.rounds("distill", cfg.rounds):
            for _ in range(cfg.iterations):
                noise = Batch(latent=latent(cfg.batch_size, cfg.latent_dim, ctx))
                step = ctx.update(
                    "source", self.generator, self.generation, noise, generator_optimizer
                )
                yield step
                if step.loss is None or step.loss.teacher is None:
                    raise ContractError(
                        "a plug-in took the source's loss; expected it with answers"
                    )
                batch = Batch(step.loss.inputs, extra={"teacher": step.loss.teacher.logits})
                yield ctx.update("student", self.student, self.imitation, batch, student_optimizer)

    def generation(self, generator: Any, batch: Batch) -> Loss:
        """One-hot, balance and activation; minimised over the generator."""
        cfg = self.cfg
        inputs = as_inputs(generator(batch.latent), cfg, self.spec)
        with self.probe:
            teacher = predict(self.teacher, inputs)
        (features,) = self.probe.features()
        terms = {
            "one_hot": batch.mean(one_hot_loss(teacher.logits)),
            "class_balance": class_balance_loss(
                teacher.logits, base=10.0 if cfg.log_base == "10" else math.e
            ),
            "activation": batch.mean(activation_loss(features)),
        }
        total = (
            cfg.one_hot_weight * terms["one_hot"]
            + cfg.balance_weight * terms["class_balance"]
            + cfg.activation_weight * terms["activation"]
        )
        return Loss(terms, total, inputs, teacher)

    def imitation(self, student: Any, batch: Batch) -> Loss:
        """KL(T || S) at temperature 1, minimised over the student."""
        inputs, teacher = batch.inputs, known_or_asked(self.teacher, batch)
        answer = predict(student, inputs)
        distance = batch.mean(kl_divergence(answer.logits, teacher.logits))
        return Loss({"distillation": distance}, distance, inputs, teacher, answer)

    def variant(self) -> str:
        """The options that are on, in words; "" is DAFL as published."""
        options = {
            "no activation": not self.cfg.activation_weight,
            "natural logarithm": self.cfg.log_base == "e",
        }
        return ", ".join(name for name, on in options.items() if on)

    def result(self) -> Result:
        """The trained student."""
        return Result("student", self.student)

    def passes(self, cfg: DAFLConfig) -> Mapping[str, float]:
        """Passes of each network per round; see the module docstring."""
        names = (
            *("generator_forward", "generator_backward", "generator_step"),
            *("teacher_forward", "teacher_backward_to_input"),
            *("student_forward", "student_backward", "student_step"),
        )
        return dict.fromkeys(names, float(cfg.iterations))
