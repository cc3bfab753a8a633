"""What a speed benchmark is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SpeedCase:
    """Several ways to make the same number of things.

    Attributes:
        items: made by one call.
        what: they are.
        ways: by name; "vestige" is ours.
        shapes: sizes, for the record.
    """

    items: int
    what: str
    ways: Mapping[str, Callable[[], object]]
    shapes: Mapping[str, Any]
