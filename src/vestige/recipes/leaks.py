"""Whether images that a student learns from are among those that it is judged on."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vestige.core.rows import RowSource
from vestige.core.types import InputSpec
from vestige.data.unlabelled.decoding import BLOCK, Hashes, as_bytes, row_hashes
from vestige.training.diagnosis import Finding

# Values of a tensor that are hashed within a few seconds.
_CHEAP = 2**29
Hashed = Callable[[], Hashes | None]


def hashes_of_set(found: Any, spec: InputSpec) -> Hashes | None:
    """A number for each image of a set, see `row_hashes`; None where it holds no images."""
    images = getattr(found, "images", None)
    if spec.kind != "image" or len(spec.shape) != 3 or images is None:
        return None
    return np.concatenate([row_hashes(block) for block in as_bytes(images, spec)])


def hashes_of_inputs(inputs: object, spec: InputSpec) -> Hashes | None:
    """A number for each of `inputs` (N, C, H, W), normalised; the same as of a set's images.

    Of images that were resized one in some twenty differs by a grey level from what the file
    itself gives, because of rounding. None where they are no images or too many.
    """
    if not isinstance(inputs, Tensor) or spec.kind != "image" or inputs.dim() != 4:
        return None
    if tuple(inputs.shape[1:]) != spec.shape or inputs.numel() > _CHEAP:
        return None
    blocks = (inputs[start : start + BLOCK] for start in range(0, len(inputs), BLOCK))
    images = (
        spec.denormalize(block.detach().float()).mul(255).round().byte().permute(0, 2, 3, 1).cpu()
        for block in blocks
    )
    return np.concatenate([row_hashes(block.numpy()) for block in images])


def hashes_of_rows(source: RowSource, spec: InputSpec) -> Hashes | None:
    """`hashes_of_inputs` of every row of a source, read in blocks."""
    blocks = []
    for start in range(0, len(source), BLOCK):
        rows = source.rows(torch.arange(start, min(start + BLOCK, len(source))))
        size = rows.numel() if isinstance(rows, Tensor) else 0
        hashes = hashes_of_inputs(rows, spec)
        if hashes is None or size // len(hashes) * len(source) > _CHEAP:
            return None
        blocks.append(hashes)
    return np.concatenate(blocks)


def leaks(
    sources: Mapping[str, Hashed], judged: Hashed
) -> tuple[list[Finding], dict[str, dict[str, Any]]]:
    """What sources have in common with what the student is judged on, image by image.

    Equal are images whose bytes are, once decoded for the teacher; a heap's before they are
    distorted. A crop of an image, or the same one compressed anew, is another.

    Args:
        sources: by name, what gives the hashes of its rows.
        judged: what gives those of the test images; asked only where there is something to compare.

    Returns:
        A warning for each source with such rows, and for the run record how many there are.
    """
    found, about = [], {}
    known = {name: rows for name, hashed in sources.items() if (rows := hashed()) is not None}
    test = judged() if known else None
    if test is None:
        return [], {}
    for name, rows in known.items():
        same = int(np.isin(rows, test).sum())
        about[name] = {"rows_in_test": same}
        if same:
            seen = int(np.isin(test, rows).sum())
            found.append(
                Finding(
                    "test-images-in-source",
                    "warning",
                    f"{same:,} of {len(rows):,} rows of source {name!r} ({same / len(rows):.1%}) "
                    f"are images that the student is judged on, {seen:,} of {len(test):,} of these "
                    f"({seen / len(test):.1%}), so its score tells how it does on images it knows",
                    "take them out of the source, or judge on others (recipe: data)",
                )
            )
    return found, about
