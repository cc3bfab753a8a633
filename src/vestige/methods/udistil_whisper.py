"""uDistil-Whisper.

Paper: uDistil-Whisper: Label-Free Data Filtering for Knowledge Distillation in Low-Data Regimes,
    Waheed, Kadaoui, Raj, Abdul-Mageed, NAACL 2025, arXiv 2407.01257. The training is that of
    Distil-Whisper (Gandhi, von Platen, Rush, 2023, arXiv 2311.00430), whose code has it; the
    authors published no code for filters and training.

A speech recogniser teaches a smaller one on recordings that nobody wrote down:
1. It transcribes them, greedily. Tokens, their log-probabilities and the entropies of their
   distributions are kept from the same pass.
2. Transcripts that are empty, do not end or are all upper case go. The others are scored by a
   filter that needs no truth, and the best stay: agreement with a second recogniser (WER),
   confidence exp(mean log p(y_t)), mean entropy, likelihood under a language model of text,
   similarity of sound and text in a joint space, repetition.
3. A student of the same widths, made of some of the teacher's layers, learns on what stayed:
   L = a CE(y) + b tau^2 sum p_T^tau (log p_T^tau - log p_S^tau), both over the valid tokens and
   divided by their number; a = 0.8, b = 1, tau = 2, as in Distil-Whisper's code (its paper has
   the two weights the other way round, as far as we recall).

Differs from the paper: filters are compared at an equal share of kept data (`keep_fraction`)
    instead of thresholds, most of which were not published; `threshold` is there as well. Of the
    published filters PESQ needs a synthesiser and is left out; a filter of one's own is a class.
    Timestamps and the previous text as a prompt are left out. Training is in steps, not epochs, so
    that arms with other shares see as many recordings. Teacher and student get the same decoder
    inputs always; the reference code's differ where the encoder is frozen and shared.

Cost per round: of "label", a slice of the recordings: T's encoder once, its decoder once for each
    token; with a second recogniser likewise. Of "distill", `iterations` times: T forward; S forward
    and backward; with `freeze_encoder` one encoder forward for both.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from vestige.core import modes, parallel, schedules
from vestige.core.filtering import Filtered, Rule, check_any_kept
from vestige.core.protocols import Context, Sharded, Source, Stateful, Task, Teacher
from vestige.core.texts import to_texts
from vestige.core.transcripts import normalizer
from vestige.core.types import Batch, Loss, Requires, Result, Step, predict
from vestige.losses.sequence import token_cross_entropy, token_kl
from vestige.methods._speech import (
    adamw,
    asked_filters,
    batch_of,
    checked_rows,
    networks_of,
    recordings,
    shared_encoder,
    warmed,
)
from vestige.models.speech import spoken
from vestige.sources.heard import heard_items, reasons_of
from vestige.sources.pseudo_labels import PseudoLabels, Scores
from vestige.sources.quality_filters import Evidence, find_filter, plugged

NONE = "none"


class UDistilWhisperConfig(BaseModel):
    """Settings of uDistil-Whisper; "reference code" is Distil-Whisper's.

    Attributes:
        label_rounds: slices in which recordings are transcribed, each of them a checkpoint. 10, our
            choice; more lose less when a run is killed.
        label_batch_size: recordings transcribed at a time. 32, our choice; changes speed only.
        filter: "confidence" (our choice: it needs nothing else), "entropy", "proxy" (needs a second
            teacher; the paper's best), "likelihood" (needs `language_model`), "similarity" (needs
            `embedder`), "repetition", "chance" (the arm that must lose), "labels" (needs the source
            `transcripts`: real labels), "none", or "package.module:Class".
        keep_fraction: share of the recordings that stays. None is 0.75 where no threshold is given,
            our choice; lower is cleaner and smaller.
        threshold: in place of the share, in the filter's own unit; a WER of 0.8 in the paper.
        score_all: score by every filter whose needs are met, for the record. True, our choice.
        drop_upper_case: drop transcripts all in capitals. True (reference code).
        most_compression: drop loops, by Whisper's own sign: 2.4. None drops none.
        language_model: "package.module:callable", from texts to mean negative log-likelihoods.
        embedder: "package.module:callable", makes an object with embed_audio and embed_text.
        rounds: each of `iterations` student steps. 10, our choice.
        iterations: student steps per round. 500: 5,000 in all are the reference code's example.
        batch_size: 32 (reference code).
        student_lr: of AdamW. 1e-4 (reference code). Higher is faster until it forgets the teacher.
        warmup_steps: over which the rate rises. 50 (reference code).
        schedule: of the rate afterwards, "constant" (reference code) or "cosine".
        weight_decay: of weights, not of norms and biases. 0 (reference code).
        clip: largest norm of the gradient. 1 (reference code); lower is calmer.
        ce_weight: a, of the transcripts. 0.8 (reference code).
        kl_weight: b, of the teacher's distributions. 1 (reference code).
        temperature: tau. 2 (reference code); higher compares small probabilities more.
        freeze_encoder: leave a student's encoder that is the teacher's as it is, and run it once
            for both. False; what the paper did for its 32-16 students is unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    label_rounds: int = Field(10, ge=1)
    label_batch_size: int = Field(32, ge=1)
    filter: str = "confidence"
    keep_fraction: float | None = Field(None, gt=0, le=1)
    threshold: float | None = None
    score_all: bool = True
    drop_upper_case: bool = True
    most_compression: float | None = Field(None, gt=0)
    language_model: str | None = None
    embedder: str | None = None
    rounds: int = Field(10, ge=1)
    iterations: int = Field(500, ge=1)
    batch_size: int = Field(32, ge=1)
    student_lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    warmup_steps: int = Field(50, ge=0)
    schedule: schedules.ScheduleName = "constant"
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    clip: float | None = Field(1.0, gt=0)
    ce_weight: float = Field(0.8, ge=0, allow_inf_nan=False)
    kl_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    temperature: float = Field(2.0, gt=0, allow_inf_nan=False)
    freeze_encoder: bool = False

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.keep_fraction is not None and self.threshold is not None:
            raise ValueError("give keep_fraction or threshold, not both")
        if self.filter == NONE and (self.keep_fraction, self.threshold) != (None, None):
            raise ValueError("filter: none keeps all; leave keep_fraction and threshold out")
        if not self.ce_weight and not self.kl_weight:
            raise ValueError("ce_weight and kl_weight are both 0; set one of them above 0")
        if self.schedule == "multistep":
            raise ValueError("schedule: multistep has no milestones here; take constant or cosine")
        return self


