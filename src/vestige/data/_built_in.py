"""Sets that are always there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from vestige.data._npz import Arrays
from vestige.data._scenes import SCENE_SIZES, scenes
from vestige.errors import DataError

_TEST_PER_CLASS, _SEED = 50, 0


@dataclass(frozen=True)
class BuiltIn:
    """A set that is always there.

    Attributes:
        where: it comes from, in words.
        sizes: images in each split.
        read: images, labels and class names of a split.
    """

    where: str
    sizes: Mapping[str, int]
    read: Callable[[str], Arrays]


def read_built_in(name: str, split: str) -> Arrays:
    """Images, labels and class names of a split of one of `BUILT_INS`.

    Raises:
        DataError: it has no such split.
    """
    known = BUILT_INS[name]
    if split not in known.sizes:
        raise DataError(
            f"got split '{split}' of '{name}', expected one of {', '.join(known.sizes)}; name one"
        )
    return known.read(split)


def _digits(split: str) -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    # RandomState, not default_rng: numpy promises that its stream never changes.
    order = np.random.RandomState(_SEED).permutation(len(labels))
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in range(10):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    is_test = rank[order] < _TEST_PER_CLASS
    rows = order[is_test] if split == "test" else order[~is_test]
    cut = len(rows) - len(rows) // 10
    if split != "test":
        rows = rows[cut:] if split == "select" else rows[:cut]
    return images[rows], labels[rows], tuple(str(digit) for digit in range(10))


_drawn = cache(scenes)


def _scenes(split: str) -> Arrays:
    images, masks, classes = _drawn(split)
    # Whoever writes into theirs must not change everybody's.
    return images.copy(), masks.copy(), classes


BUILT_INS: Mapping[str, BuiltIn] = {
    "digits": BuiltIn(
        "built in (scikit-learn)", {"train": 1168, "select": 129, "test": 500}, _digits
    ),
    "scenes": BuiltIn("built in (drawn)", SCENE_SIZES, _scenes),
}
