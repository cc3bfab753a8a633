"""A heap: parts of known origin, distorted as asked, shuffled, each row knowing its part."""

from pathlib import Path

import numpy as np
import pytest

from vestige.core.types import InputSpec
from vestige.data.unlabelled.arrays import ArrayImages
from vestige.data.unlabelled.decoding import row_hashes
from vestige.data.unlabelled.made_up import MadeUpImages, stream
from vestige.data.unlabelled.shifts import shifted
from vestige.recipes import heap as module
from vestige.recipes.heap import Part, keep_heap

SPEC = InputSpec.image(1, 6, 5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))


def images(count: int, value: int) -> np.ndarray:
    """All different, and of one part by their first pixel."""
    found = np.random.RandomState(value).randint(0, 256, (count, 6, 5), dtype=np.uint8)
    found[:, 0, 0] = value
    return found


def parts(**given: object) -> list[Part]:
    return [
        Part("one", ArrayImages(images(30, 1), "one"), **given),  # type: ignore[arg-type]
        Part("two", ArrayImages(images(50, 2), "two"), count=20),
        Part("junk", MadeUpImages("noise", 7, 0), count=7),
    ]


def test_every_row_is_of_the_part_that_it_remembers() -> None:
    kept = keep_heap(parts(), SPEC, 0)
    found = np.load(kept.images)
    assert found.shape == (57, 6, 5, 1) and np.bincount(kept.parts).tolist() == [30, 20, 7]
    for number in (0, 1):
        assert (found[kept.parts == number][:, 0, 0, 0] == number + 1).all()
    assert {one.tobytes() for one in found[kept.parts == 0]} == {
        one.tobytes() for one in images(30, 1)
    }
    assert np.array_equal(kept.hashes, row_hashes(found))
    assert {name: card["rows"] for name, card in kept.cards.items()} == {
        "one": 30, "two": 20, "junk": 7,
    }  # fmt: skip


def test_rows_are_shuffled_by_the_seed() -> None:
    first, again, other = (keep_heap(parts(), SPEC, seed) for seed in (0, 0, 1))
    assert first.images == again.images != other.images
    assert not np.array_equal(first.parts, other.parts)
    # 57 rows in their parts' order have 2 changes; shuffled ones about 33.
    assert (np.diff(first.parts.astype(int)) != 0).sum() > 15


def test_a_shift_is_of_its_part_alone_and_hashes_are_of_what_was_before() -> None:
    plain, inverted = keep_heap(parts(), SPEC, 0), keep_heap(parts(shift=("invert",)), SPEC, 0)
    before, after = np.load(plain.images), np.load(inverted.images)
    assert np.array_equal(plain.parts, inverted.parts)
    own = plain.parts == 0
    assert np.array_equal(after[own], 255 - before[own])
    assert np.array_equal(after[~own], before[~own])
    assert np.array_equal(plain.hashes, inverted.hashes)


def test_distortions_come_from_the_seed_and_the_parts_name() -> None:
    kept = keep_heap(parts(shift=("rotate", "noise")), SPEC, 5)
    found, order = np.load(kept.images), stream(5, "order of the heap").permutation(57)[:30]
    expected = shifted(images(30, 1)[..., None], ["rotate", "noise"], stream(5, "one/0"))
    assert np.array_equal(found[order], expected)


def test_blocks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.load(keep_heap(parts(), SPEC, 0).images)
    monkeypatch.setattr(module, "_BLOCK", 4)
    monkeypatch.setattr(module, "VERSION", -1)
    assert np.array_equal(np.load(keep_heap(parts(), SPEC, 0).images), whole)
