"""KD3.

Paper: Distribution Shift Matters for Knowledge Distillation with Webly Collected Images, Tang,
    Chen, Niu, Sugiyama, Gong, ICCV 2023, arXiv 2307.11469 (KD^3).

A student learns from a heap of images that nobody sorted: some are of the teacher's classes in
another style, many are of no class at all. The paper names three parts, each of which can be
switched off:
1. Selection by teacher and student together. p = a p_T + (1 - a) p_S, with a falling from 1 to 1/2
   in the course of the run; an image of class k = argmax p stays if p_k >= rho m_k, the running
   mean of that class, and p_k >= 1.2 / K. It weighs w = p_k, with mean 1 over those that stay.
2. Alignment of features and classifiers. The student's last layer is W_S r, with a projection r to
   the teacher's width; L_fea = w |v * (r f_S / |r f_S| - f_T / |f_T|)|^2, with v the lengths of
   W_T's columns over their mean; L_cls = |W_S - W_T|^2 / (K d) + |b_S - b_T|^2 / K.
   `tie_classifier` keeps W_S = W_T. At the end both are folded into the student's own layer.
3. MixDistribution. x' has the content of x and other means and deviations per channel, between
   those of x and of another image that stays, with noise. NT-Xent tells x and x' from all others;
   KL(T(x) || S(x')) asks for the same answer.
L = w tau^2 KL(T(x) || S(x)) + L_fea + L_cls + 0.1 NT-Xent + 0.5 w tau^2 KL(T(x) || S(x')).

Reconstruction: there is no public code, and only the abstract and the introduction were at hand.
    That these three parts exist and what they are for is the paper's. Every formula and every
    constant above and in the settings is ours, so what this method gives is our result and not the
    paper's; none of the paper's figures can be held against it.

Differs from the paper: as far as it is known, nothing. Of our own reconstruction: the student votes
    by an eval pass of its own, without gradient, before the forward, so that images which go cost
    no training pass and only those which stay are mixed; that is the cheaper way as soon as a third
    goes. W_S starts as W_T, since L_cls, divided by K d, brings it there slowly. MixDistribution
    works on images, not on features. An epoch of `selection: epoch` looks at `candidates` images
    for each that it trains on, not at all of the heap. Of the rival DFND the choice of images is
    there (`selection: epoch, per_class: false, teacher_share_end: 1`), its matrix of label noise is
    not. A batch without what was drawn for it, as a plug-in makes one of remembered images, has the
    terms of 1 and 2 alone.

Cost per round: `iterations` times: T forward; S forward in eval mode (none with `teacher_share_end:
    1` or without selection), forward and backward on the images that stay and on as many perturbed
    ones, with `split_bn` one after the other; g forward and backward. With `selection: epoch` the
    eval pass, and one more of T, take `candidates` times as many.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core import modes, optim, parallel, schedules
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.rows import Selection
from vestige.core.types import Batch, Inputs, Loss, Prediction, Requires, Result, Step, predict
from vestige.losses.contrastive import nt_xent
from vestige.losses.distill import kl_divergence
from vestige.losses.feature import (
    channel_weights,
    classifier_alignment_loss,
    weighted_feature_loss,
)
from vestige.methods import _untuned
from vestige.models.alignment import ClassifierAlignment, last_linear, see
from vestige.models.heads import ProjectionHead
from vestige.models.probes import LinearProbe, instance_features, penultimate_layer
from vestige.sources.augment import random_views
from vestige.sources.mix import check_images, mixed
from vestige.sources.selection import (
    ChosenBatches,
    InstanceSelector,
    ScoreName,
    Votes,
    top_shares,
)
from vestige.teachers.white_box import layers_of, module_of


class KD3Config(BaseModel):
    """Settings of KD3; all defaults are our choice, see "Reconstruction" above.

    Attributes:
        rounds: each of `iterations` student steps. 200.
        iterations: student steps per round. 391, 50,000 images at a batch of 128.
        batch_size: images looked at per step, 128; with `selection: batch` fewer are learned from.
        selection: "batch" keeps images of each batch by thresholds, "epoch" the best part of what
            is looked at before each round, "off" all.
        teacher_share: a of the first round. 1: the student knows nothing yet.
        teacher_share_end: a at the end. 0.5; 1 leaves the choice to the teacher.
        score: what images are chosen and weighed by: "confidence", the largest p; "energy" or
            "logit-norm", which junk that looks certain has less of.
        soft_weights: weigh images that stay by their score. True; False weighs all by 1.
        strictness: of "batch": rho. 1; higher keeps less.
        floor: least p of an image that stays, times K. 1.2.
        momentum: of "batch": of the running means. 0.99.
        warm_rows: of "batch": images of a class before its running mean counts. 50.
        keep_share: of "epoch": share of each class that stays. 0.5.
        candidates: of "epoch": images looked at for each that is trained on. 2.
        per_class: of "epoch": False keeps that share of all images, whatever their class.
        class_quota: most images of one class that stay, in multiples of an even part: of a batch
            B / K, of an epoch that of `keep_share`. 0: any. Where one class gathers the junk, which
            confidence alone does not tell, a quota below 1 was seen to do most of the work.
        temperature: tau of both KL terms. 4; higher compares small probabilities more.
        feature_weight: of L_fea. 1; 0 leaves it out.
        classifier_weight: of L_cls. 1; 0 leaves it out. With both 0, and the classifier not tied,
            the student keeps its own last layer.
        channel_weights: weigh channels of L_fea by v. True.
        tie_classifier: W_S is W_T and does not move. False.
        always_project: a projection also where both networks' features have one width. False.
        teacher_layer: name of the linear layer that makes the teacher's logits. "": the last one.
        student_layer: likewise of the student.
        contrastive_weight: of NT-Xent. 0.1; 0 leaves it out.
        contrast_temperature: of NT-Xent. 0.5.
        false_negatives: two images whose teacher's probabilities have at least this product are not
            told apart by NT-Xent. 1: all are; 0.8 spares images of one class.
        head_dim: width of g's output, where NT-Xent compares. 128.
        consistency_weight: of KL(T(x) || S(x')). 0.5; 0 leaves it out.
        mix_concentration: of the Beta distribution of shares. 0.1, MixStyle's; 1 is uniform.
        mix_noise: kappa, of the new statistics, in deviations over the batch. 0.5.
        split_bn: x' passes by itself and leaves running statistics alone. False: x and x' pass
            together and share batch statistics.
        crop_padding: crop each image after padding it by so many black pixels. 4 (32 pixels).
        flip: mirror images at random. True; False for digits.
        least_area: enlarge a part of each image of at least this share. 1 is off; 0.08 is usual at
            224 pixels, with `crop_padding: 0`.
        student_optimizer: "sgd" with momentum 0.9, or "adam".
        student_lr: 0.1 (SGD). Higher is faster until it diverges.
        student_weight_decay: 5e-4.
        schedule: of the rate: "cosine", "multistep" or "constant".
        milestones: of "multistep" as shares of the rounds, x0.1 each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(200, ge=1)
    iterations: int = Field(391, ge=1)
    batch_size: int = Field(128, ge=2)
    selection: Literal["batch", "epoch", "off"] = "batch"
    teacher_share: float = Field(1.0, ge=0, le=1)
    teacher_share_end: float = Field(0.5, ge=0, le=1)
    score: ScoreName = "confidence"
    soft_weights: bool = True
    strictness: float = Field(1.0, ge=0)
    floor: float = Field(1.2, ge=0)
    momentum: float = Field(0.99, ge=0, lt=1)
    warm_rows: int = Field(50, ge=0)
    keep_share: float = Field(0.5, gt=0, le=1)
    candidates: float = Field(2.0, ge=1)
    per_class: bool = True
    class_quota: float = Field(0.0, ge=0)
    temperature: float = Field(4.0, gt=0)
    feature_weight: float = Field(1.0, ge=0)
    classifier_weight: float = Field(1.0, ge=0)
    channel_weights: bool = True
    tie_classifier: bool = False
    always_project: bool = False
    teacher_layer: str = ""
    student_layer: str = ""
    contrastive_weight: float = Field(0.1, ge=0)
    contrast_temperature: float = Field(0.5, gt=0)
    false_negatives: float = Field(1.0, gt=0, le=1)
    head_dim: int = Field(128, ge=1)
    consistency_weight: float = Field(0.5, ge=0)
    mix_concentration: float = Field(0.1, gt=0, le=1)
    mix_noise: float = Field(0.5, ge=0)
    split_bn: bool = False
    crop_padding: int = Field(4, ge=0)
    flip: bool = True
    least_area: float = Field(1.0, gt=0, le=1)
    student_optimizer: optim.OptimizerName = "sgd"
    student_lr: float = Field(0.1, gt=0)
    student_weight_decay: float = Field(5e-4, ge=0)
    schedule: schedules.ScheduleName = "cosine"
    milestones: tuple[schedules.Share, ...] = (0.5, 0.75)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.least_area < 1 and self.crop_padding:
            raise ValueError(
                f"got least_area {self.least_area} and crop_padding {self.crop_padding}, which "
                "both crop; set crop_padding: 0 or least_area: 1"
            )
        return self

    @property
    def differs(self) -> str:
        """The options that are on, in words; "" is the reconstruction with all of its parts."""
        options = {
            "no selection": self.selection == "off",
            "selection per epoch": self.selection == "epoch",
            "selection by the teacher alone": self.selection != "off" and not self.asks_student,
            "no alignment": not self.aligns,
            "no feature alignment": self.aligns and not self.feature_weight,
            "no classifier alignment": self.aligns
            and not (self.classifier_weight or self.tie_classifier),
            "tied classifier": self.tie_classifier,
            "no MixDistribution": not self.mixes,
            "no contrast": self.mixes and not self.contrastive_weight,
            "no consistency": self.mixes and not self.consistency_weight,
            "split BN": self.mixes and self.split_bn,
        }
        return ", ".join(name for name, on in options.items() if on)

    def selector(self, student: nn.Module, num_classes: int) -> InstanceSelector:
        """What keeps images of a batch, with these settings."""
        return InstanceSelector(
            student,
            num_classes,
            momentum=self.momentum,
            strictness=self.strictness,
            floor=self.floor,
            warm_rows=self.warm_rows,
            score=self.score,
            soft=self.soft_weights,
            quota=self.class_quota,
        )

    def best(self, found: Votes, num_classes: int) -> Tensor:
        """Which of the images that an epoch looks at stay, (B,) bool."""
        return top_shares(
            found,
            share=self.keep_share,
            per_class=self.per_class,
            quota=self.class_quota,
            floor=self.floor / num_classes,
        )

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms besides distillation."""
        return {
            "features": self.feature_weight,
            "classifier": self.classifier_weight,
            "contrast": self.contrastive_weight,
            "consistency": self.consistency_weight,
        }

    @property
    def looks(self) -> int:
        """Batches per round that are looked at before they are trained on."""
        return math.ceil(self.candidates * self.iterations) if self.selection == "epoch" else 0

    @property
    def aligns(self) -> bool:
        """Whether the student's last layer takes the teacher's form."""
        return bool(self.feature_weight or self.classifier_weight or self.tie_classifier)

    @property
    def mixes(self) -> bool:
        """Whether images get other distributions."""
        return bool(self.contrastive_weight or self.consistency_weight)

    @property
    def asks_student(self) -> bool:
        """Whether the student has a vote in the choice of images."""
        return self.selection != "off" and min(self.teacher_share, self.teacher_share_end) < 1


class KD3:
    """Teaches a student from a heap of images of which not all are worth it."""

    Config = KD3Config
    requires = Requires(tasks=("classification",), sources=("foreign",), roles=("student",))

    def __init__(
        self,
        cfg: KD3Config,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        if cfg.mixes:
            check_images(task.spec)
        self.cfg, self.spec, self.student = cfg, task.spec, student
        self.teacher = teachers[0]
        self.selector = cfg.selector(student, task.num_classes)
        self.best = partial(cfg.best, num_classes=task.num_classes)
        heap, size = sources["foreign"], cfg.batch_size
        self.heap = ChosenBatches(heap, self.selector, self.answered, batch_size=size)
        self.alignment: ClassifierAlignment | None = None
        self.head: ProjectionHead | None = None
        if cfg.aligns:
            shape, network = task.spec.shape, module_of(self.teacher)
            layer = last_linear(network, shape, *layers_of(network, [cfg.teacher_layer]))
            self.below = LinearProbe(network, layer)
            last: Any = network.get_submodule(layer)
            self.target = last.weight, last.bias
            self.channels = channel_weights(last.weight) if cfg.channel_weights else None
            own = last_linear(student, shape, cfg.student_layer, whose="student")
            how = {"tied": cfg.tie_classifier, "always_project": cfg.always_project}
            self.alignment = ClassifierAlignment(student, own, last, **how)
        if cfg.contrastive_weight:
            self.above = cfg.student_layer or penultimate_layer(student)
            _, width = instance_features(student, task.spec.shape, [self.above])
            self.head = ProjectionHead(width, cfg.head_dim)

    @classmethod
    def suggest(
        cls, task: Task, teachers: Sequence[Teacher], student: nn.Module
    ) -> Mapping[str, Any]:
        """Settings for networks and inputs that nobody tuned, without augmentation; our choices."""
        found = _untuned.imitation(task, teachers[0], student, passes=7)
        return {**found, "crop_padding": 0, "flip": False} if found else {}

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """Student, the selector's running means, what was looked at, and g."""
        parts: dict[str, Stateful | Sharded] = {"student": self.student}
        parts |= {"selector": self.selector, "looks": self.heap.record}
        return parts if self.head is None else {**parts, "head": self.head}

    def selections(self) -> Mapping[str, Selection]:
        """How often each image was looked at and learned from."""
        return {"foreign": self.heap.record}

    def run(self, ctx: Context) -> Iterator[Step]:
        """Look, keep, perturb, learn."""
        cfg = self.cfg
        # The student's last layer is projection and classifier meanwhile, and folded after it.
        with self.alignment or nullcontext():
            factory = optim.factory(
                cfg.student_optimizer, cfg.student_lr, weight_decay=cfg.student_weight_decay
            )
            rates = schedules.named(cfg.schedule, cfg.milestones)
            optimizers = [
                ctx.optimizer(name, part.parameters(), factory, rates)
                for name, part in self.parts().items()
                if isinstance(part, nn.Module)
            ]
            modes.train_mode(self.student)
            for _ in ctx.rounds("distill", cfg.rounds):
                change = cfg.teacher_share_end - cfg.teacher_share
                self.selector.teacher_share = cfg.teacher_share + change * ctx.progress.fraction
                for kept in self.chosen(ctx):
                    batch = self.perturbed(kept, ctx)
                    yield ctx.update("student", self.student, self.imitation, batch, *optimizers)

    def chosen(self, ctx: Context) -> Iterator[Batch]:
        """The round's batches, of images that stay, with the teacher's answers."""
        cfg = self.cfg
        if cfg.selection != "epoch":
            return self.heap.drawn(cfg.iterations, ctx.rng, select=cfg.selection == "batch")
        return self.heap.best(cfg.iterations, cfg.looks, ctx.rng, self.best)

    def answered(self, inputs: Inputs, rng: torch.Generator | None = None) -> Batch:
        """Images, augmented if there is a generator, with the teacher's logits and features."""
        cfg = self.cfg
        if rng is not None:
            inputs = random_views(
                inputs, self.spec, rng, padding=cfg.crop_padding, flip=cfg.flip, area=cfg.least_area
            )
        with torch.no_grad(), self.below if self.alignment else nullcontext():
            extra = {"teacher": predict(self.teacher, inputs).logits}
        if self.alignment:
            extra["features"] = self.below.read().inputs
        return Batch(inputs, extra=extra)

    def perturbed(self, batch: Batch, ctx: Context) -> Batch:
        """The batch with x' of its images, mixed with one another."""
        cfg, images = self.cfg, batch.inputs
        if not cfg.mixes or not isinstance(images, Tensor):
            return batch
        views = mixed(images, ctx.rng, concentration=cfg.mix_concentration, noise=cfg.mix_noise)
        return replace(batch, extra={**batch.extra, "perturbed": views})

    def imitation(self, student: Any, batch: Batch) -> Loss:
        """L of the module docstring, minimised over the student, r, W_S and g."""
        cfg, rows, tau = self.cfg, len(batch), self.cfg.temperature
        inputs: Any = batch.inputs
        wanted = {"teacher", "features"} if self.alignment else {"teacher"}
        known = batch.extra if wanted <= set(batch.extra) else self.answered(inputs).extra
        teacher, views = known["teacher"], batch.extra.get("perturbed")
        looks = {
            "features": self.above if self.head and views is not None else "",
            "aligned": self.alignment.inside if self.alignment else "",
        }
        seen = see(self.student, student, inputs, views, apart=cfg.split_bn, **looks)
        clean, other = seen.logits[:rows], seen.logits[rows:]
        losses = {"distillation": kl_divergence(clean, teacher, temperature=tau)}
        if (last := seen.aligned) is not None:
            losses["features"] = weighted_feature_loss(
                last.inputs[:rows], known["features"], channels=self.channels
            )
            gap = classifier_alignment_loss((last.weight, last.bias), self.target)
            losses["classifier"] = gap.expand(rows)
        if seen.features is not None:
            losses["contrast"] = self.contrast(seen.features, teacher)
        if views is not None:
            losses["consistency"] = kl_divergence(other, teacher, temperature=tau)
        weights = {"distillation": 1.0, **cfg.weights}
        terms = {name: batch.mean(of_row) for name, of_row in losses.items() if weights[name]}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return Loss(terms, total, inputs, Prediction(teacher), Prediction(clean))

    def contrast(self, features: Tensor, teacher: Tensor) -> Tensor:
        """NT-Xent of x and x', (B,); among the rows of all processes that share a batch."""
        cfg, probs = self.cfg, F.softmax(teacher, 1)
        first, second = (self.head or nn.Identity())(features).chunk(2)
        gather = partial(parallel.batch_rows, own_first=True)
        spared = (
            probs @ gather(probs).t() > cfg.false_negatives if cfg.false_negatives < 1 else None
        )
        keys = gather(first), gather(second)
        return nt_xent(first, second, temperature=cfg.contrast_temperature, keys=keys, same=spared)

    def variant(self) -> str:
        """The options that are on, in words; "" is the reconstruction with all of its parts."""
        return self.cfg.differs

    def result(self) -> Result:
        """The student; once the run is over with a last layer of its own form again."""
        return Result("student", self.student)

    def passes(self, cfg: KD3Config) -> Mapping[str, float]:
        """Passes of each network per round; see the module docstring."""
        n = cfg.iterations
        # A round in which the teacher decides alone does without the student's vote.
        voting = 1 - (cfg.teacher_share == 1) / cfg.rounds if cfg.asks_student else 0
        taught = n * (2 if cfg.mixes and cfg.split_bn else 1)
        passes = {
            "teacher_forward": n + cfg.looks,
            "student_forward": taught + voting * (cfg.looks or n),
            "student_backward": taught,
            "student_step": n,
        }
        if cfg.contrastive_weight:
            passes |= dict.fromkeys(("head_forward", "head_backward", "head_step"), n)
        return {name: float(count) for name, count in passes.items()}
