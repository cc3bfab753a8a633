"""ZSKT.

Paper: Zero-shot Knowledge Transfer via Adversarial Belief Matching, Micaelli, Storkey, NeurIPS
    2019, arXiv 1905.09768.

Pure min-max on the KL divergence of teacher and student, KL(softmax t || softmax s) / K. One
pseudo-batch:
1. generator, once: x = G(z), maximise the divergence;
2. student, `student_steps` times on what the generator now makes of the same z: minimise the
   divergence, plus `attention_weight` times the distance of the attention maps of paired layers.
Both with Adam, gradients clipped to a norm of 5. S and G are in train mode throughout.

Differs from the paper:
    The student's images are made once, where the reference code makes the same ones anew for each
    step and goes back through the generator; same result, less work. Rates follow the schedule at
    the end of a round, not of a pseudo-batch. `z_policy: fresh` draws new images for each student
    step, as DFAD and DataFree do: another algorithm. Layers for attention are found as the last of
    each resolution that both networks have, unless named. `generator: pyramid` makes images of any
    size and `generator_head: sigmoid` images in [0, 1].

Cost per round: `iterations` times: G forward 2, backward 1; T forward 2, backward to its input 1; S
    forward, backward to its input 1; then S forward, backward `student_steps` times. With fresh z
    G and T forward `student_steps` + 1.
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
from vestige.errors import RecipeError
from vestige.losses.adversarial import disagreement_loss
from vestige.losses.distill import kl_divergence
from vestige.losses.feature import attention_map, attention_transfer_loss
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
        z_policy: "same" (paper) takes all student steps on one batch, of the z that the generator
            was just trained on; "fresh" draws new noise for each.
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
                yield ctx.update(
                    "source",
                    self.generator,
                    self.generation,
                    noise,
                    generator_optimizer,
                    clip=cfg.clip,
                )
                for batch in self.batches(noise, ctx):
                    yield ctx.update(
                        "student",
                        self.student,
                        self.imitation,
                        batch,
                        student_optimizer,
                        clip=cfg.clip,
                    )

    def batches(self, noise: Batch, ctx: Context) -> Iterator[Batch]:
        """What the student's steps of one pseudo-batch see, made as they are asked for."""
        cfg = self.cfg
        if cfg.z_policy == "fresh":
            for _ in range(cfg.student_steps):
                yield Batch(self.fakes(latent(cfg.batch_size, cfg.latent_dim, ctx)))
            return
        inputs = self.fakes(noise.latent)
        with torch.no_grad(), self.probes[0] if self.probes else nullcontext():
            extra = {"teacher": predict(self.teacher, inputs).logits}
        if self.probes:
            maps = map(attention_map, self.probes[0].features())
            extra |= {f"map{i}": seen for i, seen in enumerate(maps)}
        for index in range(cfg.student_steps):
            fresh = torch.full((cfg.batch_size,), not index, device=ctx.device)
            yield Batch(inputs, extra={**extra, "fresh": fresh})

    @torch.no_grad()
    def fakes(self, noise: Tensor | None) -> Tensor:
        """Images of the generator as it is, as inputs of the teacher."""
        return as_inputs(self.generator(noise), self.cfg, self.spec)

    def generation(self, generator: Any, batch: Batch) -> Loss:
        """-KL(T || S) / K, minimised over the generator."""
        inputs = as_inputs(generator(batch.latent), self.cfg, self.spec)
        teacher, answer = predict(self.teacher, inputs), predict(self.student, inputs)
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
                [batch.extra[f"map{i}"] for i in range(len(self.probes[0].names))]
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
        made = k if cfg.z_policy == "fresh" else n
        passes = {
            "generator_forward": n + made,
            "generator_backward": n,
            "generator_step": n,
            "teacher_forward": n + made,
            "teacher_backward_to_input": n,
            "student_forward": n + k,
            "student_backward_to_input": n,
            "student_backward": k,
            "student_step": k,
        }
        return {name: float(count) for name, count in passes.items()}
