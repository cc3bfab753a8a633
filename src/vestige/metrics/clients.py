"""How well clients are served, each by itself: a mean hides those that are left behind."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vestige.errors import ShapeError


def client_scores(
    accuracies: Sequence[float] | Tensor, examples: Sequence[int] | Tensor
) -> dict[str, float]:
    """Mean and spread of the clients' accuracies.

    Every client counts the same, however many examples it has; one without test examples has no
    accuracy and is left out. With a_1 .. a_K the accuracies of the others:

    - mean = sum a / K
    - std = sqrt(sum (a - mean)^2 / K), that of all clients and not an estimate from a sample
    - worst_decile = mean of the ceil(K / 10) lowest, at least one
    - jain = (sum a)^2 / (K sum a^2), from 1 / K (one has all) to 1, which it is if and only if all
      are equal; if all are 0 they are equal, and it is 1

    All four can look fair where no client is served well: read the spread beside the mean.

    Args:
        accuracies: (N,), in [0, 1]; any value, NaN too, where there are no examples.
        examples: (N,), test examples of each client, at least 0.

    Returns:
        "mean", "std", "worst_decile" and "jain"; NaN where no client has test examples.

    Raises:
        ShapeError: there are not as many accuracies as examples, or a client with examples has no
            accuracy in [0, 1].
    """
    values = torch.as_tensor(accuracies, dtype=torch.float64).cpu()
    counts = torch.as_tensor(examples).cpu()
    if values.dim() != 1 or values.shape != counts.shape:
        raise ShapeError(
            f"got accuracies {tuple(values.shape)} and examples {tuple(counts.shape)}, expected "
            "(clients,) for both"
        )
    judged = values[counts > 0]
    if not bool(((judged >= 0) & (judged <= 1)).all()):
        raise ShapeError(
            f"got accuracies from {float(judged.min())} to {float(judged.max())}, expected shares "
            "in [0, 1] of all clients that have test examples"
        )
    if not len(judged):
        return dict.fromkeys(("mean", "std", "worst_decile", "jain"), math.nan)
    lowest = judged.sort().values[: math.ceil(len(judged) / 10)]
    squares = len(judged) * judged.square().sum()
    return {
        "mean": float(judged.mean()),
        "std": float(judged.std(correction=0)),
        "worst_decile": float(lowest.mean()),
        "jain": float(judged.sum().square() / squares) if squares > 0 else 1.0,
    }
