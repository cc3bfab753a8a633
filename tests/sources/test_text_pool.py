"""The store of written texts, and which of them are chosen."""

from collections import Counter

import pytest
import torch

from vestige.core.texts import to_texts
from vestige.errors import CheckpointError, DataError
from vestige.sources.answers import candidates
from vestige.sources.cleaning import duplicate_key
from vestige.sources.text_choice import TextChoice
from vestige.sources.text_pool import Record, TextPool


def filled(count: int = 12, *, order: int = 1, pairs: bool = False) -> TextPool:
    pool = TextPool(pairs=pairs)
    records = [
        Record(f"text {n}", "ab"[n % 2], context=f"context {n}", logprob=-1.5) for n in range(count)
    ][::order]
    for one in records:
        pool.add([one], [duplicate_key(one.text)], {one.label: Counter({"too-short": 1})})
    return pool


def test_shards_bring_back_records_keys_and_counts():
    pool, other = filled(), TextPool()
    other.load_shards([pool.shard(index) for index in range(pool.shard_count())])
    assert other.records == pool.records
    assert other.counts() == pool.counts() == {"kept": 12, "too-short": 12}
    assert other.seen(duplicate_key("text 3")) and not other.seen(duplicate_key("text 99"))
    assert other.asked("a") == 12
    assert other.kept_share(0.8) == 0.5 and TextPool().kept_share(0.8) == 0.8


@pytest.mark.parametrize("content", [b"{", b'{"records": [{"no": 1}]}', b"[]", b"\xff"])
def test_a_damaged_shard_is_told(content):
    with pytest.raises(CheckpointError, match="cannot be read"):
        TextPool().load_shards([{"json": torch.frombuffer(bytearray(content), dtype=torch.uint8)}])


def test_the_choice_does_not_depend_on_the_order_of_writing():
    texts = []
    for order in (1, -1):
        pool, choice = filled(order=order), TextChoice()
        choice.choose(pool, ["a", "b"], each=3, held_share=0.0)
        texts.append(to_texts(choice.rows(pool, 64)))
        assert choice.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert texts[0] == texts[1]
    # In order they would be the first three of each.
    assert texts[0][:3] != ["text 0", "text 2", "text 4"]


def test_more_texts_keep_those_that_were_chosen_before():
    pool, few, many = filled(40), TextChoice(), TextChoice()
    few.choose(pool, ["a", "b"], each=4, held_share=0.0)
    many.choose(pool, ["a", "b"], each=9, held_share=0.0)
    assert set(few.places.tolist()) < set(many.places.tolist())


def test_a_label_with_fewer_texts_is_told(caplog):
    pool, choice = filled(20), TextChoice()
    choice.choose(pool, ["a", "b"], each=12, held_share=0.0)
    assert "got 10 texts of the label 'a', expected 12" in caplog.text
    assert len(choice) == 20


def test_some_texts_of_each_label_are_held_back_but_never_all():
    pool, choice = filled(20), TextChoice()
    choice.choose(pool, ["a", "b"], each=10, held_share=0.1)
    assert [int(choice.held[choice.labels == label].sum()) for label in (0, 1)] == [1, 1]
    choice.choose(filled(2), ["a", "b"], each=10, held_share=0.9)
    assert not choice.held.any()


def test_a_pair_is_context_and_text():
    pool, choice = filled(pairs=True), TextChoice()
    choice.choose(pool, ["a", "b"], each=1, held_share=0.0)
    place = choice.places[0]
    number = pool.records[place].text.split()[1]
    assert to_texts(choice.rows(pool, 64))[0] == f"context {number}\x1ftext {number}"


def test_no_texts_are_an_error_with_the_counts():
    pool = TextPool()
    pool.add([], [], {"a": Counter({"too-short": 3, "no-end": 2})})
    with pytest.raises(DataError, match=r"all of 5 were dropped \(no-end 2, too-short 3\)"):
        TextChoice().choose(pool, ["a"], each=1, held_share=0.0)
    half = filled()
    half.add([], [], {"c": Counter({"no-end": 7})})
    with pytest.raises(DataError, match=r"label 'c': all of 7 were dropped \(no-end 7\)"):
        TextChoice().choose(half, ["a", "c"], each=1, held_share=0.0)


def test_candidates_for_answers_stand_where_they_say():
    passage = (
        "The Eiffel Tower was built by Gustave Eiffel in 1889. It cost $1.5 million, and "
        "Bank of England lent 12% of it. However, nobody lost."
    )
    found = candidates(passage, most=20)
    assert all(passage[start : start + len(text)] == text for text, start in found)
    texts = [text for text, _ in found]
    assert {"Eiffel Tower", "Gustave Eiffel", "1889", "Bank of England", "12%"} <= set(texts)
    assert not {"The", "It", "However"} & set(texts)
    assert len(candidates(passage, most=2)) == 2 and candidates("") == []


def test_a_label_of_which_nothing_comes_any_more_is_not_lacking():
    pool = TextPool()
    pool.add([Record("one", "a")], [b"1"], {"b": Counter({"no-end": 1500})})
    assert pool.lacking(["a", "b"], 1) == ["b"]
    pool.add([], [], {"b": Counter({"no-end": 300, "duplicate": 200})})
    assert pool.lacking(["a", "b"], 2) == ["a"]
    # So it is after a kill.
    other = TextPool()
    other.load_shards([pool.shard(index) for index in range(pool.shard_count())])
    assert other.lacking(["a", "b"], 2) == ["a"]
    # One that is kept gives hope again.
    pool.add([Record("two", "b")], [b"2"], {"b": Counter({"no-end": 1999})})
    assert pool.lacking(["a", "b"], 2) == ["a", "b"]


def test_what_helps_depends_on_why_most_were_dropped():
    pool = TextPool()
    pool.add([], [], {"a": Counter({"no-end": 3, "too-short": 2}), "b": Counter({"duplicate": 9})})
    with pytest.raises(DataError, match=r"all of 5 were dropped \(no-end 3, too-short 2\).*quote"):
        pool.check_any_kept("texts", "a")
    with pytest.raises(DataError, match=r"all of 14 were dropped .*temperature"):
        pool.check_any_kept("texts")
    with pytest.raises(DataError, match="none was asked for"):
        pool.check_any_kept("texts", "c")
