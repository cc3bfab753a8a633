"""ZeroGen.

Paper: ZeroGen: Efficient Zero-shot Learning via Dataset Generation, Ye, Gao, Li, Xu, Feng, Wu, Yu,
    Kong, EMNLP 2022, arXiv 2202.07922; options of ProGen (arXiv 2210.12329) and SunGen (ICLR 2023).

The teacher is a language model of which only continuations are seen. It writes the data set that a
small model learns from; nobody labels anything, and no real text is needed where the prompts have
contexts of their own or none.
1. Contexts (stage C): short texts c ~ G(. | T_C), each once.
2. Texts (stage X): for each label y, x ~ G(. | T_y(c)), with nucleus sampling; of pairs and
   questions c is given. Self-debiasing for pairs: with p behind T_y and q the largest probability
   behind another label's prompt, p' ~ p max(exp(-lambda max(q - p, 0)), epsilon).
3. Cleaning: a text ends at the closing quote, else at a newline, else at the last full stop; what
   is too short, repeats its context or was there before is dropped, each with its reason.
4. The student minimises CE(f(x), y) on the texts that are left, as many of each label where the
   teacher wrote enough; a tenth of them picks the best epoch.
Question answering: candidates for answers are taken from given passages, and questions written for
them; the result is the data set.

Differs from the paper: contexts are written once and not once per label. Duplicates are dropped
    over the whole run. The texts that are learned from are as many of each label, taken in an order
    that their digests give, so that a small set is as varied as a large one. A text stops at its
    closing quote, where the code writes on and cuts. Answers are capitalised spans and numbers, not
    named entities of a model that must be fetched, and no network learns from them. The best epoch
    is kept by accuracy and then loss. `soft_labels` and `keep_fraction` are ours.

Cost per round: "contexts" and "texts": the teacher writes at most `round_texts` texts of at most 10
    and 40 tokens, each token one forward over one position, K of them with self-debiasing.
    "distill", one epoch: S forward and backward on nine tenths of the texts, forward on the others.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core import modes, optim
from vestige.core.best import KeptBest
from vestige.core.protocols import (
    Context,
    LearnsVocabulary,
    Sharded,
    Source,
    Stateful,
    Task,
    Teacher,
)
from vestige.core.types import Access, Batch, Loss, Requires, Result, Step, predict
from vestige.core.writing import Sampling
from vestige.errors import RecipeError
from vestige.sources.text_choice import TextChoice
from vestige.sources.text_pool import TextPool
from vestige.sources.writing import TextWriter, counted


class ZeroGenConfig(BaseModel):
    """Settings of ZeroGen.

    Attributes:
        samples: texts that the student learns from, over all labels, those that judge it included.
            200,000 (ProGen's script); more helps and then saturates.
        rounds: of stage X at most; it ends when every label has its texts, or when 2,000 of it in
            a row were dropped. 1,000, our choice.
        round_texts: texts that are asked for in a round; a checkpoint follows. 2,048, our choice.
        contexts: of stage C, if the prompts have one. 1,000, our choice; the code asks for 800,000
            per label, and fewer make texts that are more alike.
        context_rounds: of stage C at most, 256 contexts each. 50, our choice.
        top_p: 0.9 (reference code). Lower errs less and repeats itself more.
        top_k: 0, no limit (reference code).
        temperature: of the draw. 1 (reference code).
        debias_decay: lambda of self-debiasing, where the prompts ask for it. 200 (reference code).
        debias_floor: epsilon. 0.01 (reference code); higher holds less back.
        clean: False learns from whatever was written, for an arm without rules.
        label_in_prompt: False asks with a prompt that names no label, for an arm that must fail.
        shuffle_labels: learn from labels in a random order, for an arm that must fail.
        epochs: of the student. 20 (reference code, BiLSTM).
        patience: epochs without a better one before training stops. 5 (reference code).
        batch_size: 32 (reference code).
        student_optimizer: "adam" (reference code, BiLSTM); "adamw" for transformers.
        student_lr: 1e-4 (reference code, BiLSTM); ProGen has 1e-3.
        student_weight_decay: 0 (BiLSTM); 0.01 for DistilBERT (reference code).
        clip: largest norm of the student's gradient. 10 (reference code).
        held_share: of the texts, that pick the best epoch. 0.1 (reference code).
        soft_labels: share of the teacher's own judgement in the targets, for a teacher that shows
            it. 0 (paper); ours.
        soft_temperature: its mean losses per token are divided by it. 0.1, our choice: they differ
            by little.
        keep_fraction: share of each label's texts that a second training learns from, those that
            the first student believes most. 1: no second one (paper); ours.
        record_seed: is written into the records; the run's seed stands in the card.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    samples: int = Field(200_000, ge=2)
    rounds: int = Field(1000, ge=1)
    round_texts: int = Field(2048, ge=1)
    contexts: int = Field(1000, ge=1)
    context_rounds: int = Field(50, ge=1)
    top_p: float = Field(0.9, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    temperature: float = Field(1.0, gt=0)
    debias_decay: float = Field(200.0, ge=0)
    debias_floor: float = Field(0.01, gt=0, le=1)
    clean: bool = True
    label_in_prompt: bool = True
    shuffle_labels: bool = False
    epochs: int = Field(20, ge=1)
    patience: int = Field(5, ge=1)
    batch_size: int = Field(32, ge=1)
    student_optimizer: optim.OptimizerName = "adam"
    student_lr: float = Field(1e-4, gt=0)
    student_weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(10.0, gt=0)
    held_share: float = Field(0.1, ge=0, lt=1)
    soft_labels: float = Field(0.0, ge=0, le=1)
    soft_temperature: float = Field(0.1, gt=0)
    keep_fraction: float = Field(1.0, gt=0, le=1)
    record_seed: int = Field(0, ge=0)

    def sampling(self) -> Sampling:
        """How texts are drawn."""
        return Sampling(
            top_p=self.top_p,
            top_k=self.top_k,
            temperature=self.temperature,
            debias_decay=self.debias_decay,
            debias_floor=self.debias_floor,
        )

    @property
    def student_rounds(self) -> int:
        """Rounds in which the student learns, unless it stops earlier; those of one training."""
        return self.epochs

    @property
    def differs(self) -> str:
        """The options that are on, in words."""
        options = {
            "not cleaned": not self.clean,
            "no label in the prompt": not self.label_in_prompt,
            "shuffled labels": self.shuffle_labels,
            "soft labels": self.soft_labels > 0,
            "confidence filter": self.keep_fraction < 1,
        }
        return ", ".join(name for name, on in options.items() if on)


class ZeroGen:
    """Lets a language model write a labelled data set, and a small model learn from it."""

    Config = ZeroGenConfig
    requires = Requires(
        access=Access.LABELS,
        tasks=("text",),
        optional_sources=("contexts",),
        extras=("text",),
        student=False,
        roles=("student",),
    )

    def __init__(
        self,
        cfg: ZeroGenConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module | None,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg, self.student, self.teacher = cfg, student, teachers[0]
        self.length = task.spec.shape[0]
        self.writer = TextWriter(
            self.teacher,
            cfg.sampling(),
            given=sources.get("contexts"),
            names_label=cfg.label_in_prompt,
            cleans=cfg.clean,
            seed=cfg.record_seed,
        )
        prompts = self.writer.prompts
        self.names = prompts.names
        self.writer.check(task, student, cfg.samples)
        if cfg.soft_labels and not isinstance(self.writer.writes, nn.Module):
            raise RecipeError("soft_labels: this teacher judges no texts; set it to 0")
        self.contexts, self.choice = TextPool(), TextChoice()
        self.pool = TextPool(pairs=prompts.kind == "pair")
        self.first, self.best = KeptBest(), KeptBest()

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """What was written, what of it is learned, and the student with its best epoch."""
        parts: dict[str, Stateful | Sharded] = {"contexts": self.contexts, "pool": self.pool}
        if self.student is None:
            return parts
        parts |= {"choice": self.choice, "first": self.first, "best": self.best}
        return {**parts, "student": self.student}

    def run(self, ctx: Context) -> Iterator[Step]:
        """Write, clean, choose, learn."""
        cfg = self.cfg
        if self.writer.writes_contexts:
            for _ in ctx.rounds("contexts", cfg.context_rounds):
                if len(self.contexts) >= cfg.contexts:
                    break
                self.writer.write_contexts(self.contexts, 256, ctx.rng)
            self.contexts.check_any_kept("contexts")
        for _ in ctx.rounds("texts", cfg.rounds):
            wanted = self.pool.lacking(self.names, self.each)
            if not wanted:
                break
            missing = sum(self.each - self.pool.count(name) for name in wanted)
            # With what will be dropped, as far as that is known by now.
            count = min(cfg.round_texts, math.ceil(missing / self.pool.kept_share(0.8)) + 8)
            self.writer.write(self.pool, self.contexts, wanted, count, ctx.rng)
        if self.student is None:
            self.pool.check_any_kept("questions")
            return
        yield from self.taught(ctx, self.student, "")
        if cfg.keep_fraction < 1:
            yield from self.taught(ctx, self.student, "-again")

    def taught(self, ctx: Context, student: nn.Module, again: str) -> Iterator[Step]:
        """Choose texts, and train the student on them from its first weights."""
        cfg = self.cfg
        for _ in ctx.rounds(f"choose{again}", 1):
            self.choose(student, ctx.rng, again=bool(again))
        rows = self.choice.rows(self.pool, self.length).to(ctx.rng.device)
        own = (~self.choice.held).nonzero()[:, 0]
        optimizer = ctx.optimizer(
            f"student{again}",
            student.parameters(),
            optim.factory(
                cfg.student_optimizer, cfg.student_lr, weight_decay=cfg.student_weight_decay
            ),
        )
        modes.train_mode(student)
        for epoch in ctx.rounds(f"distill{again}", cfg.epochs):
            if self.best.stale >= cfg.patience:
                break
            order = torch.randperm(len(own), generator=ctx.rng, device=ctx.rng.device).cpu()
            for index in own[order].split(cfg.batch_size):
                batch = self.batch(rows, index)
                yield ctx.update(
                    "student", student, self.cross_entropy, batch, optimizer, clip=cfg.clip
                )
            self.best.offer(student, self.choice.judged(student, rows))
            if self.best.stale >= cfg.patience or epoch + 1 == cfg.epochs:
                self.best.restore(student)

    def choose(self, student: nn.Module, rng: torch.Generator, *, again: bool) -> None:
        """What is learned from; the first time also the student's words and first weights."""
        cfg, choice = self.cfg, self.choice
        if again:
            rows = choice.rows(self.pool, self.length).to(rng.device)
            choice.keep_believed(student, rows, cfg.keep_fraction)
            self.first.restore(student)
            self.best.clear()
            return
        choice.choose(self.pool, self.names, each=self.each, held_share=cfg.held_share)
        if cfg.shuffle_labels:
            order = torch.randperm(len(choice), generator=rng, device=rng.device).cpu()
            choice.labels = choice.labels[order]
        rows = choice.rows(self.pool, self.length).to(rng.device)
        if cfg.soft_labels:
            choice.targets = self.softened(rows)
        if isinstance(student, LearnsVocabulary):
            student.learn_vocabulary(rows)
        self.first.offer(student, (0.0,))

    def batch(self, rows: Tensor, index: Tensor) -> Batch:
        """Texts with what they are learned as."""
        targets, labels = self.choice.targets, self.choice.labels[index].to(rows.device)
        extra = {"targets": targets[index].to(rows.device)} if len(targets) else {}
        return Batch(rows[index.to(rows.device)], labels, extra=extra)

    def cross_entropy(self, student: Any, batch: Batch) -> Loss:
        """CE(f(x), y), minimised over the student; y may be soft."""
        answer, target = predict(student, batch.inputs), batch.extra.get("targets", batch.labels)
        if target is None:
            # What a plug-in remembers has no label; the teacher's own judgement stands for it.
            with torch.no_grad():
                target = self.believes(batch.inputs)
        mean = batch.mean(F.cross_entropy(answer.logits, target, reduction="none"))
        return Loss({"cross_entropy": mean}, mean, batch.inputs, None, answer)

    def believes(self, rows: Any) -> Tensor:
        """The teacher's own judgement of texts, probabilities (B, K)."""
        return F.softmax(predict(self.teacher, rows).logits / self.cfg.soft_temperature, 1)

    @torch.no_grad()
    def softened(self, rows: Tensor) -> Tensor:
        """Targets (N, K) between the labels and the teacher's own judgement."""
        share = self.cfg.soft_labels
        believed = torch.cat([self.believes(part) for part in rows.split(256)]).cpu()
        return share * believed + (1 - share) * F.one_hot(self.choice.labels, len(self.names))

    @property
    def each(self) -> int:
        """Texts of every label."""
        return max(1, self.cfg.samples // len(self.names))

    def records(self) -> Iterable[Mapping[str, Any]]:
        """Every text that was kept, in the order in which they were written."""
        return (record.as_line() for record in self.pool.records)

    def record_card(self) -> Mapping[str, Any]:
        """How the texts came about, and what became of those that were asked for."""
        writer = self.writer
        return {
            "prompts": writer.prompts.model_dump(mode="json"),
            "decoding": asdict(writer.sampling),
            "counts": counted(self.pool, self.names),
            "contexts": counted(self.contexts, [""])[""] if writer.writes_contexts else None,
            "learned_from": len(self.choice),
            "held_back": int(self.choice.held.sum()),
        }

    def variant(self) -> str:
        """The options that are on, in words; "" is the method as published."""
        return self.cfg.differs

    def result(self) -> Result:
        """The student once it learns; before that, and without one, the texts."""
        learns = self.student is not None and len(self.choice) > 0
        return Result("student", self.student) if learns else Result("texts", self.pool)

    def passes(self, cfg: ZeroGenConfig) -> Mapping[str, float]:
        """Passes of the student per round of "distill"; what texts cost stands in their card."""
        held = round(cfg.samples * cfg.held_share)
        steps = float(math.ceil((cfg.samples - held) / cfg.batch_size))
        counts = dict.fromkeys(("student_forward", "student_backward", "student_step"), steps)
        return counts | {"student_forward": steps + held / cfg.batch_size}
