"""What a client's loss is made of, and which labels it saw."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Terms:
    """Sums up the terms of a client's steps in one round.

    Attributes:
        counts: labels of the batches so far, (C,), int64.

    Args:
        num_classes: C.
        device: where the client computes.
    """

    def __init__(self, num_classes: int, device: str) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.long, device=device)
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, labels: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """Take note of one step.

        Args:
            labels: of the batch, (B,).
            terms: scalars (), as they enter the loss.

        Returns:
            Their sum (), with gradient.
        """
        self.counts.scatter_add_(0, labels, torch.ones_like(labels))
        self._steps += 1
        for name, term in terms.items():
            before = self._sums.get(name)
            self._sums[name] = term.detach() if before is None else before + term.detach()
        first, *others = terms.values()
        for term in others:
            first = first + term
        return first

    def means(self) -> dict[str, float]:
        """Of each term over all steps, one without it counting 0."""
        return {name: float(value) / self._steps for name, value in self._sums.items()}
