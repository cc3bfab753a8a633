"""Distortions at the ratios that they say, the same ones for a seed."""

import numpy as np
import pytest
from numpy.random import RandomState

from vestige.data.unlabelled.audio_shifts import AUDIO_SHIFTS, shifted_audio
from vestige.errors import DataError

LENGTHS = [600, 900, 400, 1000]


@pytest.fixture
def rows() -> np.ndarray:
    made = np.zeros((4, 1000), dtype=np.float32)
    for row, length in zip(made, LENGTHS, strict=True):
        row[:length] = 0.1 * RandomState(length).standard_normal(length)
    return made


@pytest.mark.parametrize("name", [*AUDIO_SHIFTS, "noise|reversed"])
def test_a_seed_decides_and_values_stay_in_range(name, rows):
    before = rows.copy()
    first, _ = shifted_audio(rows, [name], RandomState(3))
    again, _ = shifted_audio(rows, [name], RandomState(3))
    assert np.array_equal(first, again)
    assert np.array_equal(rows, before)
    assert not np.array_equal(first, rows)
    assert first.dtype == np.float32
    assert np.abs(first).max() <= 1


@pytest.mark.parametrize("name", ["noise", "babble"])
def test_what_is_added_is_0_to_5_db_below(name, rows):
    changed, spoken = shifted_audio(rows, [name], RandomState(0))
    for row, other, length in zip(rows, changed, LENGTHS, strict=True):
        added = (other - row).astype(np.float64)
        ratio = 10 * np.log10(np.square(row).sum() / length / np.square(added).mean())
        assert -0.01 < ratio < 5.01
    assert spoken.all()


def test_babble_is_made_of_others(rows):
    alone, _ = shifted_audio(rows[:1], ["babble"], RandomState(0))
    changed, _ = shifted_audio(rows, ["babble"], RandomState(0))
    added = changed[2] - rows[2]
    assert np.abs(np.corrcoef(added, rows[2])[0, 1]) < 0.2
    assert np.isfinite(alone).all()


def test_cut_rows_keep_their_beginning(rows):
    changed, _ = shifted_audio(rows, ["truncate"], RandomState(0))
    for row, other, length in zip(rows, changed, LENGTHS, strict=True):
        kept = int(np.flatnonzero(other)[-1]) + 1
        assert 0.28 * length <= kept <= 0.61 * length
        assert np.array_equal(other[:kept], row[:kept])


def test_backwards_holds_no_words_and_twice_is_once(rows):
    changed, spoken = shifted_audio(rows, ["reversed"], RandomState(0))
    assert not spoken.any()
    assert np.array_equal(changed[0, :600], rows[0, :600][::-1])
    assert not changed[0, 600:].any()


def test_of_several_each_row_has_one(rows):
    many = np.tile(rows, (10, 1))
    changed, spoken = shifted_audio(many, ["reversed|truncate"], RandomState(1))
    assert 5 < spoken.sum() < 35
    assert (changed[spoken] != 0).sum() < (many[spoken] != 0).sum()


def test_an_unknown_one_is_named(rows):
    with pytest.raises(DataError, match="rotate"):
        shifted_audio(rows, ["rotate"], RandomState(0))
