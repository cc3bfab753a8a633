import pytest
import torch

from vestige.core.texts import PAIR, as_pair, to_bytes, to_texts
from vestige.errors import DataError, ShapeError


def test_texts_come_back_as_they_were():
    texts = ["plain", "", "Grüße, 世界 🌍", "two\nlines\tand tabs", f"one{PAIR}other", " spaces "]
    rows = to_bytes(texts, 40)
    assert (rows.shape, rows.dtype) == ((6, 40), torch.uint8)
    assert to_texts(rows) == texts


def test_a_row_is_utf8_and_then_zeros():
    row = to_bytes(["aé"], 6)[0]
    assert row.tolist() == [0x61, 0xC3, 0xA9, 0, 0, 0]


@pytest.mark.parametrize("length", range(8))
def test_a_long_text_is_cut_between_two_characters(length):
    text = "é世🌍!"
    found = to_texts(to_bytes([text], length))[0]
    assert text.startswith(found)
    assert len(found.encode()) <= length < len((found + text[len(found)]).encode())


def test_what_fits_exactly_is_whole():
    assert to_texts(to_bytes(["é世🌍"], 9)) == ["é世🌍"]


def test_zeros_and_half_characters_in_a_text_do_not_end_it():
    assert to_texts(to_bytes(["a\0b", "a\ud83db"], 8)) == ["a b", "a?b"]


def test_bytes_that_are_no_utf8_are_left_out():
    rows = torch.tensor([[0x61, 0xFF, 0x62, 0, 0x63]], dtype=torch.uint8)
    assert to_texts(rows) == ["ab"]


def test_rows_of_any_layout_in_memory_are_read():
    rows = to_bytes(["abc", "de"], 4)
    assert to_texts(rows.t().contiguous().t()) == ["abc", "de"]
    assert to_texts(rows[:, :2]) == ["ab", "de"]
    assert to_texts(rows[:0]) == []


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ShapeError, match=r"expected \(N, bytes\)"):
        to_texts(torch.zeros(shape, dtype=torch.uint8))


def test_numbers_that_are_no_bytes_are_refused():
    with pytest.raises(DataError, match=r"dtype torch\.float32.*to_bytes"):
        to_texts(torch.zeros(2, 4))


def test_pairs_are_told_from_single_texts():
    assert as_pair("one") == ("one", None)
    assert as_pair(f"one{PAIR}") == ("one", "")
    assert as_pair(f"one{PAIR}two") == ("one", "two")
    assert as_pair(f"one{PAIR}two{PAIR}three") == ("one", f"two{PAIR}three")
