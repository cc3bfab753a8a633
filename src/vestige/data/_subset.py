"""Some of a set's classes, named in brackets behind its name: "cifar10[cat,dog]"."""

import difflib
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vestige.data._layout import place_of
from vestige.data._masks import MaskPictures
from vestige.data._npz import Labels
from vestige.errors import DataError


def split_name(asked: str) -> tuple[str, tuple[str, ...]]:
    """Name or path of a set, and the classes that are asked for; () for all of them.

    What exists under the whole name is that, brackets and all.

    Raises:
        DataError: the brackets name nothing, a class twice, or no set stands before them.
    """
    if not asked.endswith("]") or "[" not in asked or os.path.lexists(place_of(asked)):
        return asked, ()
    name, _, listed = asked[:-1].rpartition("[")
    names = tuple(part.strip() for part in listed.split(","))
    if not name or not all(names) or len(set(names)) < len(names):
        raise DataError(
            f"got the data set '{asked}', expected NAME[CLASS,CLASS,...] with each class once; "
            "correct the brackets"
        )
    return name, names


def full_name(name: str, chosen: Sequence[str]) -> str:
    """The name of a set of which `chosen` are taken; () for all."""
    return f"{name}[{','.join(chosen)}]" if chosen else name


def check_names(name: str, chosen: Sequence[str], classes: Sequence[str]) -> None:
    """Raise DataError unless all of `chosen` are among the `classes` of the set `name`."""
    if not classes:
        raise DataError(
            f"got '{full_name(name, chosen)}', but {name} names no classes, expected a set whose "
            "classes have names; store them as 'classes', or leave out the brackets"
        )
    unknown = [one for one in chosen if one not in classes]
    if unknown:
        near = difflib.get_close_matches(unknown[0], classes, 1)
        hint = f"did you mean '{near[0]}'?" if near else "name some of these"
        raise DataError(
            f"got the classes {', '.join(unknown)} of data set '{name}', expected some of "
            f"{', '.join(classes)}; {hint}"
        )


def choose(
    name: str, labels: Labels | MaskPictures, chosen: Sequence[str], classes: Sequence[str]
) -> tuple[NDArray[np.bool_], Labels]:
    """Which rows (N,) are of the classes `chosen`, and their labels, numbered in that order.

    Raises:
        DataError: a name is unknown, or labels are masks.
    """
    check_names(name, chosen, classes)
    if isinstance(labels, MaskPictures) or labels.ndim != 1:
        raise DataError(
            f"got '{full_name(name, chosen)}', but {name} has a class for every pixel, expected a "
            "set with one class for each image; leave out the brackets"
        )
    numbers = np.full(len(classes), -1, dtype=np.int64)
    for number, one in enumerate(chosen):
        numbers[list(classes).index(one)] = number
    renumbered = numbers[labels]
    rows = renumbered >= 0
    return rows, renumbered[rows]
