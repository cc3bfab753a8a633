"""How good a pseudo-label is, without looking at the truth: scores behind one protocol.

A filter is a class with `better` and `scores`; its name in a recipe is one of `FILTERS`, or
"package.module:Class" of the user's own. `core.filtering.Rule` turns scores into what is kept.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from vestige.core.filtering import Better
from vestige.core.rows import RowSource
from vestige.core.transcripts import Normalize, Transcripts, word_error_rates
from vestige.errors import RecipeError

# Whisper's own sign of a loop.
LOOP_RATIO = 2.4
_BLOCK = 64


class Embedder(Protocol):
    """A joint space of speech and text, such as SONAR's; rows are compared by their cosine."""

    def embed_audio(self, waveforms: Tensor, sample_rate_hz: int) -> Tensor:
        """(B, d) of recordings (B, samples)."""
        ...

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """(B, d)."""
        ...


LanguageModel = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Evidence:
    """What a filter may look at.

    Attributes:
        heard: the teacher's pseudo-labels, N of them.
        audio: the recordings, N rows.
        sample_rate_hz: of them.
        normal: how texts are made comparable.
        rng: for what is drawn.
        proxy: what another network heard, or None.
        truth: real transcripts, for the filter that looks at them alone; else None.
        embedder: or None.
        language_model: gives the mean negative log-likelihood per token of each text (N,); or None.
    """

    heard: Transcripts
    audio: RowSource
    sample_rate_hz: int
    normal: Normalize
    rng: torch.Generator
    proxy: Transcripts | None = None
    truth: Sequence[str] | None = None
    embedder: Embedder | None = None
    language_model: LanguageModel | None = None


class QualityFilter(Protocol):
    """One way to score pseudo-labels.

    Attributes:
        better: whether a higher or a lower score is the better one.
        needs: what of `Evidence` must be there, by name.
    """

    better: Better
    needs: tuple[str, ...]

    def scores(self, evidence: Evidence) -> Tensor:
        """(N,) float64; NaN for what is never to be kept."""
        ...


class Proxy:
    """WER against another network's transcript; one of which nothing is left keeps nothing."""

    better: Better = "low"
    needs: tuple[str, ...] = ("proxy",)

    def scores(self, evidence: Evidence) -> Tensor:
        """Rates, from 0."""
        heard = cast(Transcripts, evidence.proxy).texts
        return _rates(heard, evidence)


class Labels:
    """WER against the true transcript: the supervised filter, not label-free."""

    better: Better = "low"
    needs: tuple[str, ...] = ("truth",)

    def scores(self, evidence: Evidence) -> Tensor:
        """Rates, from 0."""
        return _rates(cast(Sequence[str], evidence.truth), evidence)


class Confidence:
    """Geometric mean of the probabilities of the written tokens, exp(mean log p)."""

    better: Better = "high"
    needs: tuple[str, ...] = ()

    def scores(self, evidence: Evidence) -> Tensor:
        """In [0, 1]."""
        return _mean(evidence.heard.log_probs, evidence.heard.written).exp()


class Entropy:
    """Mean entropy of the distributions that the tokens were taken from, in nats."""

    better: Better = "low"
    needs: tuple[str, ...] = ()

    def scores(self, evidence: Evidence) -> Tensor:
        """In [0, log V]."""
        return _mean(evidence.heard.entropies, evidence.heard.written)


class Likelihood:
    """Negative log-likelihood per token under a language model of text alone, in nats."""

    better: Better = "low"
    needs: tuple[str, ...] = ("language_model",)

    def scores(self, evidence: Evidence) -> Tensor:
        """From 0."""
        model = cast(LanguageModel, evidence.language_model)
        texts = evidence.heard.texts
        return torch.cat(
            [model(texts[at : at + _BLOCK]).double().cpu() for at in range(0, len(texts), _BLOCK)]
        )


class Similarity:
    """Cosine of recording and text in a joint space of speech and text."""

    better: Better = "high"
    needs: tuple[str, ...] = ("embedder",)

    def scores(self, evidence: Evidence) -> Tensor:
        """In [-1, 1]."""
        embedder = cast(Embedder, evidence.embedder)
        texts, found = evidence.heard.texts, []
        for index in torch.arange(len(texts)).split(_BLOCK):
            waveforms = evidence.audio.rows(index)
            sound = embedder.embed_audio(cast(Tensor, waveforms), evidence.sample_rate_hz)
            text = embedder.embed_text([texts[row] for row in index.tolist()])
            found.append(torch.cosine_similarity(sound, text.to(sound), dim=1).double().cpu())
        return torch.cat(found)


