"""What the methods have in common that first synthesise a pool and then imitate on it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vestige.core import modes, optim, schedules
from vestige.core.protocols import Context, Source, Teacher
from vestige.core.types import Batch, InputSpec, Loss, Prediction, Step, predict
from vestige.errors import ContractError, RecipeError
from vestige.losses.adversarial import decision_aware_disagreement
from vestige.losses.distill import kl_divergence
from vestige.models.factory import build_generator
from vestige.sources.augment import crop_and_flip
from vestige.sources.pool_mix import PoolMix


def check_pool(rounds: int, warmup: int, batches_per_round: int, earlier: Source | None) -> None:
    """Refuse settings with which the student would be taught from nothing, or nothing is done.

    Raises:
        RecipeError: there would be no image when the student asks for the first, or no round.
    """
    if not rounds and not warmup:
        raise RecipeError(
            "got rounds 0 and warmup 0, expected at least one of them above 0; warmup synthesises "
            "that many batches, rounds teach the student"
        )
    if rounds and not (warmup or batches_per_round or earlier):
        raise RecipeError(
            "got warmup 0, batches_per_round 0 and no source 'pool', so the pool is empty when the "
            "student asks; expected images from one of them"
        )


def make_generator(cfg: Any, spec: InputSpec) -> nn.Module:
    """The generator that `cfg` names, of images in [0, 1]."""
    return build_generator(
        cfg.generator, spec, latent_dim=cfg.latent_dim, width=cfg.generator_width, head="sigmoid"
    )


def draw_targets(ctx: Context, count: int, classes: int, width: int) -> tuple[Tensor, nn.Parameter]:
    """Wanted classes (count,), uniform, and noise (count, width), normal, to be learned."""
    labels = torch.randint(classes, (count,), generator=ctx.rng, device=ctx.device)
    latent = torch.randn(count, width, generator=ctx.rng, device=ctx.device)
    return labels, nn.Parameter(latent)


def hardness(
    student: nn.Module, view: Tensor, teacher: Prediction, batch: Batch
) -> tuple[Prediction, Tensor]:
    """What the student in eval mode says of a view, and how far it is off where both agree."""
    with modes.evaluating(student):
        answer = predict(student, view)
    return answer, batch.mean(decision_aware_disagreement(answer.logits, teacher.logits))


def passes_of(
    cfg: Any, *, inversions: int, views: int = 1, generator: bool = True
) -> dict[str, float]:
    """Passes of each network per round of the student's loop.

    Args:
        cfg: with `student_steps`, `adversarial_weight` and `bn_weight`.
        inversions: optimisation steps of the images per round.
        views: passes of the teacher in each.
        generator: whether a generator makes the images.
    """
    hard, k = inversions if cfg.adversarial_weight else 0, cfg.student_steps
    made = inversions if generator else 0
    observed = inversions if cfg.bn_weight else 0
    plain = views * inversions - observed
    passes = {
        **dict.fromkeys(("generator_forward", "generator_backward", "generator_step"), made),
        "teacher_forward": plain + k,
        "teacher_backward_to_input": plain,
        "teacher_observed": observed,
        "student_forward": hard + k,
        "student_backward_to_input": hard,
        "student_backward": k,
        "student_step": k,
    }
    return {name: float(count) for name, count in passes.items() if count}


class Imitation:
    """The student's stage: batches of a pool, augmented, and the teacher's softened answers.

    Args:
        cfg: the method's settings, with `student_steps`, `batch_size`, `temperature`,
            `crop_padding`, `flip`, `student_optimizer`, `student_lr`, `student_weight_decay`,
            `schedule` and `milestones`.
        teacher: is asked.
        student: learns.
        pool: is drawn from.
        spec: of the inputs.
    """

    def __init__(
        self, cfg: Any, teacher: Teacher, student: nn.Module, pool: PoolMix, spec: InputSpec
    ) -> None:
        self.cfg = cfg
        self.teacher = teacher
        self.student = student
        self.pool = pool
        self.spec = spec

    def optimizer(self, ctx: Context) -> Optimizer:
        """The student's, with its schedule; ask for it before a loop."""
        cfg = self.cfg
        return ctx.optimizer(
            "student",
            self.student.parameters(),
            optim.factory(
                cfg.student_optimizer, cfg.student_lr, weight_decay=cfg.student_weight_decay
            ),
            schedules.named(cfg.schedule, cfg.milestones),
        )

    def steps(self, ctx: Context, optimizer: Optimizer) -> Iterator[Step]:
        """`student_steps` steps on batches of what the pool holds now."""
        cfg = self.cfg
        for _ in range(cfg.student_steps):
            inputs = self.pool.draw(cfg.batch_size, ctx.rng)
            inputs = crop_and_flip(
                inputs, self.spec, ctx.rng, padding=cfg.crop_padding, flip=cfg.flip
            )
            yield ctx.update("student", self.student, self.loss, Batch(inputs), optimizer)

    def loss(self, student: Any, batch: Batch) -> Loss:
        """KL(softmax(t / T) || softmax(s / T)) * T^2, minimised over the student."""
        inputs = batch.inputs
        with torch.no_grad():
            teacher = predict(self.teacher, inputs)
        answer = predict(student, inputs)
        distance = batch.mean(
            kl_divergence(answer.logits, teacher.logits, temperature=self.cfg.temperature)
        )
        return Loss({"distillation": distance}, distance, inputs, teacher, answer)


class Best:
    """What had the lowest loss among the iterations of an inversion.

    Compared and kept where the tensors lie, so nothing waits for a GPU. A loss that is not a number
    is never the lowest.
    """

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.kept: dict[str, Tensor] = {}

    def keep(self, step: Step, **tensors: Tensor) -> None:
        """Remember the inputs of `step`, and `tensors`, if its loss is the lowest so far.

        Copies: whatever is handed in may be changed afterwards.
        """
        if step.loss is None or not isinstance(step.loss.inputs, Tensor):
            raise ContractError(
                "got a step without a loss or its inputs, expected those of a source"
            )
        tensors["inputs"] = step.loss.inputs
        loss = torch.where(step.loss.total.isnan(), torch.inf, step.loss.total)
        if self.loss is None:
            self.loss = loss
            self.kept = {name: values.detach().clone() for name, values in tensors.items()}
            return
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        for name, values in tensors.items():
            torch.where(better, values.detach(), self.kept[name], out=self.kept[name])
