"""Mean logits of each class: what clients tell of their answers without telling an input."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vestige.core.federation import Payload, Settings, sent


def sums_by_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the logits (B, C) of each label (B,): (C, C), rows by label; no gradient."""
    classes = logits.shape[1]
    return logits.new_zeros(classes, classes).index_add(0, labels, logits.detach())


class ClassLogits:
    """Means over the clients that have a class; a class that no client has keeps what it had.

    Args:
        num_classes: C.
        over_all: divide by all clients that answered; one without a class counts with logits of 0,
            which softens the answers to rare classes.

    Attributes:
        means: (C, C), float32, on the CPU; rows by label, 0 where nobody had it yet.
        known: (C,), bool, classes that some client has had.
    """

    def __init__(self, num_classes: int, *, over_all: bool = False) -> None:
        self.over_all = over_all
        self.means = torch.zeros(num_classes, num_classes)
        self.known = torch.zeros(num_classes, dtype=torch.bool)

    def add(self, means: Tensor, counts: Tensor) -> None:
        """Take the answers of one round.

        Args:
            means: of K clients, (K, C, C), each over its own examples of a label.
            counts: of those examples, (K, C); a row without any does not count.
        """
        has = (counts > 0).cpu()
        total = torch.where(has[..., None], means.cpu(), 0.0).sum(0)
        now = has.any(0)
        clients = torch.full_like(now, len(has), dtype=torch.long) if self.over_all else has.sum(0)
        fresh = total / clients.clamp_min(1)[:, None]
        self.means = torch.where(now[:, None], fresh, self.means)
        self.known = self.known | now

    def message(self) -> tuple[Payload, Settings]:
        """What the server sends: the means, and the classes that have one; nothing before."""
        if not self.known.any():
            return {}, {}
        labels = [int(label) for label in self.known.nonzero().flatten()]
        return {"class-logits": sent({"means": self.means})}, {"labels": labels}

    def state_dict(self) -> dict[str, Tensor]:
        """Means, and which classes have one."""
        return {"means": self.means, "known": self.known}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.means, self.known = state["means"].cpu(), state["known"].cpu()
