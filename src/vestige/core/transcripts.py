"""Transcripts: what a recogniser heard, and how two texts are compared."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, runtime_checkable

from torch import Tensor

from vestige.errors import MissingExtraError, RecipeError

Normalizer = Literal["basic", "english", "arabic", "none"]
Normalize = Callable[[str], str]

# What the published evaluation keeps: ASCII digits, Arabic letters and digits, %, @ and spaces.
_NOT_ARABIC = re.compile("[^0-9\u0621-\u064a\u0660-\u0669%@\\s]")
_DIGITS = str.maketrans("٠١٢٣٤٥٦٧٨٩", "0123456789")
_ALEFS = re.compile("[\u0622\u0623\u0625\u0671\u0672\u0673\u0675]")


@dataclass(frozen=True)
class Transcripts:
    """What was heard in B recordings, one greedy pass.

    Attributes:
        texts: B of them.
        tokens: (B, T) int64, all that the decoder read and wrote: prompt, text, end, filled up with
            the end or the padding token.
        log_probs: (B, T) float32 in nats of each written token, 0 where none was written.
        entropies: (B, T) float32 in nats of the full distribution each was taken from, likewise.
        written: (B,) int64, tokens that were written, the end among them.
        ended: (B,) bool, whether the end came before the limit of tokens.
    """

    texts: list[str]
    tokens: Tensor
    log_probs: Tensor
    entropies: Tensor
    written: Tensor
    ended: Tensor


@runtime_checkable
class Transcribes(Protocol):
    """A network that writes down what it hears."""

    def transcribe(self, waveforms: Tensor, *, batch_size: int = 32) -> Transcripts:
        """Greedy transcripts of `waveforms` (N, samples), in eval mode and without gradient."""
        ...


def normalizer(name: Normalizer) -> Normalize:
    """How texts are made comparable before words are counted.

    Args:
        name: "basic" (lower case, no punctuation, any language) and "english" (also contractions,
            numbers and spellings) are Whisper's, as in transformers; "arabic" keeps Arabic letters
            and digits, without diacritics, with one alef and ASCII digits (UBC-NLP's evaluate.py);
            "none" leaves texts alone but for surrounding spaces.

    Raises:
        MissingExtraError: it needs transformers, which is not installed.
        RecipeError: there is no such normaliser.
    """
    if name == "none":
        return str.strip
    if name == "arabic":
        return _arabic
    if name not in ("basic", "english"):
        raise RecipeError(
            f"got normalizer {name!r}, expected one of basic, english, arabic, none; name one"
        )
    try:
        from transformers.models.whisper import english_normalizer
    except ImportError as error:
        raise _missing("transformers") from error
    if name == "english":
        made = english_normalizer.EnglishTextNormalizer({})
        return lambda text: str(made(text)).strip()
    basic = english_normalizer.BasicTextNormalizer()
    return lambda text: str(basic(text)).strip()


def _arabic(text: str) -> str:
    kept = _NOT_ARABIC.sub("", text).translate(_DIGITS)
    return " ".join(_ALEFS.sub("\u0627", kept).split())


@dataclass(frozen=True)
class ErrorRates:
    """Errors over a corpus, as rates: 1 is as many errors as there are words.

    Attributes:
        wer: substitutions, deletions and insertions per word of the reference.
        cer: likewise of characters, spaces among them.
        words: of the references.
        skipped: pairs whose reference has no word left after normalising.
    """

    wer: float
    cer: float
    words: int
    skipped: int


def error_rates(references: Sequence[str], heard: Sequence[str], name: Normalizer) -> ErrorRates:
    """WER and CER of a corpus, after normalising; references without a word are left out, counted.

    Both are 0 where no reference has a word.

    Raises:
        MissingExtraError: jiwer is not installed.
    """
    jiwer = _jiwer()
    normal = normalizer(name)
    pairs = [(normal(one), normal(two)) for one, two in zip(references, heard, strict=True)]
    known = [pair for pair in pairs if pair[0]]
    if not known:
        return ErrorRates(0.0, 0.0, 0, len(pairs))
    said, written = ([*column] for column in zip(*known, strict=True))
    return ErrorRates(
        float(jiwer.wer(said, written)),
        float(jiwer.cer(said, written)),
        sum(len(text.split()) for text in said),
        len(pairs) - len(known),
    )


def word_error_rates(
    references: Sequence[str], heard: Sequence[str], normal: Normalize
) -> list[float | None]:
    """WER of each pair; None where the reference has no word after normalising.

    Raises:
        MissingExtraError: jiwer is not installed.
    """
    jiwer = _jiwer()
    rates: list[float | None] = []
    for reference, text in zip(references, heard, strict=True):
        said = normal(reference)
        rates.append(float(jiwer.wer(said, normal(text))) if said else None)
    return rates


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise _missing("jiwer") from error
    return cast(Any, jiwer)


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(
        f"comparing transcripts needs {package}, which is not installed; "
        "pip install 'vestige[speech]'"
    )
