"""Retain.

Paper: Learning to Retain while Acquiring: Combating Distribution-Shift in Adversarial Data-Free
    Knowledge Distillation, Patel, Mopuri, Qiu, CVPR 2023, arXiv 2302.14290.

A generator that moves on trains the student on a stream that changes, and the student forgets. So
its step on new inputs x is made to agree with one on remembered inputs x_m:
1. inner step on the method's loss of the new inputs (acquisition, meta-train):
   w' = w - inner_lr * (grad L(w; x) + inner_weight_decay * w);
2. retention (meta-test): L(w'; x_m). `meta: full` differentiates it through the inner step, so its
   gradient is (I - inner_lr * H) grad L(w'), H the Hessian of the inner loss; `meta: first-order`
   takes grad L(w') as it is; `meta: none` leaves retention out, which is plain replay (MB-DFKD,
   PRE-DFKD);
3. the gradient of retention is added to the method's own, of new and remembered inputs together
   (`joint: concat`, the reference code) or of new ones alone (`joint: acquire`, the paper).
Live BatchNorm statistics move in 3. alone, so they move as without retention.

Remembered inputs are those of earlier updates, kept in a ring of chunks (`memory: bank`), or what a
small autoencoder makes again (`memory: generative`), which is taught after 4 of 10 updates.

Differs from the paper:
    The reference code copies the student detached for its inner step, so its retention term sends
    no gradient and what it trains is `meta: none`. Here it flows.
    The loss is the method's, whatever it is; in the paper it is the mean absolute difference of
    logits, which `retention_loss: l1` takes for the retention term.
    Chunks are pushed at even distances of the run, 80 times as published (every 5 of 400 epochs),
    and in the first round, whose length nobody knows, at updates 1, 2, 4 and so on, so that runs of
    any length remember. Of several loops each has 80. Of a batch that holds earlier inputs already
    only new ones are kept. The retention term of a small batch has more rows than an eighth of it,
    see `least_rows`; the method's own loss has its eighth.
    Where the inner step leads to a retention term that is not finite, that update goes without it.

Cost per student update, beside the method's own pass on the new and remembered rows: with
    `first-order` forward and backward on the new rows (none with `acquire`, whose gradient is there
    already) and on the remembered ones; with `full` the same with a graph of the first backward,
    and a backward through it.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from vestige.core.functional import functional
from vestige.core.protocols import (
    Following,
    PluginContext,
    Sharded,
    Stateful,
    StudentUpdate,
    Task,
    Teacher,
)
from vestige.core.types import Access, Batch, Loss, Requires, count_rows, pick_rows, predict
from vestige.errors import ContractError
from vestige.losses.distill import l1_logits
from vestige.plugins._memories import Kept, Made, Memory
from vestige.sources.replay import Chunk

logger = logging.getLogger(__name__)

_LOOK_EVERY = 100


class RetainConfig(BaseModel):
    """Settings of Retain; defaults are the reference code's, with a gradient that flows.

    Attributes:
        memory: "bank" keeps earlier inputs, "generative" makes them again with a small autoencoder.
        meta: "full" (paper), "first-order" (no second derivatives, about half the cost) or "none"
            (replay alone).
        joint: what the method's own loss sees: "concat" (reference code) new and remembered inputs,
            "acquire" (paper) new ones alone.
        retention_loss: "method" takes the method's loss, "l1" the mean absolute difference of
            logits (paper), which for remembered inputs of a bank asks the teacher nothing.
        inner_lr: of the inner step, 0.9 (reference code). Higher looks further ahead; on small
            networks 0.9 may look too far, try 0.1. 0 makes retention the loss where the student is.
        inner_weight_decay: 5e-4 (reference code).
        share: remembered rows as a share of the student's new ones. 1/8 (reference code, of 512).
            Higher forgets less and learns slower; with 1/2 of 64 ZSKT's generator was seen to
            collapse on one of two seeds.
        least_rows: of the retention term at the least, but no more than new ones. 32, our choice:
            batch statistics of 8 rows made a student of batches of 64 learn much slower.
        chunks: that the bank holds, 10 (reference code). More reach further back.
        pushes: chunks that are pushed in the course of a loop. 80 (reference code: every 5 of 400
            epochs). Fewer reach further back.
        generator: of "generative": "upsample" (the paper's) or "pyramid" (any size).
        generator_head: of "generative": "tanh_bn" (reference code) or "sigmoid" (images in [0, 1]).
        generator_width: of "generative", 64 (reference code); cost grows with its square.
        latent_dim: of "generative", 1000 (reference code).
        memory_lr: of "generative", of both Adams. 5e-4 (reference code).
        memory_steps: of "generative": share of the student's updates after which the autoencoder
            takes a step, 0.4 (reference code). Higher remembers better and costs more.
        latent_lr: of "generative": step of the codes before they are replayed, 0.02 (reference
            code).
        one_hot_weight: of "generative", in that step. 1 (reference code).
        balance_weight: of "generative", in that step. 5 (reference code).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    memory: Literal["bank", "generative"] = "bank"
    meta: Literal["none", "first-order", "full"] = "full"
    joint: Literal["concat", "acquire"] = "concat"
    retention_loss: Literal["method", "l1"] = "method"
    inner_lr: float = Field(0.9, ge=0)
    inner_weight_decay: float = Field(5e-4, ge=0)
    share: float = Field(0.125, gt=0, le=1)
    least_rows: int = Field(32, ge=2)
    chunks: int = Field(10, ge=1)
    pushes: int = Field(80, ge=1)
    generator: Literal["upsample", "pyramid"] = "upsample"
    generator_head: Literal["tanh_bn", "sigmoid"] = "tanh_bn"
    generator_width: int = Field(64, ge=1)
    latent_dim: int = Field(1000, ge=1)
    memory_lr: float = Field(5e-4, gt=0)
    memory_steps: float = Field(0.4, gt=0, le=1)
    latent_lr: float = Field(0.02, ge=0)
    one_hot_weight: float = Field(1.0, ge=0)
    balance_weight: float = Field(5.0, ge=0)

    @model_validator(mode="after")
    def _replays(self) -> Self:
        if self.meta == "none" and self.joint == "acquire":
            raise ValueError("meta none with joint acquire replays nothing; change one of them")
        return self


class Retain:
    """Makes the student's step on new inputs agree with one on remembered inputs."""

    Config = RetainConfig
    requires = Requires(access=Access.LABELS, tasks=("classification", "segmentation"))

    def __init__(self, cfg: RetainConfig) -> None:
        self.cfg = cfg
        self.memory: Memory | None = None
        self._sound: Tensor | None = None
        self._told = False
        self._updates = 0

    def setup(
        self, task: Task, teachers: Sequence[Teacher], student: nn.Module, ctx: PluginContext
    ) -> None:
        """Makes the memory, which is empty."""
        cfg = self.cfg
        self.teacher = teachers[0]
        self.device = ctx.device
        self.ctx = ctx
        if cfg.memory == "generative":
            self.memory = Made(ctx, cfg, task.spec, self.teacher, rows=self.rows)
        else:
            self.memory = Kept(ctx, chunks=cfg.chunks, pushes=cfg.pushes, rows=self.rows)

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """Those of the memory."""
        return {} if self.memory is None else self.memory.parts()

    def rows(self, batch_size: int) -> int:
        """Remembered rows beside so many new ones; a single one has no batch statistics."""
        retained = 0 if self.cfg.meta == "none" else self.cfg.least_rows
        return max(2, min(max(retained, round(self.cfg.share * batch_size)), batch_size))

    def student_gradient(self, update: StudentUpdate, following: Following) -> Loss:
        """The method's gradient on new and remembered inputs, and that of retention."""
        if self.memory is None:
            raise ContractError("got an update before setup, expected setup first; call it")
        chunk = self.memory.draw(update.batch)
        if chunk is None:
            loss = following()
        else:
            # First, so that dropout draws here what it would have drawn without retention.
            loss = self._joint(update.batch, chunk, following)
            if self.cfg.meta != "none":
                loss = loss.plus({"retention": self._retain(update, chunk)})
        self.memory.remember(update.batch, loss)
        return loss

    def _joint(self, batch: Batch, chunk: Chunk, following: Following) -> Loss:
        """The method's own gradient and loss, with remembered rows marked as not new."""
        if self.cfg.joint == "acquire":
            return following(batch)
        chunk = self._share(chunk, len(batch))
        joined = batch.joined(chunk.inputs)
        if chunk.answers is not None and _hands_on_answers(batch):
            answers = torch.cat([batch.extra["teacher"], chunk.answers])
            joined = replace(joined, extra={"teacher": answers})
        loss = following(joined)
        if loss.inputs is None or count_rows(loss.inputs) != len(joined):
            return loss
        fresh = torch.ones(len(joined), dtype=torch.bool, device=loss.total.device)
        fresh[len(batch) :] = False
        if "fresh" in batch.extra:
            fresh[: len(batch)] = batch.extra["fresh"]
        return replace(loss, fresh=fresh)

    def _share(self, chunk: Chunk, batch_size: int) -> Chunk:
        """As many rows of the chunk, drawn by chance, as the method's own loss shall see."""
        have, wanted = count_rows(chunk.inputs), max(2, round(self.cfg.share * batch_size))
        if have <= wanted:
            return chunk
        rng = self.ctx.rng
        index = torch.randperm(have, generator=rng, device=rng.device)[:wanted]
        answers = None if chunk.answers is None else chunk.answers[index]
        return Chunk(pick_rows(chunk.inputs, index), answers)

    def _retain(self, update: StudentUpdate, chunk: Chunk) -> Tensor:
        """Add the gradient of the retention term to `.grad`; returns the term, () detached."""
        full = self.cfg.meta == "full"
        weights = list(update.params.values())
        slopes = self._slopes(update, weights)
        decay = self.cfg.inner_weight_decay
        moved = {
            name: weight - self.cfg.inner_lr * ((0 if slope is None else slope) + decay * weight)
            for (name, weight), slope in zip(update.params.items(), slopes, strict=True)
        }
        if not full:
            moved = {name: one.detach().requires_grad_(True) for name, one in moved.items()}
        term = self._retention_term(update, moved, chunk)
        towards = weights if full else list(moved.values())
        with self._full_precision():
            grads = torch.autograd.grad(term, towards, materialize_grads=True, allow_unused=True)
        sound = torch.isfinite(nn.utils.get_total_norm(grads)) & torch.isfinite(term)
        self._tell(sound)
        for weight, grad in zip(weights, grads, strict=True):
            kept = torch.where(sound, grad, 0)
            weight.grad = kept if weight.grad is None else weight.grad + kept
        return torch.where(sound, term.detach(), 0)

    def _slopes(
        self, update: StudentUpdate, weights: list[nn.Parameter]
    ) -> Sequence[Tensor | None]:
        """Gradient of the method's loss on the new rows; with a graph for `meta: full`."""
        full = self.cfg.meta == "full"
        if self.cfg.joint == "acquire" and not full:
            # The update's own gradient is that of the same rows at the same weights.
            return [weight.grad for weight in weights]
        inner = update.loss_fn(functional(update.model, {}), update.batch).total
        with self._full_precision():
            return torch.autograd.grad(inner, weights, create_graph=full, allow_unused=True)

    def _retention_term(
        self, update: StudentUpdate, weights: Mapping[str, Tensor], chunk: Chunk
    ) -> Tensor:
        """The loss of the student at `weights` on remembered rows, (), with gradient."""
        student = functional(update.model, weights)
        if self.cfg.retention_loss == "method":
            extra = {}
            if chunk.answers is not None and _hands_on_answers(update.batch):
                extra["teacher"] = chunk.answers
            return update.loss_fn(student, Batch(chunk.inputs, extra=extra)).total
        answers = chunk.answers
        if answers is None:
            with torch.no_grad():
                answers = predict(self.teacher, chunk.inputs).logits
        return l1_logits(predict(student, chunk.inputs).logits, answers).mean()

    def _full_precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, enabled=False)

    def _tell(self, sound: Tensor) -> None:
        """Say once that a retention term was left out."""
        self._sound = sound if self._sound is None else self._sound & sound
        self._updates += 1
        # Reading it would make every update wait for a GPU.
        if self._told or (sound.is_cuda and self._updates % _LOOK_EVERY):
            return
        if not bool(self._sound):
            self._told = True
            logger.warning(
                "the retention term was NaN or infinite after an inner step with inner_lr %g, "
                "expected a finite one; such updates go without it. Lower inner_lr",
                self.cfg.inner_lr,
            )


def _hands_on_answers(batch: Batch) -> bool:
    """Whether the method gives its loss the teacher's answers, and nothing else that is missing."""
    return set(batch.extra) == {"teacher"}
