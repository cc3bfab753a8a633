"""AS-DFD: texts are crafted as word embeddings, hard for a student that guesses masked words.

Paper: Adversarial Self-Supervised Data-Free Distillation for Text Classification, Ma, Shen, Fang,
    Chen, Jia, Lu, 2020, EMNLP, arXiv 2010.04883.

Only abstract and introduction were at hand; the structure below is theirs, the forms of its terms
and every number are our choice. Each iteration crafts one batch e of word embeddings (B, l, d) and
uses it once:
1. Plug & play guessing. Targets y, even over the classes; e ~ N(mean, std^2) of the teacher's own
   embeddings. `guess_steps` steps on L_guess = CE(T(e), y) over e alone. What begins, ends and
   fills up a text is pinned to the embeddings of these tokens.
2. Adversarial difficulty. `difficulty_steps` steps up L_ss over e, each of one length per word.
3. Self-supervised module R, linear, from the student's last hidden state h_i of a masked word to
   its embedding: L_ss = mean over masked i of ||R(h_i) - e_i||^2.
4. Distillation of S and R: temperature^2 KL(T(e) || S(e)) + self_supervised_weight L_ss, where L_ss
   does not move e.

Differs from the paper: no term on intermediate layers (the paper builds on Patient-KD, in a form
    that was not at hand). Guessing leaves a text alone once the teacher is `confidence` sure of it,
    and no word may be longer than almost all of the teacher's own. The words' embeddings of the
    student stay the teacher's: crafted inputs pass them by.

Cost per round: `iterations` times: T forward guess_steps + 1, backward guess_steps; S forward
    difficulty_steps + 1, backward difficulty_steps + 1; the masked texts are a second batch in S's.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core import modes, optim, schedules
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.types import Access, Batch, Loss, Prediction, Requires, Result, Step, predict
from vestige.errors import TeacherError
from vestige.losses.distill import kl_divergence
from vestige.losses.embedding import masked_embedding_loss
from vestige.models.probes import FeatureProbe
from vestige.models.text_pairs import reading_alike
from vestige.sources.embeddings import Crafted, EmbeddingPrior, PriorName
from vestige.sources.targets import even_targets
from vestige.teachers.white_box import module_of


class ASDFDConfig(BaseModel):
    """Settings of AS-DFD; all numbers are our choice.

    Attributes:
        rounds: each of `iterations` crafted batches. 20.
        iterations: crafted batches per round, each for one step of the student. 100.
        batch_size: texts per batch. 32; 64 for networks of BERT's size.
        length: places of a crafted text, special tokens included; null is as many as the teacher
            looks at. Longer costs more.
        shortest: the fewest places of a text; null makes all of them `length` long.
        prior: where texts start: "normal" noise with mean and deviation of the teacher's
            embeddings, or "tokens" drawn by chance.
        prior_std: deviation of the noise in place of the embeddings' own. null.
        guess_steps: 5. 0 leaves texts as they start.
        guess_lr: step of Adam in deviations of the teacher's embeddings. 0.3; 3 makes the teacher
            surer and leaves the region of words, and students learn less.
        confidence: a text whose class the teacher gives this probability is guessed no further.
            0.9; 1 takes all steps.
        longest_norm: words are shortened to the norm that this share of the teacher's tokens does
            not exceed. 0.99; 1 allows the longest.
        difficulty_steps: 2. 0 leaves the adversary out.
        difficulty_lr: length of its step, in mean norms of the teacher's embeddings. 0.1.
        self_supervised_weight: of L_ss in the student's loss. 0.1; 0 leaves it out.
        mask_share: share of words that are masked at once; 0 masks one in each text.
        temperature: 1, since crafted texts are clear; higher compares small probabilities more.
        student_optimizer: "adamw", "adam" or "sgd" with momentum 0.9.
        student_lr: 3e-4 for networks of some 10^5 weights; 2e-5 to 5e-5 for those of BERT's size.
        student_weight_decay: 0.
        schedule: of the rate: "constant", "cosine" or "multistep" (with the milestones of `KD`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(20, ge=1)
    iterations: int = Field(100, ge=1)
    batch_size: int = Field(32, ge=2)
    length: int | None = Field(None, ge=3)
    shortest: int | None = Field(None, ge=3)
    prior: PriorName = "normal"
    prior_std: float | None = Field(None, gt=0)
    guess_steps: int = Field(5, ge=0)
    guess_lr: float = Field(0.3, gt=0)
    confidence: float = Field(0.9, gt=0, le=1)
    longest_norm: float = Field(0.99, gt=0, le=1)
    difficulty_steps: int = Field(2, ge=0)
    difficulty_lr: float = Field(0.1, gt=0)
    self_supervised_weight: float = Field(0.1, ge=0)
    mask_share: float = Field(0.0, ge=0, lt=1)
    temperature: float = Field(1.0, gt=0)
    student_optimizer: optim.OptimizerName = "adamw"
    student_lr: float = Field(3e-4, gt=0)
    student_weight_decay: float = Field(0.0, ge=0)
    schedule: schedules.ScheduleName = "constant"


class ASDFD:
    """Crafts texts in the space of words' embeddings and teaches a student from them."""

    Config = ASDFDConfig
    requires = Requires(
        access=Access.WHITE_BOX, tasks=("text",), extras=("text",), roles=("source", "student")
    )

    def __init__(
        self,
        cfg: ASDFDConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg = cfg
        self.num_classes = task.num_classes
        self.teacher, self.student = teachers[0], student
        self.asked = module_of(self.teacher)
        self.network, reader = reading_alike(getattr(self.asked, "module", self.asked), student)
        table = self.network.table
        self.prior = EmbeddingPrior(
            table,
            self.network.special_ids,
            length=cfg.length or self.network.tokens,
            shortest=cfg.shortest,
            prior=cfg.prior,
            std=cfg.prior_std,
        )
        self.masks = bool(cfg.self_supervised_weight or cfg.difficulty_steps)
        if self.masks and self.prior.blank < 0:
            raise TeacherError(
                "got a teacher whose tokenizer has no token that masks a word, expected one for "
                "the self-supervised module; set difficulty_steps: 0 and self_supervised_weight: 0"
            )
        self.scale = float(table.norm(dim=1).mean())
        self.longest = self.prior.longest_norm(cfg.longest_norm)
        self.head = nn.Linear(reader.width, table.shape[1]).to(table.device)
        names = {id(one): name for name, one in student.named_modules()}
        self.hidden = FeatureProbe(student, [names[id(reader.layers[-1])]])
        self.learned = [one for one in student.parameters() if one is not reader.embeddings.weight]

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """Student and self-supervised module."""
        return {"student": self.student, "head": self.head}

    def run(self, ctx: Context) -> Iterator[Step]:
        """Craft a batch, then learn from it."""
        cfg = self.cfg
        moved = [*self.learned, *(self.head.parameters() if cfg.self_supervised_weight else ())]
        optimizer = ctx.optimizer(
            "student",
            moved,
            optim.factory(
                cfg.student_optimizer, cfg.student_lr, weight_decay=cfg.student_weight_decay
            ),
            schedules.named(cfg.schedule),
        )
        modes.train_mode(self.student)
        for _ in ctx.rounds("distill", cfg.rounds):
            for _ in range(cfg.iterations):
                texts = yield from self.craft(ctx)
                extra = {}
                if cfg.self_supervised_weight:
                    extra = {"masked": self.prior.choose_masked(texts, cfg.mask_share, ctx.rng)}
                batch = Batch(inputs=as_inputs(texts.words, texts.mask), extra=extra)
                yield ctx.update("student", self.student, self.imitation, batch, optimizer)

    def craft(self, ctx: Context) -> Generator[Step, None, Crafted]:
        """One batch: guessed for its targets, then made hard."""
        cfg = self.cfg
        start = self.prior.draw(cfg.batch_size, ctx.rng)
        words = nn.Parameter(start.words)
        texts = Crafted(words, start.free, start.mask)
        if cfg.guess_steps:
            targets = even_targets(cfg.batch_size, self.num_classes, ctx.rng)
            extra = {"words": words, "mask": texts.mask, "targets": targets}
            adam = optim.factory("adam", cfg.guess_lr * self.prior.std)
            optimizer = ctx.optimizer("words", [words], adam, fresh=True)
            for _ in range(cfg.guess_steps):
                before = words.detach().clone()
                step = ctx.update("source", self.asked, self.guess, Batch(extra=extra), optimizer)
                self.settle(texts, targets, before, step)
                yield step
        if cfg.difficulty_steps:
            masked = self.prior.choose_masked(texts, cfg.mask_share, ctx.rng)
            sgd = optim.factory("sgd", cfg.difficulty_lr * self.scale, momentum=0.0)
            ascent = ctx.optimizer("harder", [words], sgd, fresh=True)
            for _ in range(cfg.difficulty_steps):
                loss = self.difficulty(texts, masked)
                (gradient,) = torch.autograd.grad(loss.total, words)
                length = torch.linalg.vector_norm(gradient, dim=2, keepdim=True)
                # Uphill; pinned words have no gradient and stay where they are.
                uphill = (-gradient / length.clamp_min(1e-8)) * texts.free[..., None]
                yield ctx.apply("source", {words: uphill}, ascent, loss=loss.detach())
        return Crafted(words.detach(), texts.free, texts.mask)

    def guess(self, teacher: Any, batch: Batch) -> Loss:
        """L_guess, minimised over the words."""
        inputs = as_inputs(batch.extra["words"], batch.extra["mask"])
        answer = predict(teacher, inputs)
        wrong = F.cross_entropy(answer.logits, batch.extra["targets"], reduction="none")
        guess = batch.mean(wrong)
        return Loss({"guess": guess}, guess, inputs, answer)

    @torch.no_grad()
    def settle(self, texts: Crafted, targets: Tensor, before: Tensor, step: Step) -> None:
        """Put back what was guessed well before the step, and shorten what is too long."""
        words = texts.words
        norms = torch.linalg.vector_norm(words, dim=2, keepdim=True)
        free = texts.free[..., None]
        if step.loss is not None and step.loss.teacher is not None and self.cfg.confidence < 1:
            probs = step.loss.teacher.logits.softmax(1)
            sure = probs.gather(1, targets[:, None]) >= self.cfg.confidence
            free = free & ~sure[..., None]
        shortened = words * (self.longest / norms.clamp_min(1e-8)).clamp_max(1)
        words.copy_(torch.where(free, shortened, before))

    def difficulty(self, texts: Crafted, masked: Tensor) -> Loss:
        """L_ss of the student as it is, in eval mode; gradient flows to words and targets alike."""
        with modes.evaluating(self.student), self.hidden:
            predict(self.student, as_inputs(self.blanked(texts.words, masked), texts.mask))
            (hidden,) = self.hidden.features()
        total = masked_embedding_loss(self.head(hidden), texts.words, masked).mean()
        return Loss({"difficulty": total}, total)

    def imitation(self, student: Any, batch: Batch) -> Loss:
        """KL to the teacher, and L_ss in the same pass; minimised over student and module."""
        cfg, masked = self.cfg, batch.extra.get("masked")
        inputs = cast("Mapping[str, Tensor]", batch.inputs)
        words, mask = inputs["inputs_embeds"], inputs["attention_mask"]
        with torch.no_grad():
            teacher = predict(self.teacher, inputs)
        if masked is None:
            answer = predict(student, inputs)
        else:
            both = as_inputs(torch.cat([words, self.blanked(words, masked)]), mask.repeat(2, 1))
            with self.hidden:
                answer = Prediction(predict(student, both).logits[: len(words)])
                hidden = self.hidden.features()[0][len(words) :]
        distance = kl_divergence(answer.logits, teacher.logits, temperature=cfg.temperature)
        total = batch.mean(distance)
        terms = {"distillation": total}
        if masked is not None:
            wrong = masked_embedding_loss(self.head(hidden.float()), words, masked)
            terms["self_supervised"] = batch.mean(wrong)
            total = total + cfg.self_supervised_weight * terms["self_supervised"]
        return Loss(terms, total, inputs, teacher, answer)

    def blanked(self, words: Tensor, masked: Tensor) -> Tensor:
        """Words with the token that masks in the place of those that are masked."""
        return torch.where(masked[..., None], self.prior.table[self.prior.blank], words)

    def variant(self) -> str:
        """The parts that are off, in words; "" is the whole system."""
        cfg = self.cfg
        options = {
            "no guessing": not cfg.guess_steps,
            "no adversary": not cfg.difficulty_steps,
            "no self-supervision": not cfg.self_supervised_weight,
            "random tokens": cfg.prior == "tokens",
        }
        return ", ".join(name for name, on in options.items() if on)

    def result(self) -> Result:
        """The trained student."""
        return Result("student", self.student)

    def passes(self, cfg: ASDFDConfig) -> Mapping[str, float]:
        """Passes of each network per round; the student's last one is over twice the batch."""
        learns = int(cfg.self_supervised_weight > 0)
        counts = {
            "teacher_forward": cfg.guess_steps + 1,
            "teacher_backward_to_input": cfg.guess_steps,
            "student_forward": cfg.difficulty_steps + 1 + learns,
            "student_backward": 1 + learns,
            "student_backward_to_input": cfg.difficulty_steps,
            "student_step": 1,
            "head_forward": cfg.difficulty_steps + learns,
            "head_backward": cfg.difficulty_steps + learns,
            "head_step": learns,
        }
        return {name: float(cfg.iterations * count) for name, count in counts.items()}


def as_inputs(words: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Embeddings (B, l, d) and mask (B, l) as networks take them."""
    return {"inputs_embeds": words, "attention_mask": mask}
