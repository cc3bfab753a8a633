"""DeepInversion.

Paper: Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion, Yin, Molchanov, Li,
    Alvarez, Mallya, Hoiem, Jha, Kautz, CVPR 2020, arXiv 1912.08795.

Images are optimised pixel by pixel, without a generator. A batch x starts as normal noise in the
teacher's normalised space, with wanted classes y, and takes `inversion_steps` steps of Adam on
oh * CE(T(x'), y) + bn * L_bn + tv * TV(x') + l2 * ||x'|| + adv * (1 - clamp(J, 0, 1)), where x' is
the batch rolled by a few pixels and mirrored at random, L_bn the distance to the stored BatchNorm
statistics (eq. 4) and J the distance of student and teacher that the code calls Jensen-Shannon.
With `adversarial_weight` it is Adaptive DeepInversion (ADI): images that the student does not
answer as the teacher yet. `low_resolution_steps` come first, on images of half the size. The
iteration with the lowest loss goes into the pool, on which the student imitates the teacher.

Differs from the paper:
    No code for the student was published; its stage is that of the comparison in the CMI and Fast
    papers, a batch before each `student_steps` steps. Best is best: the reference code for CIFAR
    keeps a view of the pixels, which later steps overwrite, and that for ImageNet compares a loss
    with the image of a step later. The lowest loss of the last resolution counts, since that of
    half the size is another. `clip` is on, as for ImageNet: the pool holds images in [0, 1], and
    what lies beyond would be cut after the last step. The rise of the "cosine" rate takes a
    twentieth of the steps, which for 2000 are the code's 100. An image is mirrored at random where
    `flip` is on; the code for CIFAR never does. The clamps of J leave no gradient to most of many
    classes, as in the code.

Cost per round: `batches_per_round * (low_resolution_steps + inversion_steps)` times: T forward and
    backward to its input, S the same with `adversarial_weight`; a quarter of that at half the size,
    though `passes` counts it whole. `student_steps` times: T forward; S forward, backward.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core import modes, optim, schedules
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Batch, Loss, Requires, Result, Step, predict
from vestige.errors import ShapeError
from vestige.losses.adversarial import js_disagreement
from vestige.losses.prior import one_hot_loss, total_variation
from vestige.losses.statistics import bn_statistics_loss
from vestige.methods import _untuned
from vestige.methods._pool import Best, Imitation, check_pool, passes_of
from vestige.models.probes import BatchNormProbe
from vestige.sources.augment import draw_shifts, shift
from vestige.sources.pool import Pool
from vestige.sources.pool_mix import PoolMix
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import module_of

Beta = Annotated[float, Field(ge=0, lt=1)]
_RISE = 0.05


class DeepInversionConfig(BaseModel):
    """Settings; those of the inversion default to the authors' for CIFAR-10 ("paper parameters").

    Attributes:
        rounds: each of `batches_per_round` batches, then `student_steps` steps. 200 (DataFree). 0
            stops after the synthesis: the result is the pool.
        warmup: batches synthesised before the student's first step, never adversarial. 0
            (DataFree); more keeps the student from learning the first batch by heart.
        batches_per_round: batches synthesised per round. 1 (DataFree); 0 adds none.
        inversion_steps: optimisation steps per batch at full size. 2000 (reference code; DataFree
            1000); more is sharper.
        low_resolution_steps: at half the size before. 0 (reference code for CIFAR); 2000 before
            1000 at full size for ImageNet at 224 pixels, which are three quarters cheaper and lay
            out large shapes. Needs networks that take images of any size.
        synthesis_batch_size: images per batch. 256 (reference code). L_bn compares its statistics,
            so small batches hurt.
        student_steps: imitation steps per round. 400 (DataFree).
        batch_size: of the student's batches. 256 (DataFree).
        bn_weight: of the distance to the teacher's BatchNorm statistics. 10 (reference code; 0.01
            for ImageNet).
        first_bn_weight: factor on the first layer's share of it. 1 (reference code for CIFAR); its
            option for ImageNet raises it against noise.
        one_hot_weight: of the cross entropy to the wanted class. 1 (reference code).
        tv_weight: of the total variation. 2.5e-5 (reference code); 1e-3 gives smoother images.
        tv_form: "l2" norms over the batch, which grow with it (reference code), or "l1" means
            (DataFree, with a weight of 1e-3).
        l2_weight: of the images' Euclidean norm, mean over the batch. 0 (reference code).
        adversarial_weight: of 1 - J, once the student learns. 0 (reference code for CIFAR); 0.2 for
            ADI on ImageNet, 1 in DataFree.
        inversion_lr: of Adam, in normalised units per step. 0.05 (reference code; 0.25 for ImageNet
            with "cosine").
        inversion_betas: of Adam. 0.9 and 0.999 (reference code; 0.5 and 0.9 for ImageNet, 0.5 and
            0.99 in DataFree).
        inversion_schedule: "constant" (reference code for CIFAR), or "cosine" with a short rise
            before (ImageNet), anew for each size.
        roll: largest shift in pixels, what leaves comes back on the other side; at half the size
            half of it. 2 (reference code; 30 for ImageNet, an eighth of the side in DataFree).
        clip: cut the pixels to [0, 1] after each step. True (reference code for ImageNet).
        temperature: of the student's imitation. 20 (DataFree).
        crop_padding: of the student's batches, in pixels. 4 (DataFree).
        flip: mirror them, and the batch that is inverted, at random. True (DataFree); False for
            digits.
        student_optimizer: "sgd" (DataFree) with momentum 0.9, or "adam".
        student_lr: 0.1 (DataFree, SGD).
        student_weight_decay: 1e-4 (DataFree).
        schedule: of the student's rate: "cosine" (DataFree), "multistep" or "constant".
        milestones: of "multistep" as shares of the rounds, x0.1 each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(200, ge=0)
    warmup: int = Field(0, ge=0)
    batches_per_round: int = Field(1, ge=0)
    inversion_steps: int = Field(2000, ge=1)
    low_resolution_steps: int = Field(0, ge=0)
    synthesis_batch_size: int = Field(256, ge=2)
    student_steps: int = Field(400, ge=1)
    batch_size: int = Field(256, ge=2)
    bn_weight: float = Field(10.0, ge=0)
    first_bn_weight: float = Field(1.0, ge=0)
    one_hot_weight: float = Field(1.0, ge=0)
    tv_weight: float = Field(2.5e-5, ge=0)
    tv_form: Literal["l1", "l2"] = "l2"
    l2_weight: float = Field(0.0, ge=0)
    adversarial_weight: float = Field(0.0, ge=0)
    inversion_lr: float = Field(0.05, gt=0)
    inversion_betas: tuple[Beta, Beta] = (0.9, 0.999)
    inversion_schedule: Literal["constant", "cosine"] = "constant"
    roll: int = Field(2, ge=0)
    clip: bool = True
    temperature: float = Field(20.0, gt=0)
    crop_padding: int = Field(4, ge=0)
    flip: bool = True
    student_optimizer: optim.OptimizerName = "sgd"
    student_lr: float = Field(0.1, gt=0)
    student_weight_decay: float = Field(1e-4, ge=0)
    schedule: schedules.ScheduleName = "cosine"
    milestones: tuple[schedules.Share, ...] = (0.5, 0.75)


