"""Many networks of one form on one batch."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vestige.core.federation import Arrays
from vestige.core.types import predict


class StackedNetworks:
    """Networks of one form, frozen and in eval mode, called together.

    Args:
        network: gives the form; copied, never changed.
        states: of each network; what one lacks (statistics that stay with a client) is the form's.
        chunk: networks that are computed at once, at least 1. More are faster on a GPU and take
            more memory; 1 calls one after another, also for networks that torch cannot batch.
        device: where they are to be.
    """

    def __init__(
        self,
        network: nn.Module,
        states: Sequence[Arrays],
        *,
        chunk: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.form = copy.deepcopy(network).to(device).eval().requires_grad_(False)
        own = self.form.state_dict()
        full = [{**own, **state} for state in states]
        self.state = {
            name: torch.stack([state[name].detach().to(device) for state in full]) for name in own
        }
        self.count, self.chunk = len(states), chunk

    def __call__(self, inputs: Tensor, members: range | None = None) -> Tensor:
        """Logits (M, B, K) of `members`, all if None; gradient flows to the inputs (B, ...)."""
        chosen = range(self.count) if members is None else members
        parts = [chosen[start : start + self.chunk] for start in range(0, len(chosen), self.chunk)]
        return torch.cat([self._part(inputs, part) for part in parts])

    def _part(self, inputs: Tensor, members: range) -> Tensor:
        def answer(state: Arrays) -> Tensor:
            return predict(
                lambda x: torch.func.functional_call(self.form, dict(state), (x,)), inputs
            ).logits

        rows = slice(members.start, members.stop)
        state = {name: value[rows] for name, value in self.state.items()}
        if len(members) == 1:
            return answer({name: value[0] for name, value in state.items()})[None]
        logits: Tensor = torch.func.vmap(answer)(state)
        return logits
