"""The rules by which texts are kept, one after another."""

import pytest

from vestige.sources.cleaning import Cleaned, clean, cut_only, duplicate_key

TEN = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    ("raw", "text", "reason"),
    [
        (f'{TEN}" and more. "', TEN, ""),
        (f"{TEN}\nanother line.", TEN, ""),
        (f"{TEN}. And then half a", f"{TEN}.", ""),
        (f"{TEN}. Two. And half", f"{TEN}. Two.", ""),
        # The quote counts before the newline, the newline before the full stop.
        (f'{TEN}\nnext" x', f"{TEN}\nnext", ""),
        (f"{TEN}. a\nb.", f"{TEN}. a", ""),
        (TEN, "", "no-end"),
        ('four short words here"', "", "too-short"),
        ("", "", "no-end"),
        ('"', "", "too-short"),
    ],
)
def test_a_text_ends_at_the_first_mark_that_counts(raw, text, reason):
    assert clean(raw, min_words=10) == Cleaned(text, reason)


@pytest.mark.parametrize(
    ("raw", "text", "reason"),
    [
        ('who won the cup in may? It was"', "who won the cup in may?", ""),
        ('he said "who won the cup?" then', 'he said "who won the cup?', ""),
        ('who won the cup in may"', "", "no-question-mark"),
        ("who won?", "", "too-short"),
    ],
)
def test_a_question_ends_at_its_first_question_mark(raw, text, reason):
    assert clean(raw, min_words=5, ends_with="?") == Cleaned(text, reason)


def test_what_repeats_its_context_or_holds_its_answer_is_dropped():
    assert clean(f'{TEN}"', min_words=1, context=TEN).reason == "same-as-context"
    question = "In which year did ROME fall at last?"
    assert clean(question, min_words=5, ends_with="?", answer="Rome").reason == "holds-answer"
    assert not clean(question, min_words=5, ends_with="?", answer="476").reason


def test_the_rules_are_applied_once_because_a_second_time_they_cut_again():
    raw = 'a fine film" and so on'
    once = clean(raw, min_words=1)
    assert once == Cleaned("a fine film")
    assert clean(once.text, min_words=1).reason == "no-end"
    for fixed in ("A text. Of two sentences.", "One."):
        assert clean(fixed, min_words=1).text == fixed


@pytest.mark.parametrize("raw", [None, 7, b"bytes", ["a"]])
def test_what_is_no_text_is_dropped(raw):
    assert clean(raw, min_words=1).reason == "not-text"
    assert cut_only(raw).reason == "not-text"


def test_what_rows_of_bytes_cannot_hold_is_replaced():
    found = clean('one\0two\x1fthree \ud800 four"', min_words=1)
    assert found.text == "one two three ? four"
    assert cut_only("a\x1fb\udfff").text == "a b?"


def test_without_rules_only_the_end_and_nothing_are_cut():
    assert cut_only('short" x').text == "short"
    assert cut_only("no end\nat all").text == "no end\nat all"
    assert cut_only('" x').reason == "too-short"


def test_equal_texts_have_one_key_whatever_case_space_and_form():
    assert duplicate_key("A  Fine\tfilm ") == duplicate_key("a fine film")
    assert duplicate_key("ﬁne") == duplicate_key("fine")
    assert duplicate_key("a fine film") != duplicate_key("a fine film.")
    assert duplicate_key("a", "b") != duplicate_key("a", "c")
    assert duplicate_key("\ud800") == duplicate_key("\ud800")