class DeepInversion:
    """Inverts the teacher into a pool of images, pixel by pixel, and teaches a student from it."""

    Config = DeepInversionConfig
    requires = Requires(
        tasks=("classification",), optional_sources=("pool",), roles=("student", "source")
    )

    def __init__(
        self,
        cfg: DeepInversionConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        check_pool(cfg.rounds, cfg.warmup, cfg.batches_per_round, sources.get("pool"))
        self.cfg = cfg
        self.spec = task.spec
        self.num_classes = task.num_classes
        self.teacher = teachers[0]
        self.student = student
        self.network = module_of(self.teacher)
        if cfg.low_resolution_steps:
            check_half_size(task, [self.network, *([student] if cfg.adversarial_weight else [])])
        self.pool = Pool(task.spec, device=next(student.parameters()).device)
        pools = PoolMix(self.pool, sources.get("pool"))
        self.imitation = Imitation(cfg, self.teacher, student, pools, task.spec)
        self.statistics = BatchNormProbe(self.network) if cfg.bn_weight else None
        self.adversarial_weight = 0.0
        self.half_size = False

    @classmethod
    def suggest(
        cls, task: Task, teachers: Sequence[Teacher], student: nn.Module
    ) -> Mapping[str, Any]:
        """Settings for networks and inputs that nobody tuned; our choices, not the paper's."""
        return _untuned.pixel_inversion(task, teachers[0], student)

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """Student and pool."""
        return {"student": self.student, "pool": self.pool}

    def run(self, ctx: Context) -> Iterator[Step]:
        """Synthesise a batch, then teach the student from the pool."""
        cfg = self.cfg
        student_optimizer = self.imitation.optimizer(ctx)
        modes.train_mode(self.student)

        if cfg.warmup:
            for _ in ctx.rounds("synthesis", cfg.warmup):
                yield from self.synthesise(ctx, adversarial_weight=0.0)
        if cfg.rounds:
            for _ in ctx.rounds("distill", cfg.rounds):
                for _ in range(cfg.batches_per_round):
                    yield from self.synthesise(ctx, cfg.adversarial_weight)
                yield from self.imitation.steps(ctx, student_optimizer)

    def synthesise(self, ctx: Context, adversarial_weight: float) -> Iterator[Step]:
        """One batch of images for the pool."""
        cfg, count = self.cfg, self.cfg.synthesis_batch_size
        labels = torch.randint(self.num_classes, (count,), generator=ctx.rng, device=ctx.device)
        noise = torch.randn(count, *self.spec.shape, generator=ctx.rng, device=ctx.device)
        pixels = nn.Parameter(noise)
        self.adversarial_weight = adversarial_weight
        if cfg.low_resolution_steps:
            yield from self.optimise(ctx, pixels, labels, half_size=True)
        best = yield from self.optimise(ctx, pixels, labels, half_size=False)
        self.pool.add(best.kept["inputs"], labels, loss=best.loss)

    def optimise(
        self, ctx: Context, pixels: nn.Parameter, labels: Tensor, *, half_size: bool
    ) -> Generator[Step, None, Best]:
        """The steps of one size; gives what had the lowest loss among them."""
        cfg = self.cfg
        self.half_size = half_size
        steps = cfg.low_resolution_steps if half_size else cfg.inversion_steps
        reach = cfg.roll // 2 if half_size else cfg.roll
        adam = optim.factory("adam", cfg.inversion_lr, betas=cfg.inversion_betas)
        optimizer = ctx.optimizer("pixels", [pixels], adam, fresh=True)
        best = Best()
        for done in range(steps):
            if cfg.inversion_schedule == "cosine":
                optimizer.param_groups[0]["lr"] = cfg.inversion_lr * rise_and_fall(done, steps)
            # One shift for the whole batch.
            shifts = draw_shifts(1, reach, ctx.rng, flip=cfg.flip).expand(len(labels), -1)
            batch = Batch(labels=labels, extra={"pixels": pixels, "shifts": shifts})
            step = ctx.update("source", self.network, self.inversion, batch, optimizer)
            best.keep(step)
            if cfg.clip:
                with torch.no_grad():
                    pixels.copy_(self.spec.normalize(self.spec.denormalize(pixels)))
            yield step
        return best

    def inversion(self, teacher: Any, batch: Batch) -> Loss:
        """The loss of the rolled batch, minimised over the pixels."""
        cfg = self.cfg
        # A copy, since the step that follows writes into the pixels.
        inputs = batch.extra["pixels"].clone()
        view = F.avg_pool2d(inputs, 2) if self.half_size else inputs
        view = shift(view, batch.extra["shifts"], wrap=True)
        with self.statistics or nullcontext():
            answer = predict(teacher, view)
        terms = {"one_hot": batch.mean(one_hot_loss(answer.logits, batch.labels))}
        total = cfg.one_hot_weight * terms["one_hot"]
        if self.statistics is not None:
            terms["bn_statistics"] = self.distance(self.statistics)
            total = total + cfg.bn_weight * terms["bn_statistics"]
        if cfg.tv_weight:
            terms["total_variation"] = total_variation(view, form=cfg.tv_form)
            total = total + cfg.tv_weight * terms["total_variation"]
        if cfg.l2_weight:
            terms["norm"] = batch.mean(torch.linalg.vector_norm(view, dim=(1, 2, 3)))
            total = total + cfg.l2_weight * terms["norm"]
        student = None
        if self.adversarial_weight:
            with modes.evaluating(self.student):
                student = predict(self.student, view)
            differs = batch.mean(js_disagreement(student.logits, answer.logits))
            terms["adversarial"] = 1 - differs.clamp(0, 1)
            total = total + self.adversarial_weight * terms["adversarial"]
        return Loss(terms, total, inputs, answer, student)

    def distance(self, statistics: BatchNormProbe) -> Tensor:
        """L_bn, the first layer weighted by `first_bn_weight`."""
        seen, kept = statistics.observed(), statistics.stored()
        first = bn_statistics_loss(seen[:1], kept[:1])
        return bn_statistics_loss(seen, kept) + (self.cfg.first_bn_weight - 1) * first

    def variant(self) -> str:
        """The options that are on, in words; "" is DeepInversion as published."""
        cfg = self.cfg
        options = {
            "adaptive": cfg.adversarial_weight > 0,
            "two resolutions": cfg.low_resolution_steps > 0,
            "no BN statistics": not cfg.bn_weight,
            f"{cfg.warmup} batches first": cfg.warmup > 0,
        }
        return ", ".join(name for name, on in options.items() if on)

    def result(self) -> Result:
        """The trained student, or the pool where none was trained."""
        return Result("student", self.student) if self.cfg.rounds else Result("pool", self.pool)

    def passes(self, cfg: DeepInversionConfig) -> Mapping[str, float]:
        """Passes of each network per round of the student's loop; see the module docstring."""
        inversions = cfg.batches_per_round * (cfg.low_resolution_steps + cfg.inversion_steps)
        return passes_of(cfg, inversions=inversions, generator=False)


def rise_and_fall(done: int, steps: int) -> float:
    """Factor on the rate: a linear rise over a twentieth of the steps, then half a cosine.

    Args:
        done: steps that were taken, from 0.
        steps: all of them.

    Returns:
        In (0, 1], 1 at the end of the rise.
    """
    rise = int(_RISE * steps)
    if done < rise:
        return (done + 1) / rise
    return schedules.cosine().factor((done - rise) / (steps - rise))


def check_half_size(task: Task, networks: Sequence[nn.Module]) -> None:
    """Refuse networks that take images of one size only.

    Raises:
        ShapeError: one of them does not take images of half the size.
    """
    channels, height, width = task.spec.shape
    try:
        half = replace(task.spec, shape=(channels, height // 2, width // 2))
        for network in networks:
            Classification(half, task.num_classes).check(network)
    except ShapeError as error:
        raise ShapeError(
            f"got low_resolution_steps above 0 and a network that takes {height}x{width} only, "
            f"expected one that takes half of it as well; set low_resolution_steps: 0 ({error})"
        ) from error
