"""Mean and variance per channel in few passes over memory, forward and backward."""

from typing import Any

import torch
from torch import Tensor


def channel_moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel, and the mean of each row's positions.

    The variance is that of values less their mean, in two passes as the definition says, so a large
    mean costs no digits. torch's own reduction over rows and positions takes some twenty times as
    long on a CPU, and its gradient passes once more over memory for each of the three results.

    Args:
        values: (B, C, ...), floating point.

    Returns:
        Mean (C,), variance (C,) over batch and positions, and means (B, C) over positions, with
        gradient; they may be differentiated twice.
    """
    return _Moments.apply(values)  # type: ignore[no-any-return,no-untyped-call]


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = values.reshape(*values.shape[:2], -1)
        each = rows.mean(2)
        mean = each.mean(0)
        # The norm squares and sums without writing the squares to memory.
        spread = torch.linalg.vector_norm(rows - mean[:, None], dim=2)
        return mean, spread.square().mean(0) / rows.shape[2], each

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        by_mean, by_var, by_each = grads
        values, mean = ctx.saved_tensors
        rows = values.reshape(*values.shape[:2], -1)
        count, positions = len(rows), rows.shape[2]
        slope = by_var * (2 / (count * positions))
        offset = by_mean / (count * positions) - slope * mean + by_each / positions
        grad: Tensor = (rows * slope[:, None]).add_(offset[..., None]).view_as(values)
        return grad
