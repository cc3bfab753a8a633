"""A batch whose gradient is made slice by slice, so that less memory is needed."""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce as fold

import torch
from torch import Tensor

from vestige.core.types import Batch, Inputs, Loss, Prediction, join_rows
from vestige.errors import ContractError


def accumulated(batch: Batch, slices: int, backward: Callable[[Batch, float], Loss]) -> Loss:
    """The loss of the batch, after the gradients of its slices were added.

    Args:
        batch: of at least one row.
        slices: their number; fewer where the batch has fewer rows.
        backward: forward and backward of a slice that is this share of the rows.

    Raises:
        ContractError: `slices` is below 1, or the batch is empty.
    """
    if slices == 1:
        return backward(batch, 1.0)
    size = len(batch)
    if slices < 1 or size == 0:
        raise ContractError(f"got accumulate={slices} for a batch of {size} rows")
    parts = []
    # A plug-in may have left fewer rows than slices were asked for.
    for rows in torch.arange(size).chunk(min(slices, size)):
        part = batch.rows(slice(int(rows[0]), int(rows[-1]) + 1))
        share = len(rows) / size
        parts.append((share, backward(part, share)))
    return _joined(parts)


def _joined(parts: Sequence[tuple[float, Loss]]) -> Loss:
    """One loss for the slices of an accumulated batch: weighted means, rows in order."""

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack(
            [share * value for (share, _), value in zip(parts, values, strict=True)]
        ).sum()

    losses = [loss for _, loss in parts]
    terms = {name: mean(loss.terms[name] for loss in losses) for name in losses[0].terms}

    def rows(values: Sequence[Inputs | None]) -> Inputs | None:
        present = [value for value in values if value is not None]
        return fold(join_rows, present) if len(present) == len(losses) else None

    def logits(answers: Sequence[Prediction | None]) -> Prediction | None:
        present = [answer.logits for answer in answers if answer is not None]
        return Prediction(torch.cat(present)) if len(present) == len(losses) else None

    fresh = [loss.fresh for loss in losses if loss.fresh is not None]
    return Loss(
        terms,
        mean(loss.total for loss in losses),
        rows([loss.inputs for loss in losses]),
        logits([loss.teacher for loss in losses]),
        logits([loss.student for loss in losses]),
        torch.cat(fresh) if len(fresh) == len(losses) else None,
    )
