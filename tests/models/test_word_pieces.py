"""A vocabulary is a matter of the texts alone."""

import json

import pytest
from ngram import made_up

from vestige.core.texts import to_bytes
from vestige.errors import RecipeError
from vestige.models.text import bert
from vestige.models.word_pieces import learn_word_pieces

pytest.importorskip("transformers", reason="needs the extra [text]")
TEXTS = [text for text, _ in made_up(80)]
TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def test_the_same_texts_in_any_order_give_the_same_vocabulary():
    # Many pieces of these few words are equally frequent; by chance no two of ten were the same.
    found = {learn_word_pieces(TEXTS[turn:] + TEXTS[:turn], 300, TOKENS)[0] for turn in range(8)}
    assert len(found) == 1


def test_it_holds_what_is_frequent_and_all_letters():
    described, numbers = learn_word_pieces(["low lower lowest"] * 9 + ["Zoë zoë"], 40, TOKENS)
    assert list(numbers)[:5] == list(TOKENS)
    assert sorted(numbers.values()) == list(range(len(numbers)))
    assert json.loads(described)["model"]["vocab"] == numbers
    # Lower case, without accents; letters that begin no word are there for its end.
    assert {"low", "l", "z", "##o", "##e"} <= set(numbers)
    assert not {"Z", "\u00eb", "##l"} & set(numbers)


def test_the_most_frequent_letters_are_kept():
    rare = [chr(0x4E00 + number) for number in range(1100)]
    _, numbers = learn_word_pieces([*rare, *rare[:50]], 3000, TOKENS)
    letters = {word for word in numbers if len(word) == 1}
    assert len(letters) == 1000
    assert set(rare[:50]) <= letters


def test_a_vocabulary_smaller_than_the_letters_is_refused():
    network = bert(2, layers=1, width=8, heads=2, vocabulary=20, tokens=8)
    rows = to_bytes(TEXTS, 128)
    with pytest.raises(RecipeError, match="got a vocabulary of 20, expected at least"):
        network.learn_vocabulary(rows)
