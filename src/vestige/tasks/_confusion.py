"""What a table of pixels, (K, K) counts by true class and answer, says of a network."""

from typing import Any

from torch import Tensor


def overlaps(table: Tensor) -> Tensor:
    """Intersection over union of each class, (K,) float64, NaN where the union is empty."""
    hits = table.diagonal().double()
    return hits / (table.sum(0) + table.sum(1) - hits)


def mask_scores(table: Tensor) -> dict[str, float]:
    """The mean over the classes whose union is not empty, and the share of right pixels."""
    return {
        "miou": float(overlaps(table).nanmean()),
        "pixel_accuracy": int(table.diagonal().sum()) / int(table.sum()),
    }


def mask_details(table: Tensor) -> dict[str, Any]:
    """The same with the overlap of each class, None where the union is empty; for JSON."""
    shares = [None if share != share else share for share in overlaps(table).tolist()]
    return {**mask_scores(table), "per_class": shares}