class Repetition:
    """How much smaller a text gets when it is compressed: a loop of words gets very small."""

    better: Better = "low"
    needs: tuple[str, ...] = ()

    def scores(self, evidence: Evidence) -> Tensor:
        """Above 0."""
        return torch.tensor(
            [compression_ratio(text) for text in evidence.heard.texts], dtype=torch.float64
        )


class Chance:
    """Drawn: the arm that any filter has to beat, as it keeps as many."""

    better: Better = "high"
    needs: tuple[str, ...] = ()

    def scores(self, evidence: Evidence) -> Tensor:
        """In [0, 1)."""
        rng = evidence.rng
        return torch.rand(
            len(evidence.heard.texts), generator=rng, device=rng.device, dtype=torch.float64
        ).cpu()


FILTERS: Mapping[str, type[QualityFilter]] = {
    "proxy": Proxy,
    "confidence": Confidence,
    "entropy": Entropy,
    "likelihood": Likelihood,
    "similarity": Similarity,
    "repetition": Repetition,
    "chance": Chance,
    "labels": Labels,
}


def find_filter(name: str) -> QualityFilter:
    """A filter by its name, or by "package.module:Class".

    Raises:
        RecipeError: there is none, or it is no filter.
    """
    made = FILTERS[name]() if name in FILTERS else imported("filter", name)()
    lacking = [key for key in ("better", "needs", "scores") if not hasattr(made, key)]
    if lacking:
        raise RecipeError(
            f"filter: got {name!r}, which lacks {', '.join(lacking)}, expected a class like those "
            "of vestige.sources.quality_filters; add them"
        )
    return cast(QualityFilter, made)


def imported(key: str, target: str) -> Any:
    """What "package.module:name" stands for.

    Raises:
        RecipeError: nothing.
    """
    where, colon, name = target.partition(":")
    try:
        if not colon:
            raise ValueError(f"there is no {key} of this name")
        return getattr(import_module(where), name)
    except (ImportError, AttributeError, ValueError) as error:
        known = f"one of {', '.join(FILTERS)}, or " if key == "filter" else ""
        raise RecipeError(
            f"{key}: got {target!r} ({error}), expected {known}'package.module:name' that can be "
            "imported; correct the name"
        ) from error


def plugged(embedder: str | None, language_model: str | None) -> dict[str, Any]:
    """What users bring along, by its names in `Evidence`; only what is given.

    Args:
        embedder: "package.module:callable", called without arguments.
        language_model: likewise, called with texts.
    """
    found: dict[str, Any] = {}
    if embedder:
        found["embedder"] = imported("embedder", embedder)()
    if language_model:
        found["language_model"] = imported("language_model", language_model)
    return found


def cleaning_reason(
    text: str, ended: bool, *, drop_upper_case: bool, most_compression: float | None
) -> str:
    """Why a pseudo-label is dropped whatever its scores; "" for one that is not.

    Args:
        text: of it.
        ended: whether it came to its end before the limit of tokens.
        drop_upper_case: where it has letters, all of them capital, of a script that has others.
        most_compression: largest `compression_ratio`; None for any.
    """
    if not text.strip():
        return "empty"
    if not ended:
        return "too long"
    if drop_upper_case and text == text.upper() and text != text.lower():
        return "all upper case"
    if most_compression is not None and compression_ratio(text) > most_compression:
        return "repetition"
    return ""


def compression_ratio(text: str) -> float:
    """Bytes of a text per byte of it compressed, as Whisper measures loops; 0 for an empty one."""
    raw = text.encode("utf8")
    return len(raw) / len(zlib.compress(raw)) if raw else 0.0


def _rates(references: Sequence[str], evidence: Evidence) -> Tensor:
    rates = word_error_rates(references, evidence.heard.texts, evidence.normal)
    return torch.tensor(
        [float("nan") if rate is None else rate for rate in rates], dtype=torch.float64
    )


def _mean(values: Tensor, written: Tensor) -> Tensor:
    """Mean over the written tokens of each row; NaN where there are none."""
    return values.double().sum(1) / written.double().masked_fill(written == 0, float("nan"))
