"""What a set of written texts is like: how varied, how long, how balanced."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vestige.errors import DataError

# As NLTK's smoothing method 1: in place of a count of 0.
_EPSILON = 0.1
_ORDERS = (1, 2, 3, 4, 5)
Words = Sequence[str]


@dataclass(frozen=True)
class TextQuality:
    """What `text_quality` found.

    Attributes:
        texts: how many there are.
        compared: how many of them were compared for `self_bleu`.
        self_bleu: for n-grams up to 1 ... 5, in [0, 1]; lower is more varied. {} for one text.
        distinct: share of n-grams of 1, 2 and 3 words that are different ones, in (0, 1].
        words: mean, shortest and longest number of words.
        labels: how many texts each label has.
        balance: entropy of the labels over that of equally many of each, in [0, 1].
    """

    texts: int
    compared: int
    self_bleu: dict[str, float]
    distinct: dict[str, float]
    words: dict[str, float]
    labels: dict[str, int]
    balance: float


def text_quality(
    texts: Sequence[str], labels: Sequence[str], *, compared: int = 1000
) -> TextQuality:
    """Variety, lengths and balance of texts; words are split at white space.

    Args:
        texts: at least one.
        labels: of each.
        compared: texts that Self-BLEU looks at, spread evenly over all.

    Raises:
        DataError: there are no texts, or not one label each.
    """
    if not texts or len(texts) != len(labels):
        raise DataError(
            f"got {len(texts)} texts and {len(labels)} labels, expected at least one text and a "
            "label for each"
        )
    lists = [text.split() for text in texts]
    step = max(1, math.ceil(len(lists) / compared))
    some = lists[::step]
    lengths = [len(words) for words in lists]
    counts = Counter(labels)
    return TextQuality(
        texts=len(texts),
        compared=len(some),
        self_bleu={str(n): value for n, value in zip(_ORDERS, self_bleu(some), strict=True)}
        if len(some) > 1
        else {},
        distinct={str(n): distinct(lists, n) for n in (1, 2, 3)},
        words={
            "mean": sum(lengths) / len(lengths),
            "shortest": min(lengths),
            "longest": max(lengths),
        },
        labels=dict(sorted(counts.items())),
        balance=balance(list(counts.values())),
    )


def self_bleu(texts: Sequence[Words], orders: Sequence[int] = _ORDERS) -> list[float]:
    """Mean BLEU of each text against all the others, for each largest n-gram.

    Uniform weights over 1 ... n; a precision without a match counts 0.1 / its denominator (NLTK's
    smoothing method 1), but a text without a single word in common has 0; the reference length is
    the closest one, the shorter of two equally close ones.

    The highest count of an n-gram over the others is the highest over all, or the second highest
    where the text itself has the highest: so one table of all texts is enough.

    Args:
        texts: lists of words, at least two.
        orders: largest n-grams.

    Raises:
        DataError: there are fewer than two.
    """
    if len(texts) < 2:
        raise DataError(f"got {len(texts)} texts, expected at least 2 to compare")
    longest = max(orders)
    lengths = Counter(map(len, texts))
    # Per text and order: matches with the others, and n-grams, at least 1.
    matches = [[0] * longest for _ in texts]
    totals = [[max(1, len(words) - n) for n in range(longest)] for words in texts]
    for n in range(1, longest + 1):
        counts = [Counter(_grams(words, n)) for words in texts]
        top: dict[tuple[str, ...], tuple[int, int]] = {}
        for found in counts:
            for gram, count in found.items():
                first, second = top.get(gram, (0, 0))
                if count > first:
                    top[gram] = count, first
                elif count > second:
                    top[gram] = first, count
        for row, found in enumerate(counts):
            total = 0
            for gram, count in found.items():
                first, second = top[gram]
                total += min(count, second if count == first else first)
            matches[row][n - 1] = total
    scores = [0.0 for _ in orders]
    for words, hits, of in zip(texts, matches, totals, strict=True):
        penalty = _brevity(len(words), lengths)
        for place, order in enumerate(orders):
            if hits[0]:
                logs = [math.log((h or _EPSILON) / t) for h, t in zip(hits, of, strict=True)]
                scores[place] += penalty * math.exp(sum(logs[:order]) / order)
    return [score / len(texts) for score in scores]


def distinct(texts: Sequence[Words], order: int) -> float:
    """Share of the n-grams of all texts that are different ones; 0 where there are none."""
    grams = [gram for words in texts for gram in _grams(words, order)]
    return len(set(grams)) / len(grams) if grams else 0.0


def balance(counts: Sequence[int]) -> float:
    """Entropy of counts over the largest one possible, in [0, 1]; 1 for a single label."""
    if len(counts) < 2:
        return 1.0
    total = sum(counts)
    shares = [count / total for count in counts if count]
    return -sum(share * math.log(share) for share in shares) / math.log(len(counts))


def _grams(words: Words, order: int) -> list[tuple[str, ...]]:
    if order == 2:
        return list(pairwise(words))
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def _brevity(length: int, lengths: Counter[int]) -> float:
    """Penalty of a text that is shorter than the closest other one."""
    if not length:
        return 0.0
    others = [one for one, count in lengths.items() if count > (one == length)]
    closest = min(others, key=lambda other: (abs(other - length), other))
    return 1.0 if length > closest else math.exp(1 - closest / length)
