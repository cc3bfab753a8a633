"""MosaicKD.

Paper: Mosaicking to Distill: Knowledge Distillation from Out-of-Domain Data, Fang, Bao, Song, Wang,
    Xie, Shen, Song, NeurIPS 2021, arXiv 2110.15094.

Four players: generator G, patch discriminator D, student S, teacher T. One iteration, with x = G(z)
and foreign images r, p = softmax T(x), pbar its mean over the batch:
1. D tells the patches of x from those of r: binary cross entropy, summed over patches;
2. G, on the same x: `patch_weight` * (patches of x pass for given ones) + `align_weight` * H(p)
   - `adversarial_weight` * KL(T || S) + `balance_weight` * sum_k pbar_k log2 pbar_k;
3. S, `student_steps` times on new fakes beside foreign images with augmentation: KL(T || S).
S, G and D are in train mode throughout, T in eval mode. For dense prediction p is one distribution
per pixel: entropy and KL are means over pixels, and pbar is the mean over pixels and batch.

Differs from the paper:
    Foreign images are drawn with replacement, and all of them are normalised with the teacher's
    statistics; the reference code normalises those of stage 3 with their own. The sum over patches
    is scaled to `reference_patches` patches, so that a weight means the same for every image size
    and stride; at 32 pixels that is the sum as published. The student's rate falls with each of its
    steps, not once per iteration. Segmentation follows the paper's description alone: there is no
    reference code for it. Options that are off by default: `student_mode: eval`, and
    `mix_foreign: false`, which keeps foreign images from the student.

Cost per round: `iterations` times: G forward `student_steps` + 1, backward 1; D forward 3, backward
    2 and 1 to its input; T forward `student_steps` + 1, backward to its input 1; S forward
    `student_steps` + 1, backward `student_steps` full and 1 to its input. Student steps are of two
    batches, fakes and foreign images. A `subset` asks T once about every foreign image.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from vestige.core import modes, optim, schedules
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.rows import Selection
from vestige.core.types import Batch, Loss, Requires, Result, Step, predict
from vestige.losses.adversarial import disagreement_loss, patch_loss
from vestige.losses.distill import kl_divergence
from vestige.losses.prior import class_balance_loss, entropy_loss
from vestige.methods import _untuned
from vestige.methods._fakes import as_inputs, given_images, latent, make_generator
from vestige.models.discriminators import PatchName, patch_discriminator
from vestige.sources.augment import crop_and_flip
from vestige.sources.ranking import UncertainRows


class MosaicKDConfig(BaseModel):
    """Settings of MosaicKD; defaults are those of the reference code's command for CIFAR-100.

    Attributes:
        rounds: each of `iterations` iterations. 200 (reference code).
        iterations: per round. 195, one pass over 50,000 images.
        student_steps: per iteration. 5 (reference code).
        batch_size: of fakes and of foreign images, each. 256 (reference code).
        patch_weight: of the patch term in G's loss and of D's loss. 1 (reference code). Higher
            makes patches more like the foreign images', too high leaves the teacher out.
        reference_patches: the sum over patches is scaled to this number, our choice: 64, as many as
            a 32x32 image has with the published discriminator. null takes the plain sum.
        align_weight: of the entropy of the teacher's answers. 1. Higher makes fakes of which the
            teacher is sure.
        adversarial_weight: of the disagreement. 1. Higher looks harder for what S does not know.
        balance_weight: of the class balance, in bits. 10. Higher spreads a batch over the classes.
        temperature: of the student's KL. 1 (reference code).
        subset: foreign images to keep, those of highest teacher entropy; null keeps all. The paper
            takes as many as the training set had where the heap holds the teacher's own classes.
        mix_foreign: whether the student sees foreign images, too.
        crop_padding: of the student's foreign images, in pixels, which are then cut at random. 4.
        flip: whether to mirror half of them.
        student_optimizer: "sgd" (reference code) with momentum 0.9, or "adam".
        student_lr: 0.1 (reference code, SGD).
        student_weight_decay: 1e-4 (reference code).
        student_mode: of S while G is trained. "train" (reference code) or "eval".
        generator_lr: of Adam with betas 0.5 and 0.999. 1e-3 (reference code).
        discriminator_lr: likewise. 1e-3 (reference code).
        schedule: of all rates, per step. "cosine" (reference code) or "constant".
        generator: "large" (reference code), "upsample", "pyramid" (any size) or "dcgan" (larger
            images).
        generator_head: of all but "dcgan". "sigmoid" (reference code) makes images in [0, 1].
        generator_width: 64 (reference code); cost grows with its square.
        latent_dim: 100 (reference code).
        discriminator: "patch" (reference code for 32 pixels), "deep" or "deeper" for larger images.
        discriminator_width: channels of its first layer; null takes the reference code's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(200, ge=1)
    iterations: int = Field(195, ge=1)
    student_steps: int = Field(5, ge=1)
    batch_size: int = Field(256, ge=2)
    patch_weight: float = Field(1.0, ge=0)
    reference_patches: int | None = Field(64, ge=1)
    align_weight: float = Field(1.0, ge=0)
    adversarial_weight: float = Field(1.0, ge=0)
    balance_weight: float = Field(10.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    subset: int | None = Field(None, ge=1)
    mix_foreign: bool = True
    crop_padding: int = Field(4, ge=0)
    flip: bool = True
    student_optimizer: optim.OptimizerName = "sgd"
    student_lr: float = Field(0.1, gt=0)
    student_weight_decay: float = Field(1e-4, ge=0)
    student_mode: Literal["train", "eval"] = "train"
    generator_lr: float = Field(1e-3, gt=0)
    discriminator_lr: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    generator: Literal["large", "upsample", "pyramid", "dcgan"] = "large"
    generator_head: Literal["sigmoid", "tanh_bn"] = "sigmoid"
    generator_width: int = Field(64, ge=1)
    latent_dim: int = Field(100, ge=1)
    discriminator: PatchName = "patch"
    discriminator_width: int | None = Field(None, ge=1)


class MosaicKD:
    """A student taught by images whose patches are borrowed and whose whole is the teacher's."""

    Config = MosaicKDConfig
    requires = Requires(
        tasks=("classification", "segmentation"),
        sources=("foreign",),
        roles=("student", "source", "auxiliary"),
    )

    def __init__(
        self,
        cfg: MosaicKDConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg = cfg
        self.spec = task.spec
        self.teacher = teachers[0]
        self.student = student
        foreign = sources["foreign"]
        self.foreign = foreign if cfg.subset is None else UncertainRows(foreign, cfg.subset)
        self.generator = make_generator(cfg, task.spec)
        self.discriminator = patch_discriminator(
            cfg.discriminator, task.spec.shape[0], cfg.discriminator_width
        )
        patches = self.discriminator.patches((task.spec.shape[1], task.spec.shape[2]))
        self.patch_scale = cfg.patch_weight * (cfg.reference_patches or patches) / patches

    @classmethod
    def suggest(
        cls, task: Task, teachers: Sequence[Teacher], student: nn.Module
    ) -> Mapping[str, Any]:
        """Settings for networks and inputs that nobody tuned; our choices, not the paper's."""
        return _untuned.generative(
            task,
            teachers[0],
            student,
            lambda given: make_generator(MosaicKDConfig(**given), task.spec),
            {"student_steps": 5, "discriminator_width": 32, "crop_padding": 1, "flip": False},
        )

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """The three networks that are trained, and the source if it has state."""
        own = {"generator": self.generator, "discriminator": self.discriminator}
        drawn = {"foreign": self.foreign} if isinstance(self.foreign, Stateful) else {}
        return {"student": self.student, **own, **drawn}

    def run(self, ctx: Context) -> Iterator[Step]:
        """The paper's loop: discriminate, generate, then imitate `student_steps` times."""
        cfg = self.cfg
        if isinstance(self.foreign, UncertainRows):
            self.foreign.rank(self.teacher, ctx.device)
        adam = partial(optim.factory, "adam", betas=(0.5, 0.999))
        imitator = optim.factory(
            cfg.student_optimizer, cfg.student_lr, weight_decay=cfg.student_weight_decay
        )
        student_optimizer, generator_optimizer, discriminator_optimizer = (
            ctx.optimizer(
                name,
                network.parameters(),
                make,
                schedules.named(cfg.schedule, steps=cfg.rounds * cfg.iterations * steps),
            )
            for name, network, make, steps in (
                ("student", self.student, imitator, cfg.student_steps),
                ("generator", self.generator, adam(cfg.generator_lr), 1),
                ("discriminator", self.discriminator, adam(cfg.discriminator_lr), 1),
            )
        )
        modes.train_mode(self.student)
        self.generator.train()
        self.discriminator.train()

        for _ in ctx.rounds("distill", cfg.rounds):
            for _ in range(cfg.iterations):
                noise = latent(cfg.batch_size, cfg.latent_dim, ctx)
                made = as_inputs(self.generator(noise), cfg, self.spec)
                if cfg.patch_weight:
                    given = given_images(self.foreign, cfg.batch_size, ctx)
                    both, net = Batch(made.detach(), extra={"given": given}), self.discriminator
                    yield ctx.update(
                        "auxiliary", net, self.discrimination, both, discriminator_optimizer
                    )
                # Stage 2 reuses the fakes with their graph, in which D does not stand.
                yield ctx.update(
                    "source", self.generator, self.generation, Batch(made), generator_optimizer
                )
                for _ in range(cfg.student_steps):
                    batch = self.mosaics_and_foreign(ctx)
                    yield ctx.update(
                        "student", self.student, self.imitation, batch, student_optimizer
                    )

    def discrimination(self, discriminator: Any, batch: Batch) -> Loss:
        """Patches of fakes against those of foreign images; minimised over D."""
        made = batch.mean(patch_loss(discriminator(batch.inputs), given=False))
        given = batch.mean(patch_loss(discriminator(batch.extra["given"]), given=True))
        loss = (made + given) / 2
        return Loss({"discrimination": loss}, self.patch_scale * loss)

    def generation(self, generator: Any, batch: Batch) -> Loss:
        """Patches, alignment, disagreement and balance; minimised over G through its fakes."""
        cfg, inputs = self.cfg, batch.inputs
        teacher = predict(self.teacher, inputs)
        with modes.evaluating(self.student) if cfg.student_mode == "eval" else nullcontext():
            answer = predict(self.student, inputs)
        terms = {
            "alignment": batch.mean(entropy_loss(teacher.logits)),
            "adversarial": -batch.mean(disagreement_loss(answer.logits, teacher.logits, kind="kl")),
            "class_balance": class_balance_loss(teacher.logits, base=2.0),
        }
        total = (
            cfg.align_weight * terms["alignment"]
            + cfg.adversarial_weight * terms["adversarial"]
            + cfg.balance_weight * terms["class_balance"]
        )
        if cfg.patch_weight:
            logits = self.discriminator(inputs)
            terms["patches"] = batch.mean(patch_loss(logits, given=True))
            total = total + self.patch_scale * terms["patches"]
        return Loss(terms, total, inputs, teacher, answer)

    def imitation(self, student: Any, batch: Batch) -> Loss:
        """KL(T || S) on fakes and foreign images, minimised over S."""
        inputs = batch.inputs
        with torch.no_grad():
            teacher = predict(self.teacher, inputs)
        answer = predict(student, inputs)
        distance = batch.mean(
            kl_divergence(answer.logits, teacher.logits, temperature=self.cfg.temperature)
        )
        fresh = batch.extra.get("fresh")
        return Loss({"distillation": distance}, distance, inputs, teacher, answer, fresh)

    @torch.no_grad()
    def mosaics_and_foreign(self, ctx: Context) -> Batch:
        """New fakes, then foreign images with augmentation."""
        cfg = self.cfg
        noise = latent(cfg.batch_size, cfg.latent_dim, ctx)
        inputs = as_inputs(self.generator(noise), cfg, self.spec)
        if not cfg.mix_foreign:
            return Batch(inputs)
        given = given_images(self.foreign, cfg.batch_size, ctx)
        given = crop_and_flip(given, self.spec, ctx.rng, padding=cfg.crop_padding, flip=cfg.flip)
        joined = Batch(inputs).joined(given)
        # What somebody handed in is not made, so it does not count as fresh fakes.
        joined.extra = {"fresh": torch.arange(len(joined), device=inputs.device) < len(inputs)}
        return joined

    def selections(self) -> Mapping[str, Selection]:
        """Which foreign images were kept, where a subset was asked for."""
        foreign = self.foreign
        return {"foreign": foreign.selection} if isinstance(foreign, UncertainRows) else {}

    def variant(self) -> str:
        """The options that are on, in words; "" is MosaicKD as published."""
        options = {
            "without patches": not self.cfg.patch_weight,
            "without foreign images for the student": not self.cfg.mix_foreign,
            "student in eval mode": self.cfg.student_mode == "eval",
        }
        return ", ".join(name for name, on in options.items() if on)

    def result(self) -> Result:
        """The trained student."""
        return Result("student", self.student)

    def passes(self, cfg: MosaicKDConfig) -> Mapping[str, float]:
        """Passes of each network per round; see the module docstring."""
        n, k = cfg.iterations, cfg.student_steps
        told = n * bool(cfg.patch_weight)
        passes = {
            "generator_forward": n * (k + 1),
            **dict.fromkeys(("generator_backward", "generator_step"), n),
            "discriminator_forward": 3 * told,
            "discriminator_backward": 2 * told,
            "discriminator_backward_to_input": told,
            "discriminator_step": told,
            **dict.fromkeys(("teacher_forward", "student_forward"), n * (k + 1)),
            **dict.fromkeys(("teacher_backward_to_input", "student_backward_to_input"), n),
            **dict.fromkeys(("student_backward", "student_step"), n * k),
        }
        return {name: float(count) for name, count in passes.items()}