class UDistilWhisper:
    """Trains a small speech recogniser on recordings that its teacher wrote down well."""

    Config = UDistilWhisperConfig
    requires = Requires(
        tasks=("speech",),
        sources=("audio",),
        optional_sources=("transcripts",),
        extras=("speech",),
        teachers=(1, 2),
        roles=("student",),
    )

    def __init__(
        self,
        cfg: UDistilWhisperConfig,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        self.cfg = cfg
        self.teachers, self.student = list(teachers), student
        self.listeners = networks_of(teachers, student)
        self.audio, self.transcripts = checked_rows(cfg.filter, sources)
        self.spec = task.spec
        self.normal = normalizer(getattr(task, "normalizer", "basic"))
        self.filters = asked_filters(cfg, proxy=len(teachers) > 1, none=NONE)
        self.labels, self.scores = PseudoLabels(), Scores()
        self.proxy_labels = PseudoLabels()
        self.encoder = shared_encoder(teachers[0], student) if cfg.freeze_encoder else None
        self._reasons: list[str] | None = None

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """The student, what was heard, and how it was scored."""
        parts: dict[str, Stateful | Sharded] = {"student": self.student, "labels": self.labels}
        if len(self.teachers) > 1:
            parts["proxy"] = self.proxy_labels
        return {**parts, "scores": self.scores}

    def run(self, ctx: Context) -> Iterator[Step]:
        """Write down, choose, learn."""
        cfg = self.cfg
        steps = cfg.rounds * cfg.iterations
        optimizer = ctx.optimizer(
            "student",
            (one for one in self.student.parameters() if one.requires_grad),
            adamw(cfg.student_lr, cfg.weight_decay),
            warmed(cfg.schedule, cfg.warmup_steps, steps),
        )
        modes.train_mode(self.student)
        # Made here, so that a resumed run has the same streams whether it draws from them or not.
        chance = ctx.generator("chance")
        slices = torch.arange(len(self.audio)).chunk(cfg.label_rounds)
        for index in ctx.rounds("label", len(slices)):
            self.write_down(slices[index])
        for _ in ctx.rounds("distill", cfg.rounds):
            kept = self.choose(chance)
            count = cfg.iterations * cfg.batch_size
            turns = [
                kept[torch.randperm(len(kept), generator=ctx.rng, device=ctx.device).cpu()]
                for _ in range(-(-count // len(kept)))
            ]
            heard = self.labels.all()
            for rows in torch.cat(turns)[:count].split(cfg.batch_size):
                prompt = len(self.listeners[0].prompt)
                batch = batch_of(self.audio, heard, rows, prompt, ctx.device)
                yield ctx.update(
                    "student", self.student, self.imitation, batch, optimizer, clip=cfg.clip
                )

    def write_down(self, rows: Tensor) -> None:
        """Step 1 on some rows of the source, by each of the teachers."""
        waveforms = recordings(self.audio, rows)
        for teacher, listener, store in zip(
            self.teachers, self.listeners, (self.labels, self.proxy_labels), strict=False
        ):
            store.add(listener.transcribe(waveforms, batch_size=self.cfg.label_batch_size))
            # It was asked by another door than its forward.
            teacher.queries = getattr(teacher, "queries", 0) + len(rows)  # type: ignore[attr-defined]

    def choose(self, rng: torch.Generator) -> Tensor:
        """Step 2: numbers of the rows (n,) that are learned from.

        Raises:
            DataError: none is.
        """
        cfg = self.cfg
        if set(self.scores.values) != set(self.filters):
            evidence = Evidence(
                self.labels.all(),
                self.audio,
                self.spec.sample_rate_hz,
                self.normal,
                rng,
                proxy=self.proxy_labels.all() if len(self.teachers) > 1 else None,
                truth=None if self.transcripts is None else to_texts(self.transcripts),
                **plugged(cfg.embedder, cfg.language_model),
            )
            self.scores.values = {name: one.scores(evidence) for name, one in self.filters.items()}
        self._reasons = reasons_of(
            self.labels.all(),
            self.scores.values.get(cfg.filter),
            self._rule(),
            named="filter" if ":" in cfg.filter else cfg.filter,
            drop_upper_case=cfg.drop_upper_case,
            most_compression=cfg.most_compression,
        )
        check_any_kept(self.filtered()["audio"].counts, "transcripts")
        return torch.tensor([row for row, reason in enumerate(self._reasons) if not reason])

    def _rule(self) -> Rule | None:
        cfg = self.cfg
        if cfg.filter == NONE:
            return None
        share = cfg.keep_fraction or (0.75 if cfg.threshold is None else None)
        return Rule(find_filter(cfg.filter).better, cfg.threshold, share)

    def filtered(self) -> Mapping[str, Filtered]:
        """Every recording with its transcript, its scores, and why it was dropped or kept."""
        if self._reasons is None:
            return {}
        return {
            "audio": heard_items(
                self.labels.all(),
                self.proxy_labels.all() if len(self.teachers) > 1 else None,
                self.audio,
                self.spec.sample_rate_hz,
                self.scores.values,
                {name: one.better for name, one in self.filters.items()},
                self._reasons,
                self._rule(),
                "" if self.cfg.filter == NONE else self.cfg.filter,
            )
        }

    def imitation(self, student: Any, batch: Batch) -> Loss:
        """Step 3: L, minimised over the student."""
        cfg, first = self.cfg, self.listeners[0]
        inputs: Any = batch.inputs
        tokens = inputs["decoder_input_ids"]
        if self.encoder is not None:
            # The same for both and it does not move, at whatever weights the student is asked.
            with torch.no_grad():
                encoded = self.encoder(inputs["waveforms"])
            inputs = {"encoded": encoded, "decoder_input_ids": tokens}
        with torch.no_grad():
            teacher = predict(self.teachers[0], inputs)
        answer = predict(student, inputs)
        counted = spoken(tokens, len(first.prompt), first.end)
        said, asked = answer.logits[:, :-1], teacher.logits[:, :-1]
        # Divided by the tokens of the whole batch, not by B x T.
        share = counted.sum(1).to(said.dtype)
        valid = parallel.batch_mean(share).clamp_min(1e-6)
        cross_entropy = batch.mean(token_cross_entropy(said, tokens[:, 1:], counted) / valid)
        kl = batch.mean(token_kl(said, asked, counted, temperature=cfg.temperature) / valid)
        kl = kl * cfg.temperature**2
        same = (said.argmax(-1) == asked.argmax(-1)) & counted
        terms = {
            "cross_entropy": cross_entropy,
            "kl": kl,
            "agreement": same.sum() / counted.sum().clamp_min(1),
        }
        total = cfg.ce_weight * cross_entropy + cfg.kl_weight * kl
        return Loss(terms, total, batch.inputs, teacher, answer)

    def result(self) -> Result:
        """The trained student."""
        return Result("student", self.student)

    def variant(self) -> str:
        """Which filter decides, where it is not the default one."""
        named = "" if self.cfg.filter == "confidence" else f"filter: {self.cfg.filter}"
        return ", ".join(filter(None, [named, "frozen encoder" if self.cfg.freeze_encoder else ""]))

    def passes(self, cfg: UDistilWhisperConfig) -> Mapping[str, float]:
        """Passes of each network per round of "distill"."""
        names = ("teacher_forward", "student_forward", "student_backward", "student_step")
        return dict.fromkeys(names, float(cfg.iterations))
