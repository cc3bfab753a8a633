"""KD on whatever inputs there are: the reference arms that a data-free method is judged against.

Paper: Distilling the Knowledge in a Neural Network, Hinton, Vinyals, Dean, 2015, arXiv 1503.02531.

The inputs come from one source, which decides what the arm shows: real data (upper reference),
noise or the images of an untrained generator (lower references), images of something else. Each
step draws a batch, asks the teacher once and moves the student towards its answers:
KL(softmax(t / T) || softmax(s / T)) * T^2, or the mean absolute difference of the logits.

Differs from the paper: no term on true labels, since a fair arm has the same information as the
    method beside it. The L1 loss is DFAD's (arXiv 1912.11006), for arms next to it.

Cost per round: `iterations` times: T forward 1; S forward 1, backward 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vestige.core import modes, optim, schedules
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Access, Batch, Loss, Requires, Result, Step, predict
from vestige.errors import RecipeError
from vestige.losses.distill import kl_divergence, l1_logits
from vestige.methods import _untuned
from vestige.sources.augment import crop_and_flip
from vestige.sources.views import draw_views, viewed


class KDConfig(BaseModel):
    """Settings of KD.

    Attributes:
        rounds: each of `iterations` student steps. 200, our choice.
        iterations: student steps per round. 250, our choice, so that 200 rounds are 50,000 steps.
        batch_size: 128 (common for CIFAR).
        student_optimizer: "sgd" with momentum 0.9, or "adam".
        student_lr: 0.1 (common for CIFAR, SGD). Higher is faster until it diverges.
        student_weight_decay: 5e-4 (common for CIFAR).
        schedule: of the rate: "cosine", "multistep" or "constant".
        milestones: of "multistep" as shares of the rounds, x0.1 each.
        loss: "kl" (paper) or "l1" (DFAD).
        temperature: of "kl". 4, our choice; higher compares small probabilities more.
        crop_padding: crop each input of images after padding it by so many black pixels. 0 (the
            inputs as they come); 4 is common for CIFAR, and what CMI and Fast do.
        flip: mirror them at random. False; True is common for CIFAR.
        recolour: strength, in [0, 1], of random colours of each image. 0 (the inputs as they come);
            where a method that it is held against has them.
        turn: above 0 turn each, with probability 1/2, by up to so many degrees, zoom and mirror it.
            0; likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(200, ge=1)
    iterations: int = Field(250, ge=1)
    batch_size: int = Field(128, ge=2)
    student_optimizer: optim.OptimizerName = "sgd"
    student_lr: float = Field(0.1, gt=0)
    student_weight_decay: float = Field(5e-4, ge=0)
    schedule: schedules.ScheduleName = "cosine"
    milestones: tuple[schedules.Share, ...] = (0.5, 0.75)
    loss: Literal["kl", "l1"] = "kl"
    temperature: float = Field(4.0, gt=0)
    crop_padding: int = Field(0, ge=0)
    flip: bool = False
    recolour: float = Field(0.0, ge=0, le=1)
    turn: float = Field(0.0, ge=0, le=180)


class KD:
    """Trains a student on the teacher's answers to the inputs of one source."""

    Config = KDConfig
    requires = Requires(
        access=Access.SCORES,
        tasks=("classification", "segmentation", "text"),
        sources=("inputs",),
        roles=("student",),
    )

    def __init__(
        self,
        cfg: KDConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg = cfg
        self.teacher = teachers[0]
        self.student = student
        self.source = sources["inputs"]
        self.spec = task.spec
        views = {"crop_padding", "flip", "recolour", "turn"}
        asked = {name: value for name, value in cfg.model_dump(include=views).items() if value}
        if asked and len(task.spec.shape) != 3:
            raise RecipeError(
                f"got {asked} for {task.spec.kind} inputs of shape {task.spec.shape}, expected "
                "images (C, H, W); leave that out"
            )

    @classmethod
    def suggest(
        cls, task: Task, teachers: Sequence[Teacher], student: nn.Module
    ) -> Mapping[str, Any]:
        """Settings for networks and inputs that nobody tuned; our choices.

        Adam with a cosine, and as many steps as take about four minutes on two cores by the
        arithmetic of both networks, within limits. A teacher that shows no network is taken to be
        as dear as the student. Nothing is suggested for dense prediction.
        """
        return _untuned.imitation(task, teachers[0], student, passes=3)

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """The student, and the source if it has state."""
        parts: dict[str, Stateful | Sharded] = {"student": self.student}
        if isinstance(self.source, Stateful):
            parts["source"] = self.source
        return parts

    def run(self, ctx: Context) -> Iterator[Step]:
        """Draw, ask, move."""
        cfg = self.cfg
        optimizer = ctx.optimizer(
            "student",
            self.student.parameters(),
            optim.factory(
                cfg.student_optimizer, cfg.student_lr, weight_decay=cfg.student_weight_decay
            ),
            schedules.named(cfg.schedule, cfg.milestones),
        )
        modes.train_mode(self.student)
        for _ in ctx.rounds("distill", cfg.rounds):
            for _ in range(cfg.iterations):
                inputs = self.source.draw(cfg.batch_size, ctx.rng)
                if isinstance(inputs, Tensor):
                    inputs = crop_and_flip(
                        inputs, self.spec, ctx.rng, padding=cfg.crop_padding, flip=cfg.flip
                    )
                    views = draw_views(
                        len(inputs), self.spec, ctx.rng, recolour=cfg.recolour, turn=cfg.turn
                    )
                    inputs = viewed(inputs, views, self.spec)
                batch = Batch(inputs=inputs)
                yield ctx.update("student", self.student, self.imitation, batch, optimizer)

    def imitation(self, student: Any, batch: Batch) -> Loss:
        """The distance to the teacher's answers, minimised over the student."""
        inputs = batch.inputs
        with torch.no_grad():
            teacher = predict(self.teacher, inputs)
        answer = predict(student, inputs)
        if self.cfg.loss == "l1":
            per_sample = l1_logits(answer.logits, teacher.logits)
        else:
            per_sample = kl_divergence(
                answer.logits, teacher.logits, temperature=self.cfg.temperature
            )
        distance = batch.mean(per_sample)
        return Loss({"distillation": distance}, distance, inputs, teacher, answer)

    def result(self) -> Result:
        """The trained student."""
        return Result("student", self.student)

    def passes(self, cfg: KDConfig) -> Mapping[str, float]:
        """Passes of each network per round."""
        names = ("teacher_forward", "student_forward", "student_backward", "student_step")
        return dict.fromkeys(names, float(cfg.iterations))
