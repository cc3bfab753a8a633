"""CMI.

Paper: Contrastive Model Inversion for Data-Free Knowledge Distillation, Fang, Song, Wang, Shen,
    Wang, Song, IJCAI 2021, arXiv 2105.08584.

A pool of images grows batch by batch. For a batch, a fresh generator and its noise z are optimised
for `inversion_steps`. x = G(z) is seen twice, in a cropped and mirrored global view and in a local
view, a part of it enlarged:
1. inversion, on the global view: bn * L_bn + oh * CE(T(x), y) - adv * KL(T || S) where both agree;
2. contrast: h projects the features of both views, side by side with those of earlier images; each
   local view is to find its own global view among all others. It moves G through the local view.
The iteration with the lowest loss is kept: its images in the pool, its features in the bank. Then
the student imitates the teacher on batches of the pool.

The three published recipes: "scratch" is the default, a batch before each `student_steps` steps.
"Non-adversarial" is `warmup: 195, batches_per_round: 0, adversarial_weight: 0`, all images first.
"Adversarial" starts from such a pool (source `pool`) and adds harder images.

Differs from the paper:
    Only the rows of G's own images are compared with all keys, and `head_queries` of the earlier
    ones for h, in place of all with all: G's gradient is the same, h's an estimate, at a fraction
    of the work. An image of the bank counts only once it was stored: the reference code draws
    nothing at the moment that its bank is full, and keeps untrained images then. Labels are not
    sorted. Of a teacher without BatchNorm, `bn_weight: 0`, the last layer of each resolution gives
    the features. `generator: pyramid` makes images of any size.

Cost per round: `batches_per_round * inversion_steps` times: G forward and backward; T forward and
    backward to its input twice; S the same once with `adversarial_weight`; h on B, `head_queries`
    and `negatives` rows. `student_steps` times: T forward; S forward, backward.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from vestige.core import modes, optim, parallel, schedules
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Batch, Loss, Requires, Result, Step, predict
from vestige.losses.contrastive import info_nce
from vestige.losses.prior import one_hot_loss
from vestige.losses.statistics import bn_statistics_loss
from vestige.methods import _pool, _untuned
from vestige.models.generators import reinitialize
from vestige.models.heads import ProjectionHead
from vestige.models.probes import BatchNormProbe, instance_features
from vestige.sources.augment import crop_resize, draw_boxes, draw_shifts, shift
from vestige.sources.memory_bank import MemoryBank
from vestige.sources.pool import Pool
from vestige.sources.pool_mix import PoolMix
from vestige.teachers.white_box import layers_of, module_of


class CMIConfig(BaseModel):
    """Settings of CMI; defaults are the reference code's for CIFAR-10, the scratch recipe.

    Attributes:
        rounds: each of `batches_per_round` batches, then `student_steps` steps. 200 (reference
            code). 0 stops after the synthesis: the result is the pool.
        warmup: batches synthesised before the student's first step, never adversarial. 0
            (reference code); more keeps the student from learning the first batch by heart.
        batches_per_round: batches synthesised per round. 1 (reference code); 0 adds none.
        inversion_steps: optimisation steps per batch. 200 (reference code); more is sharper.
        synthesis_batch_size: images per batch. 256 (reference code).
        student_steps: imitation steps per round. 400 (reference code).
        batch_size: of the student's batches. 128 (reference code).
        bn_weight: of the distance to the teacher's BatchNorm statistics. 1 (reference code).
        one_hot_weight: of the cross entropy to the wanted class. 1 (reference code); 0.5 in the
            adversarial recipe.
        adversarial_weight: of the disagreement with the student, once it learns. 0.5 (reference
            code); 0 makes images that suit any student.
        contrast_weight: of the contrast. 0.8 (reference code); higher makes images more diverse, 0
            leaves model inversion without views, bank and head.
        contrast_temperature: 0.1 (reference code).
        bank_size: features kept, the newest. 40960 (reference code).
        negatives: of them compared with per step. 4096 (reference code); cost grows with it.
        head_queries: of these, how many look for their own partner, to train h. 256, our choice;
            the reference code takes all, at the cost of the whole comparison.
        head_dim: width of the projection. 256 (reference code).
        feature_layers: whose inputs are the features, by name. Empty takes all BatchNorm layers
            (reference code); for ResNet-34 it takes the inputs of the four stages.
        local_scale: least area of the local view. 0.25 (reference code).
        generator: "upsample" (the paper's, sides divisible by 4) or "pyramid" (any size).
        generator_width: 64 (reference code); cost grows with its square.
        latent_dim: 256 (reference code).
        generator_lr: of Adam, for G, z and h. 1e-3 (reference code).
        temperature: of the student's imitation. 20 (reference code).
        crop_padding: of the global view and the student's batches, in pixels. 4 (reference code).
        flip: mirror them and the local view at random. True (reference code); False for digits.
        student_optimizer: "sgd" (reference code) with momentum 0.9, or "adam".
        student_lr: 0.1 (reference code, SGD).
        student_weight_decay: 1e-4 (reference code).
        schedule: of the student's rate: "cosine" (reference code), "multistep" or "constant".
        milestones: of "multistep" as shares of the rounds, x0.1 each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(200, ge=0)
    warmup: int = Field(0, ge=0)
    batches_per_round: int = Field(1, ge=0)
    inversion_steps: int = Field(200, ge=1)
    synthesis_batch_size: int = Field(256, ge=2)
    student_steps: int = Field(400, ge=1)
    batch_size: int = Field(128, ge=2)
    bn_weight: float = Field(1.0, ge=0)
    one_hot_weight: float = Field(1.0, ge=0)
    adversarial_weight: float = Field(0.5, ge=0)
    contrast_weight: float = Field(0.8, ge=0)
    contrast_temperature: float = Field(0.1, gt=0)
    bank_size: int = Field(40960, ge=1)
    negatives: int = Field(4096, ge=0)
    head_queries: int = Field(256, ge=0)
    head_dim: int = Field(256, ge=1)
    feature_layers: tuple[str, ...] = ()
    local_scale: float = Field(0.25, gt=0, le=1)
    generator: Literal["upsample", "pyramid"] = "upsample"
    generator_width: int = Field(64, ge=1)
    latent_dim: int = Field(256, ge=1)
    generator_lr: float = Field(1e-3, gt=0)
    temperature: float = Field(20.0, gt=0)
    crop_padding: int = Field(4, ge=0)
    flip: bool = True
    student_optimizer: optim.OptimizerName = "sgd"
    student_lr: float = Field(0.1, gt=0)
    student_weight_decay: float = Field(1e-4, ge=0)
    schedule: schedules.ScheduleName = "cosine"
    milestones: tuple[schedules.Share, ...] = (0.5, 0.75)

    @model_validator(mode="after")
    def _holds_a_batch(self) -> Self:
        if self.contrast_weight and self.bank_size < self.synthesis_batch_size:
            raise ValueError(
                f"got bank_size {self.bank_size}, expected at least the {self.synthesis_batch_size}"
                " rows of one batch; raise bank_size or lower synthesis_batch_size"
            )
        return self


class CMI:
    """Inverts the teacher into a pool of images that differ, and teaches a student from it."""

    Config = CMIConfig
    requires = Requires(
        tasks=("classification",), optional_sources=("pool",), roles=("student", "source")
    )

    def __init__(
        self,
        cfg: CMIConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        _pool.check_pool(cfg.rounds, cfg.warmup, cfg.batches_per_round, sources.get("pool"))
        self.cfg = cfg
        self.spec = task.spec
        self.size = (task.spec.shape[1], task.spec.shape[2])
        self.num_classes = task.num_classes
        self.teacher = teachers[0]
        self.student = student
        self.generator = _pool.make_generator(cfg, task.spec)
        self.pool = Pool(task.spec, device=next(student.parameters()).device)
        pools = PoolMix(self.pool, sources.get("pool"))
        self.imitation = _pool.Imitation(cfg, self.teacher, student, pools, task.spec)
        network = module_of(self.teacher)
        self.statistics = BatchNormProbe(network) if cfg.bn_weight else None
        self.adversarial_weight = 0.0
        self.features = self.negatives = torch.empty(0)
        if cfg.contrast_weight:
            layers = layers_of(network, cfg.feature_layers)
            self.probe, width = instance_features(network, task.spec.shape, layers)
            self.head = ProjectionHead(width, cfg.head_dim)
            self.bank = MemoryBank(cfg.bank_size, 2 * width)
            self.negatives = torch.empty(0, 2 * width)

    @classmethod
    def suggest(
        cls, task: Task, teachers: Sequence[Teacher], student: nn.Module
    ) -> Mapping[str, Any]:
        """Settings for networks and inputs that nobody tuned; our choices, not the paper's."""
        return _untuned.inversion(task, teachers[0], student)

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """Student, generator and pool; with contrast the head and the bank."""
        parts: dict[str, Stateful | Sharded] = {"student": self.student}
        parts |= {"generator": self.generator, "pool": self.pool}
        return parts | ({"head": self.head, "bank": self.bank} if self.contrasts else {})

    @property
    def contrasts(self) -> bool:
        """Whether images are compared with each other."""
        return self.cfg.contrast_weight > 0

    def run(self, ctx: Context) -> Iterator[Step]:
        """The paper's loop: synthesise a batch, then teach the student from the pool."""
        cfg = self.cfg
        student_optimizer = self.imitation.optimizer(ctx)
        heads = []
        if self.contrasts:
            adam = optim.factory("adam", cfg.generator_lr)
            heads.append(ctx.optimizer("head", self.head.parameters(), adam))
        modes.train_mode(self.student)
        self.generator.train()

        if cfg.warmup:
            for _ in ctx.rounds("synthesis", cfg.warmup):
                yield from self.synthesise(ctx, heads, adversarial_weight=0.0)
        if cfg.rounds:
            for _ in ctx.rounds("distill", cfg.rounds):
                for _ in range(cfg.batches_per_round):
                    yield from self.synthesise(ctx, heads, cfg.adversarial_weight)
                yield from self.imitation.steps(ctx, student_optimizer)

    def synthesise(
        self, ctx: Context, heads: Sequence[Optimizer], adversarial_weight: float
    ) -> Iterator[Step]:
        """One batch of images for the pool."""
        cfg, count = self.cfg, self.cfg.synthesis_batch_size
        labels, latent = _pool.draw_targets(ctx, count, self.num_classes, cfg.latent_dim)
        reinitialize(self.generator, ctx.rng)
        optimizer = ctx.optimizer(
            "generator",
            [*self.generator.parameters(), latent],
            optim.factory("adam", cfg.generator_lr, betas=(0.5, 0.999)),
            fresh=True,
        )
        self.adversarial_weight = adversarial_weight
        best = _pool.Best()
        for _ in range(cfg.inversion_steps):
            views = {"shifts": draw_shifts(count, cfg.crop_padding, ctx.rng, flip=cfg.flip)}
            if self.contrasts:
                scale = (cfg.local_scale, 1.0)
                views["boxes"] = draw_boxes(count, self.size, ctx.rng, scale=scale, flip=cfg.flip)
                self.negatives = self.bank.draw(cfg.negatives, ctx.rng)
            batch = Batch(labels=labels, latent=latent, extra=views)
            step = ctx.update("source", self.generator, self.inversion, batch, optimizer, *heads)
            best.keep(step, features=self.features)
            yield step
        self.pool.add(best.kept["inputs"], labels, loss=best.loss)
        if self.contrasts:
            self.bank.push(best.kept["features"])

    def inversion(self, generator: Any, batch: Batch) -> Loss:
        """L_inv on the global view, and the contrast; minimised over G, z and h."""
        cfg = self.cfg
        images = generator(batch.latent)
        view = self.spec.normalize(shift(images, batch.extra["shifts"]))
        with self.statistics or nullcontext(), self.probe if self.contrasts else nullcontext():
            teacher = predict(self.teacher, view)
        wanted = one_hot_loss(teacher.logits, batch.labels)
        terms = {"one_hot": batch.mean(wanted)}
        total = cfg.one_hot_weight * terms["one_hot"]
        if self.statistics is not None:
            terms["bn_statistics"] = bn_statistics_loss(
                self.statistics.observed(), self.statistics.stored()
            )
            total = total + cfg.bn_weight * terms["bn_statistics"]
        answer = None
        if self.adversarial_weight:
            answer, hard = _pool.hardness(self.student, view, teacher, batch)
            terms["adversarial"] = -hard
            total = total + self.adversarial_weight * terms["adversarial"]
        if self.contrasts:
            terms["contrast"] = self.contrast(images, batch)
            total = total + cfg.contrast_weight * terms["contrast"]
        return Loss(terms, total, self.spec.normalize(images), teacher, answer)

    def contrast(self, images: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of finding the global view of each local one; by G and by h."""
        cfg = self.cfg
        of_global = self.probe.instance_means().detach()
        with self.probe:
            predict(self.teacher, self.spec.normalize(crop_resize(images, batch.extra["boxes"])))
        of_local = self.probe.instance_means()
        # The bank keeps the local features first.
        earlier_local, earlier_global = self.negatives.chunk(2, 1)
        with torch.no_grad():
            keys = self.head(torch.cat([of_global, earlier_global]))
            own, earlier = keys.split([len(of_global), len(earlier_global)])
            keys = torch.cat([parallel.batch_rows(own, own_first=True), earlier])
        asking = earlier_local[: cfg.head_queries]
        queries = self.head(torch.cat([of_local, asking]))
        new, old = queries.split([len(of_local), len(asking)])
        contrast = batch.mean(info_nce(new, keys, temperature=cfg.contrast_temperature))
        if len(old):
            # Their partners come first, as `info_nce` has it.
            partners = torch.cat([earlier, keys[: len(keys) - len(earlier)]])
            contrast = (
                contrast + info_nce(old, partners, temperature=cfg.contrast_temperature).mean()
            )
        features = torch.cat([of_local.detach(), of_global], 1)
        self.features = parallel.batch_rows(features)
        return contrast

    def variant(self) -> str:
        """The options that are on, in words; "" is the scratch recipe as published."""
        cfg = self.cfg
        options = {
            "no contrast": not self.contrasts,
            "not adversarial": not cfg.adversarial_weight,
            "no BN statistics": not cfg.bn_weight,
            f"{cfg.warmup} batches first": cfg.warmup > 0,
        }
        return ", ".join(name for name, on in options.items() if on)

    def result(self) -> Result:
        """The trained student, or the pool where none was trained."""
        return Result("student", self.student) if self.cfg.rounds else Result("pool", self.pool)

    def passes(self, cfg: CMIConfig) -> Mapping[str, float]:
        """Passes of each network per round of the student's loop; see the module docstring."""
        inversions = cfg.batches_per_round * cfg.inversion_steps
        if not cfg.contrast_weight:
            return _pool.passes_of(cfg, inversions=inversions)
        head = {"head_forward": 2.0, "head_backward": 1.0, "head_step": 1.0}
        return {
            **_pool.passes_of(cfg, inversions=inversions, views=2),
            **{name: inversions * times for name, times in head.items()},
        }
