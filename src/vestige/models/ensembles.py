"""Several networks of one form that answer together."""

import copy

import torch
from torch import Tensor, nn

from vestige.core.federation import Arrays
from vestige.core.types import predict


class MemberEnsemble(nn.Module):
    """N networks of one form, some of which were never filled in and have no say.

    As long as none is filled in, all of them speak, and they are the network they were copied from.

    Attributes:
        members: N copies.
        filled: (N,), bool; which of them have weights of their own.
    """

    filled: Tensor

    def __init__(self, network: nn.Module, count: int) -> None:
        """Copies the network.

        Args:
            network: gives the form.
            count: N, at least 1. Memory and time of a forward grow with it.
        """
        super().__init__()
        copies = [copy.deepcopy(network).requires_grad_(False).eval() for _ in range(count)]
        self.members = nn.ModuleList(copies)
        self.register_buffer("filled", torch.zeros(count, dtype=torch.bool))

    def fill(self, index: int, state: Arrays) -> None:
        """Give one network new weights; what `state` does not have stays."""
        self.members[index].load_state_dict(dict(state), strict=False)
        self.filled[index] = True

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (B, ...) to the sum of the members' logits, (B, K)."""
        who = self.filled.nonzero().flatten().tolist() or range(len(self.members))
        logits = [predict(self.members[index], inputs).logits for index in who]
        return torch.stack(logits).sum(0)
