"""Right labels of written texts: the share that a classifier of real texts agrees with."""

import pytest
from ngram import TOPICS, made_up

from vestige.core.texts import PAIR
from vestige.errors import DataError
from vestige.metrics import text_correctness as module
from vestige.metrics.text_correctness import text_correctness

NAMES = [*TOPICS]


def rows(count: int, seed: int) -> tuple[list[str], list[str]]:
    made = made_up(count, seed)
    return [text for text, _ in made], [NAMES[label] for _, label in made]


def test_agreement_is_the_share_of_right_labels():
    texts, labels = rows(80, 1)
    wrong = [*NAMES[1:], NAMES[0]]
    for count in (0, 20, 80):
        given = [wrong[NAMES.index(name)] if i < count else name for i, name in enumerate(labels)]
        found = text_correctness(texts, given, *rows(200, 0))
        assert found.agreement == pytest.approx(1 - count / 80)
        assert found.texts == 80 and found.learned_from == 200 and found.judge_accuracy is None


def test_the_judge_is_judged_by_texts_that_it_did_not_see():
    texts, labels = rows(40, 2)
    shifted = labels[1:] + labels[:1]
    found = text_correctness(texts, labels, *rows(200, 0), other_texts=texts, other_labels=shifted)
    assert found.agreement == 1.0 and found.judge_accuracy == 0.0


def test_the_two_texts_of_a_pair_are_told_apart():
    pairs = [f"a {w} b{PAIR}a {v} b" for w, v in (("left", "right"), ("right", "left"))] * 20
    labels = ["one", "two"] * 20
    assert text_correctness(pairs, labels, pairs, labels).agreement == 1.0


def test_many_texts_are_judged_by_some_from_all_over(monkeypatch):
    monkeypatch.setattr(module, "MOST_WRITTEN", 30)
    monkeypatch.setattr(module, "MOST_REAL", 100)
    texts, labels = rows(80, 1)
    # The last half is wrong; labels take turns, and all are seen.
    given = labels[:40] + [NAMES[(NAMES.index(one) + 1) % 4] for one in labels[40:]]
    found = text_correctness(texts, given, *rows(200, 0))
    assert found.texts == 30 and found.learned_from == 100
    assert found.agreement == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize(
    "real", [([], []), (["a", "b"], ["one", "one"]), (["", " "], ["one", "two"])]
)
def test_nothing_to_learn_from_is_told(real):
    with pytest.raises(DataError, match="expected"):
        text_correctness(["a"], ["one"], *real)
