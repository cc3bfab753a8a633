"""Self-BLEU against the plain definition, and what the other figures say."""

import math
import time
from collections import Counter

import pytest
import torch

from vestige.errors import DataError
from vestige.metrics.text_quality import balance, distinct, self_bleu, text_quality


def slow_bleu(references: list[list[str]], words: list[str], order: int) -> float:
    """BLEU as NLTK's sentence_bleu has it, with smoothing method 1."""

    def grams(text: list[str], n: int) -> Counter:
        return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))

    logs = []
    for n in range(1, order + 1):
        own = grams(words, n)
        top: Counter = Counter()
        for reference in references:
            top |= grams(reference, n)
        hits = sum(min(count, top[gram]) for gram, count in own.items())
        if n == 1 and not hits:
            return 0.0
        logs.append(math.log((hits or 0.1) / max(1, sum(own.values()))))
    closest = min((abs(len(r) - len(words)), len(r)) for r in references)[1]
    penalty = 1.0 if len(words) > closest else math.exp(1 - closest / len(words))
    return penalty * math.exp(sum(logs) / order)


def some(count: int, words: int, seed: int = 0) -> list[list[str]]:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 14, (count,), generator=rng).tolist()
    return [
        [f"w{n}" for n in torch.randint(words, (size,), generator=rng).tolist()] for size in lengths
    ]


@pytest.mark.parametrize("words", [4, 12, 200])
def test_self_bleu_is_the_mean_of_bleu_against_all_others(words):
    texts = some(14, words)
    fast = self_bleu(texts)
    for order in range(1, 6):
        slow = sum(slow_bleu(texts[:i] + texts[i + 1 :], one, order) for i, one in enumerate(texts))
        assert fast[order - 1] == pytest.approx(slow / len(texts), abs=1e-12)


def test_self_bleu_is_one_for_copies_and_zero_without_a_common_word():
    assert self_bleu([["a", "b", "c", "d", "e"]] * 3) == pytest.approx([1.0] * 5)
    assert self_bleu([["a", "b"], ["c", "d"]]) == [0.0] * 5


def test_a_thousand_texts_take_seconds():
    start = time.process_time()
    self_bleu(some(1000, 3000))
    assert time.process_time() - start < 10


def test_figures_say_what_they_say():
    texts = ["a b a", "a b", "c"]
    found = text_quality(texts, ["x", "x", "y"])
    assert found.words == {"mean": 2.0, "shortest": 1, "longest": 3}
    assert found.labels == {"x": 2, "y": 1}
    assert found.distinct["1"] == 0.5 and distinct([["a", "b", "a", "b"]], 2) == 2 / 3
    assert balance([5, 5]) == 1.0 and balance([10, 0]) == 0.0 and balance([3]) == 1.0
    assert text_quality(["a"], ["x"]).self_bleu == {}
    assert text_quality([f"a {n}" for n in range(50)], ["x"] * 50, compared=10).compared == 10


@pytest.mark.parametrize(("texts", "labels"), [([], []), (["a"], [])])
def test_nothing_to_look_at_is_told(texts, labels):
    with pytest.raises(DataError, match="at least one text"):
        text_quality(texts, labels)
