"""Keeping the better part of what was scored, with a record of every item."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from vestige.errors import DataError

Better = Literal["high", "low"]


@dataclass(frozen=True)
class Rule:
    """Which items to keep by their scores: those beyond a threshold, or the best share.

    Attributes:
        better: whether a higher or a lower score is the better one.
        threshold: keep scores of at least this ("high"), or below it ("low").
        keep_fraction: in (0, 1], keep the best ceil(keep_fraction * N), equal scores by their
            position; a smaller share keeps a subset of what a larger one keeps.
    """

    better: Better
    threshold: float | None = None
    keep_fraction: float | None = None

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.keep_fraction is None):
            raise DataError(
                f"got threshold={self.threshold} and keep_fraction={self.keep_fraction}, expected "
                "one of the two; leave the other out"
            )
        if self.keep_fraction is not None and not 0 < self.keep_fraction <= 1:
            raise DataError(
                f"got keep_fraction={self.keep_fraction}, expected a share above 0 and at most 1"
            )

    def kept(self, scores: Tensor) -> Tensor:
        """Which of `scores` (N,) are kept, (N,) bool; NaN, an item without a score, never is."""
        known = ~scores.isnan()
        if self.threshold is not None:
            beyond = scores >= self.threshold if self.better == "high" else scores < self.threshold
            return known & beyond
        # NaN is sorted behind infinity, so that what has no score takes nobody's place.
        badness = scores if self.better == "low" else -scores
        # Rounded before the ceiling: 0.1 * 30 is a little more than 3.
        most = math.ceil(round((self.keep_fraction or 0) * len(scores), 9))
        kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        kept[badness.argsort(stable=True)[:most]] = True
        return known & kept


def area_under_curve(scores: Tensor, good: Tensor, better: Better) -> float | None:
    """How well scores tell good items from bad ones: the area under the ROC curve.

    Args:
        scores: (N,); items with NaN count as the worst.
        good: (N,) bool, the truth.
        better: as in `Rule`.

    Returns:
        The chance, in [0, 1], that a good item has a better score than a bad one, ties by half;
        None where all are good or none is.
    """
    goodness = (
        (scores if better == "high" else -scores).double().masked_fill(scores.isnan(), -math.inf)
    )
    right, wrong = goodness[good], goodness[~good].sort().values
    if not len(right) or not len(wrong):
        return None
    below = torch.searchsorted(wrong, right, right=False)
    at_most = torch.searchsorted(wrong, right, right=True)
    return float((below + at_most).double().mean() / (2 * len(wrong)))


@dataclass(frozen=True)
class Item:
    """One item that was looked at.

    Attributes:
        text: what was written or heard.
        kept: whether it is learned from.
        reason: "" where it is kept, else a short code: a rule of cleaning, or the filter's name.
        scores: by filter; None where an item has none.
        about: plain values for the record: label, source, true text for evaluation only.
        audio: (samples,) in [-1, 1], or None.
        sample_rate_hz: of `audio`.
    """

    text: str
    kept: bool
    reason: str = ""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    audio: Tensor | None = None
    sample_rate_hz: int = 0


@dataclass(frozen=True)
class Filtered:
    """What was kept of the items of one source, and why.

    Attributes:
        items: all, in the order in which they came; of what never became an item only `counts`
            speaks.
        counts: how many items went each way: "kept", and each reason for dropping.
        filters: by name of the filter plain values: "better", "threshold" (the one that held),
            "keep_fraction", "area_under_curve" where the truth is known, and others.
        chosen: name of the filter that decided; "" where none did.
    """

    items: Sequence[Item]
    counts: Mapping[str, int]
    filters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chosen: str = ""


@runtime_checkable
class FiltersItems(Protocol):
    """A method that keeps some of the items that it made or was given: provenance.jsonl."""

    def filtered(self) -> Mapping[str, Filtered]:
        """By source or stage; {} before anything was filtered."""
        ...


def check_any_kept(counts: Mapping[str, int], what: str) -> None:
    """Raise unless something is kept.

    Args:
        counts: as in `Filtered`.
        what: that was filtered, for the message.

    Raises:
        DataError: nothing is; it says why each was dropped.
    """
    if counts.get("kept", 0):
        return
    reasons = ", ".join(f"{name} {count:,}" for name, count in counts.items() if name != "kept")
    raise DataError(
        f"got no {what} to learn from: all of {sum(counts.values()):,} were dropped "
        f"({reasons or 'there were none'}), expected at least one; loosen the filter or look at "
        "what came in"
    )
