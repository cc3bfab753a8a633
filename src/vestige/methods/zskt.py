"""ZSKT.

Paper: Zero-shot Knowledge Transfer via Adversarial Belief Matching, Micaelli, Storkey, NeurIPS
    2019, arXiv 1905.09768.

Pure min-max on the KL divergence of teacher and student, KL(softmax t || softmax s) / K. One
pseudo-batch:
1. generator, once: x = G(z), maximise the divergence;
2. student, `student_steps` times on the same images: minimise the divergence, plus
   `attention_weight` times the distance of the attention maps of paired layers.
Both with Adam, gradients clipped to a norm of 5.

Differs from the paper:
    The student's steps do not go back through the generator, and what the teacher says of the
    images is asked once; same result, less work. `z_policy: fresh` draws new images for each
    student step, as DFAD and DataFree do: another algorithm. Layers for attention are found as the
    last of each resolution that both networks have, unless named. `generator: pyramid` makes images
    of any size and `generator_head: sigmoid` images in [0, 1].

Cost per round: `iterations` times: G forward, backward; T forward, backward to its input; S
    forward, backward to its input; then S forward, backward `student_steps` times. With fresh z
    also G and T forward `student_steps` times.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vestige.core import modes, optim, parallel, schedules
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Batch, Loss, Requires, Result, Step, predict
from vestige.errors import ContractError, RecipeError
from vestige.losses.adversarial import disagreement_loss
from vestige.losses.distill import kl_divergence
from vestige.losses.feature import attention_transfer_loss
from vestige.methods import _untuned
from vestige.methods._fakes import as_inputs, known_or_asked, latent, make_generator
from vestige.models.probes import FeatureProbe, paired_layers
from vestige.teachers.white_box import layers_of, module_of


class ZSKTConfig(BaseModel):
    """Settings of ZSKT; defaults are the reference code's for CIFAR-10.

    Attributes:
        rounds: each of `iterations` pseudo-batches. 800 of 100 (80,000 in the reference code).
        iterations: pseudo-batches per round.
        student_steps: per pseudo-batch. 10 (paper).
        batch_size: 128 (paper).
        z_policy: "same" (paper) takes all student steps on the generator's latest images, "fresh"
            draws new ones for each.
        attention_weight: of the attention transfer. 250 (paper), which goes with a divergence that
            is divided by the number of classes. 0 needs no maps.
        teacher_layers: whose outputs attend, by name. Empty finds the last of each resolution.
        student_layers: likewise, in the same order.
        clip: largest norm of a gradient. 5 (reference code).
        generator: "upsample" (the paper's) or "pyramid" (any size).
        generator_head: "bn" (paper, unbounded inputs of the teacher), "tanh_bn" or "sigmoid"
            (images in [0, 1]).
        generator_width: 64 (paper); cost grows with its square.
        latent_dim: 100 (paper).
        generator_lr: of Adam. 1e-3 (paper).
        student_optimizer: "adam" (paper), or "sgd" with momentum 0.9.
        student_lr: 2e-3 (paper, Adam).
        student_weight_decay: 0 (paper).
        schedule: of both rates: "cosine" (paper), "multistep" or "constant".
        milestones: of "multistep" as shares of the rounds, x0.1 each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(800, ge=1)
    iterations: int = Field(100, ge=1)
    student_steps: int = Field(10, ge=1)
    batch_size: int = Field(128, ge=2)
    z_policy: Literal["same", "fresh"] = "same"
    attention_weight: float = Field(250.0, ge=0)
    teacher_layers: tuple[str, ...] = ()
    student_layers: tuple[str, ...] = ()
    clip: float = Field(5.0, gt=0)
    generator: Literal["upsample", "pyramid"] = "upsample"
    generator_head: Literal["bn", "tanh_bn", "sigmoid"] = "bn"
    generator_width: int = Field(64, ge=1)
    latent_dim: int = Field(100, ge=1)
    generator_lr: float = Field(1e-3, gt=0)
    student_optimizer: optim.OptimizerName = "adam"
    student_lr: float = Field(2e-3, gt=0)
    student_weight_decay: float = Field(0.0, ge=0)
    schedule: schedules.ScheduleName = "cosine"
    milestones: tuple[schedules.Share, ...] = (0.5, 0.75)


class ZSKT:
    """A generator that looks for divergence, and a student that closes it on the spot."""

    Config = ZSKTConfig
    requires = Requires(tasks=("classification",), roles=("student", "source"))

    def __init__(
        self,
        cfg: ZSKTConfig,
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
        self.maps: tuple[Tensor, ...] = ()
        self.probes: tuple[FeatureProbe, FeatureProbe] | None = None
        if cfg.attention_weight:
            network = module_of(self.teacher)
            layers = layers_of(network, cfg.teacher_layers), cfg.student_layers
            if len(layers[0]) != len(layers[1]):
                raise RecipeError(
                    f"got {len(layers[0])} teacher_layers and {len(layers[1])} student_layers, "
                    "expected pairs; name as many of both"
                )
            if not layers[0]:
                layers = paired_layers(network, student, task.spec.shape)
            self.probes = FeatureProbe(network, layers[0]), FeatureProbe(student, layers[1])

    @classmethod
    def suggest(
        cls, task: Task, teachers: Sequence[Teacher], student: nn.Module
    ) -> Mapping[str, Any]:
        """Settings for networks and inputs that nobody tuned; our choices, not the paper's."""
        return _untuned.generative(
            task,
            teachers[0],
            student,
            lambda given: make_generator(ZSKTConfig(**given), task.spec),
            {"student_steps": 10, "attention_weight": 0.0},
        )

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """Student and generator."""
        return {"student": self.student, "generator": self.generator}

    def run(self, ctx: Context) -> Iterator[Step]:
        """The paper's loop: one generation, then `student_steps` imitations."""
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
            "generator", self.generator.parameters(), optim.factory("adam", cfg.generator_lr), rates
        )
        modes.train_mode(self.student)
        self.generator.train()

        for _ in ctx.rounds("distill", cfg.rounds):
            for _ in range(cfg.iterations):
                noise = Batch(latent=latent(cfg.batch_size, cfg.latent_dim, ctx))
                step = ctx.update(
                    "source",
                    self.generator,
                    self.generation,
                    noise,
                    generator_optimizer,
                    clip=cfg.clip,
                )
                yield step
                same = self.pseudo_batch(step)
                for index in range(cfg.student_steps):
                    new = torch.full((cfg.batch_size,), not index, device=ctx.device)
                    batch = replace(same, extra={**same.extra, "fresh": new})
                    if cfg.z_policy == "fresh":
                        batch = self.fresh_batch(ctx)
                    yield ctx.update(
                        "student",
                        self.student,
                        self.imitation,
                        batch,
                        student_optimizer,
                        clip=cfg.clip,
                    )

    def pseudo_batch(self, step: Step) -> Batch:
        """The images of the generator's step, with what the teacher said and saw."""
        if step.loss is None or step.loss.teacher is None:
            raise ContractError("a plug-in took the source's loss; expected it with answers")
        maps = {f"map{index}": values for index, values in enumerate(self.maps)}
        return Batch(step.loss.inputs, extra={"teacher": step.loss.teacher.logits, **maps})

    @torch.no_grad()
    def fresh_batch(self, ctx: Context) -> Batch:
        """New images."""
        made = self.generator(latent(self.cfg.batch_size, self.cfg.latent_dim, ctx))
        return Batch(as_inputs(made, self.cfg, self.spec))

    def generation(self, generator: Any, batch: Batch) -> Loss:
        """-KL(T || S) / K, minimised over the generator."""
        inputs = as_inputs(generator(batch.latent), self.cfg, self.spec)
        with self.probes[0] if self.probes else nullcontext():
            teacher = predict(self.teacher, inputs)
        if self.probes:
            self.maps = tuple(
                parallel.batch_rows(seen.detach()) for seen in self.probes[0].features()
            )
        answer = predict(self.student, inputs)
        divergence = disagreement_loss(answer.logits, teacher.logits, kind="kl")
        adversarial = -batch.mean(divergence / teacher.logits.shape[1])
        return Loss({"adversarial": adversarial}, adversarial, inputs, teacher, answer)

    def imitation(self, student: Any, batch: Batch) -> Loss:
        """KL(T || S) / K and attention transfer, minimised over the student."""
        inputs, known = batch.inputs, "teacher" in batch.extra
        with self.probes[0] if self.probes and not known else nullcontext():
            teacher = known_or_asked(self.teacher, batch)
        with self.probes[1] if self.probes else nullcontext():
            answer = predict(student, inputs)
        divergence = kl_divergence(answer.logits, teacher.logits, reduction="element")
        terms = {"distillation": batch.mean(divergence)}
        total = terms["distillation"]
        if self.probes:
            of_teacher = (
                [batch.extra[f"map{index}"] for index in range(len(self.maps))]
                if known
                else self.probes[0].features()
            )
            distance = attention_transfer_loss(self.probes[1].features(), of_teacher)
            terms["attention"] = batch.mean(distance)
            total = total + self.cfg.attention_weight * terms["attention"]
        return Loss(terms, total, inputs, teacher, answer, batch.extra.get("fresh"))

    def variant(self) -> str:
        """The options that are on, in words; "" is ZSKT as published."""
        options = {
            "fresh z": self.cfg.z_policy == "fresh",
            "no attention transfer": not self.cfg.attention_weight,
        }
        return ", ".join(name for name, on in options.items() if on)

    def result(self) -> Result:
        """The trained student."""
        return Result("student", self.student)

    def passes(self, cfg: ZSKTConfig) -> Mapping[str, float]:
        """Passes of each network per round; see the module docstring."""
        n, k = cfg.iterations, cfg.iterations * cfg.student_steps
        fresh = k if cfg.z_policy == "fresh" else 0
        passes = {
            "generator_forward": n + fresh,
            "generator_backward": n,
            "generator_step": n,
            "teacher_forward": n + fresh,
            "teacher_backward_to_input": n,
            "student_forward": n + k,
            "student_backward_to_input": n,
            "student_backward": k,
            "student_step": k,
        }
        return {name: float(count) for name, count in passes.items()}
