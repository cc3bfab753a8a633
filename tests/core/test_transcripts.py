"""Word error rates against jiwer on known cases, and normalisers."""

import pytest

from vestige.core.transcripts import error_rates, normalizer, word_error_rates
from vestige.errors import RecipeError

pytest.importorskip("jiwer")
pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("said", "heard", "rate"),
    [
        ("one two three", "one two three", 0),
        ("one two three", "one two", 1 / 3),
        ("one two three", "one four three", 1 / 3),
        ("one", "one two three", 2),
        ("One, two!", "one two", 0),
        ("one two", "", 1),
    ],
)
def test_rates_count_substitutions_deletions_and_insertions(said, heard, rate):
    assert error_rates([said], [heard], "basic").wer == pytest.approx(rate)
    assert word_error_rates([said], [heard], normalizer("basic")) == [pytest.approx(rate)]


def test_a_corpus_weighs_its_references_by_their_words():
    rates = error_rates(["one two three", "four"], ["one two three", "five"], "basic")
    assert rates.wer == pytest.approx(1 / 4)
    assert rates.words == 4


def test_characters_include_spaces():
    assert error_rates(["a b"], ["ab"], "none").cer == pytest.approx(1 / 3)


def test_references_without_a_word_are_counted_and_left_out():
    rates = error_rates(["...", "one"], ["two", "one"], "basic")
    assert (rates.wer, rates.skipped) == (0, 1)
    assert word_error_rates(["..."], ["two"], normalizer("basic")) == [None]
    assert error_rates(["!"], ["one"], "basic").skipped == 1


def test_the_arabic_normaliser_follows_the_published_rules():
    normal = normalizer("arabic")
    assert normal("أإآا") == "ا" * 4
    # Outside of what is kept, so that it goes before alefs are made one.
    assert normal("\u0671كتب") == "كتب"
    assert normal("٠١٢٩") == "0129"
    assert normal("كَتَبَ") == "كتب"
    assert normal("hello كتب, 5%  x") == "كتب 5%"
    assert normal(normal("أَحمد ٣")) == normal("أَحمد ٣")


def test_an_unknown_normaliser_is_named():
    with pytest.raises(RecipeError, match="klingon"):
        normalizer("klingon")  # type: ignore[arg-type]
