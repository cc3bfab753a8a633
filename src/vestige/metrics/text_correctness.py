"""Whether written texts are of the label that they were written for, as real texts tell it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from vestige.core import seeding
from vestige.core.texts import as_pair
from vestige.errors import DataError
from vestige.models.word_models import words_of

# Of each kind at most, drawn: more change the share by less than it varies by itself.
MOST_WRITTEN, MOST_REAL = 10_000, 20_000


@dataclass(frozen=True)
class TextCorrectness:
    """What `text_correctness` found.

    Attributes:
        agreement: share of the written texts whose label the judge agrees with, in [0, 1].
        judge_accuracy: of the judge on real texts that it did not see, in [0, 1]: more agreement
            than that tells nothing. None without such texts.
        texts: written ones that were judged.
        learned_from: real ones that the judge learned from.
    """

    agreement: float
    judge_accuracy: float | None
    texts: int
    learned_from: int


def text_correctness(
    texts: Sequence[str],
    labels: Sequence[str],
    real_texts: Sequence[str],
    real_labels: Sequence[str],
    *,
    other_texts: Sequence[str] = (),
    other_labels: Sequence[str] = (),
) -> TextCorrectness:
    """Judge written texts by TF-IDF of words and pairs of words, and logistic regression.

    Args:
        texts: written; a pair is one text with `core.texts.PAIR` between.
        labels: that they were written for.
        real_texts: that the judge learns from, of at least two labels.
        real_labels: of these.
        other_texts: real ones that tell how good the judge is.
        other_labels: of these.

    Raises:
        DataError: there is nothing to judge, or nothing to learn from.
    """
    rows, real = _some(len(texts), MOST_WRITTEN), _some(len(real_texts), MOST_REAL)
    known = [real_labels[row] for row in real]
    if not rows or len(set(known)) < 2:
        raise DataError(
            f"got {len(texts)} written texts and real ones of {len(set(known))} labels, expected "
            "at least one, and two labels"
        )
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    judge = make_pipeline(
        TfidfVectorizer(analyzer=_terms, sublinear_tf=True, max_features=100_000),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    try:
        judge.fit([real_texts[row] for row in real], known)
    except ValueError as error:
        raise DataError(
            f"got {len(real):,} real texts that nothing can be learned from ({error}), expected "
            "texts with words"
        ) from error

    def right(given: Sequence[str], wanted: Sequence[str]) -> float:
        found = judge.predict(list(given))
        return float(sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted))

    return TextCorrectness(
        agreement=right([texts[row] for row in rows], [labels[row] for row in rows]),
        judge_accuracy=right(other_texts, other_labels) if len(other_texts) else None,
        texts=len(rows),
        learned_from=len(real),
    )


def _some(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, always the same ones."""
    # Not evenly apart: labels that take turns would be left out.
    drawn = torch.randperm(count, generator=seeding.generator(0, "texts that are judged"))
    return sorted(drawn[:most].tolist())


def _terms(text: str) -> list[str]:
    """Words and pairs of neighbours; those of the second text of a pair are others."""
    first, second = as_pair(text)
    terms = []
    for side, part in ((0, first), (1, second or "")):
        words = words_of(part)
        terms += [f"{side} {word}" for word in words]
        terms += [f"{side} {one} {two}" for one, two in pairwise(words)]
    return terms
