"""What distillation of speech recognisers checks and builds before it starts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vestige.core.protocols import OptimizerFactory, Source, Teacher
from vestige.core.rows import RowSource
from vestige.core.schedules import Schedule, ScheduleName
from vestige.core.transcripts import Transcripts
from vestige.core.types import Batch
from vestige.errors import RecipeError, TeacherError
from vestige.models.speech import SpeechRecognizer
from vestige.sources.quality_filters import FILTERS, QualityFilter, find_filter

LABELS, CHANCE = "labels", "chance"


def networks_of(teachers: Sequence[Teacher], student: nn.Module) -> list[SpeechRecognizer]:
    """The recognisers inside the teachers; a student without tokens takes over the first one's.

    Raises:
        TeacherError: one is no speech recogniser.
        RecipeError: the student is none, or writes with other tokens.
    """
    found = []
    for teacher in teachers:
        inner = getattr(teacher, "module", teacher)
        if not isinstance(inner, SpeechRecognizer):
            raise TeacherError(
                f"got a teacher of type {type(inner).__name__}, expected a speech recogniser; take "
                "'hf:FOLDER' of a Whisper network, or the model 'whisper'"
            )
        found.append(inner)
    if not isinstance(student, SpeechRecognizer):
        raise RecipeError(
            f"got a student of type {type(student).__name__}, expected a speech recogniser; take "
            "layers-of-teacher, or the model 'whisper'"
        )
    first = found[0]
    if not student.vocabulary.numel() and student.vocab_size == first.vocab_size:
        student.vocabulary = first.vocabulary.clone().to(student.vocabulary.device)
    if (
        student.vocab_size != first.vocab_size
        or student.prompt != first.prompt
        or not torch.equal(student.vocabulary.cpu(), first.vocabulary.cpu())
    ):
        raise RecipeError(
            "got a student that writes with other tokens than its teacher, expected the same: its "
            "distributions over them are compared; take layers-of-teacher"
        )
    return found


def checked_rows(chosen: str, sources: Mapping[str, Source]) -> tuple[RowSource, Tensor | None]:
    """The recordings, and their true transcripts where the filter looks at them.

    Raises:
        RecipeError: the recordings have no numbers; or transcripts and filter do not fit.
    """
    audio, truth = sources["audio"], sources.get("transcripts")
    if not isinstance(audio, RowSource):
        raise RecipeError(
            f"got the source audio of type {type(audio).__name__}, expected recordings with "
            "numbers; take a source of kind folder or heap"
        )
    if (chosen == LABELS) != (truth is not None):
        raise RecipeError(
            f"got filter {chosen!r} {'with' if truth is not None else 'without'} the source "
            f"transcripts, expected it for the filter {LABELS!r} and no other; "
            + ("leave it out" if truth is not None else "add it, with column: text")
        )
    if truth is None:
        return audio, None
    if not isinstance(truth, RowSource) or len(truth) != len(audio):
        count = len(truth) if isinstance(truth, RowSource) else "no"
        raise RecipeError(
            f"got {count} transcripts for {len(audio)} recordings, expected one for each; describe "
            "both sources alike but for column: text"
        )
    rows = truth.rows(torch.arange(len(truth)))
    if not isinstance(rows, Tensor) or rows.dtype != torch.uint8:
        raise RecipeError("sources.transcripts: expected rows of bytes; add column: text")
    return audio, rows


def asked_filters(cfg: Any, *, proxy: bool, none: str) -> dict[str, QualityFilter]:
    """Every filter that scores: the one that decides, and those whose needs are met.

    Raises:
        RecipeError: the one that decides lacks something.
    """
    there = {
        "proxy": proxy,
        "truth": cfg.filter == LABELS,
        "embedder": cfg.embedder is not None,
        "language_model": cfg.language_model is not None,
    }
    found: dict[str, QualityFilter] = {}
    if cfg.filter != none:
        one = find_filter(cfg.filter)
        lacking = [need for need in one.needs if not there.get(need)]
        if lacking:
            hints = {
                "proxy": "a second recogniser: add more_teachers",
                "truth": "sources.transcripts",
                "embedder": "config.embedder",
                "language_model": "config.language_model",
            }
            needs = ", ".join(hints.get(need, need) for need in lacking)
            raise RecipeError(f"filter: {cfg.filter!r} needs {needs}; add it or take another")
        found[cfg.filter] = one
    if cfg.score_all:
        for name, kind in FILTERS.items():
            if name not in (CHANCE, LABELS) and all(there.get(need) for need in kind.needs):
                found.setdefault(name, kind())
    return found


def shared_encoder(teacher: Teacher, student: nn.Module) -> Any:
    """The student's encoder, frozen, as a function of waveforms; it is the teacher's.

    Raises:
        RecipeError: it is another one.
    """
    inner = getattr(teacher, "module", teacher)
    if not isinstance(inner, SpeechRecognizer) or not isinstance(student, SpeechRecognizer):
        raise RecipeError("freeze_encoder: expected speech recognisers; set it to false")
    own, other = student.encoder.state_dict(), inner.encoder.state_dict()
    if own.keys() != other.keys() or not all(
        torch.equal(own[k].cpu(), other[k].cpu()) for k in own
    ):
        raise RecipeError(
            "freeze_encoder: got true for a student with another encoder than its teacher, "
            "expected the whole encoder copied; leave encoder_layers out, or set it to false"
        )
    student.encoder.requires_grad_(False)
    # In a network that trains it would drop out.
    student.encoder.eval()
    return student.encode


def adamw(lr: float, weight_decay: float) -> OptimizerFactory:
    """AdamW that leaves norms and biases without decay."""

    def make(params: list[nn.Parameter]) -> Optimizer:
        groups = [
            {"params": [one for one in params if one.dim() > 1], "weight_decay": weight_decay},
            {"params": [one for one in params if one.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr)

    return make


def warmed(name: ScheduleName, warmup: int, steps: int) -> Schedule:
    """A rate that rises over `warmup` steps, then stays ("constant") or falls ("cosine")."""

    def factor(share: float) -> float:
        done = share * steps
        rise = min(1.0, (done + 1) / warmup) if warmup else 1.0
        if name == "constant":
            return rise
        rest = max(0.0, done - warmup) / max(1, steps - warmup)
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, rest)))

    return Schedule(factor, "step", steps)


def recordings(audio: RowSource, rows: Tensor) -> Tensor:
    """The waveforms (B, samples) of some rows."""
    found = audio.rows(rows)
    if not isinstance(found, Tensor):
        raise RecipeError("sources.audio: expected recordings (N, samples)")
    return found


def batch_of(
    audio: RowSource, heard: Transcripts, rows: Tensor, prompt: int, device: torch.device
) -> Batch:
    """Recordings and what their teacher wrote behind `prompt` tokens, cut to the longest."""
    tokens = heard.tokens[rows, : prompt + int(heard.written[rows].max())]
    inputs = {
        "waveforms": recordings(audio, rows).to(device),
        "decoder_input_ids": tokens.to(device),
    }
    return Batch(inputs=inputs)
