"""Many networks of one form on one batch, and what the clients of a round teach with them."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from vestige.core.federation import Arrays, ClientUpdate
from vestige.core.types import predict
from vestige.federated.labels import class_shares, label_prior, quota_labels, uniform_labels
from vestige.losses.federated import ensemble_probabilities

logger = logging.getLogger(__name__)


class StackedNetworks:
    """Networks of one form, frozen and in eval mode, called together.

    Args:
        network: gives the form; copied, never changed.
        states: of each network; what one lacks (statistics that stay with a client) is the form's.
        chunk: networks that are computed at once, at least 1. More are faster on a GPU and take
            more memory. Networks that torch cannot batch, such as those with a GRU, are called one
            after another.
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
                lambda x: torch.func.functional_call(
                    self.form, dict(state), (x,), tie_weights=False
                ),
                inputs,
            ).logits

        rows = slice(members.start, members.stop)
        state = {name: value[rows] for name, value in self.state.items()}
        if len(members) == 1:
            return answer({name: value[0] for name, value in state.items()})[None]
        try:
            logits: Tensor = torch.func.vmap(answer)(state)
        except RuntimeError as error:
            said = str(error).partition(". ")[0]
            logger.info("networks of clients are called one after another: %s", said)
            self.chunk = 1
            return self(inputs, members)
        return logits


@dataclass(frozen=True)
class ClientEnsemble:
    """The networks that clients sent, and how much the word of each counts for each class.

    Attributes:
        networks: of K clients.
        shares: a_k(y), (K, C); columns sum to 1, or to 0 where no client has the class.
        prior: share of each class in the clients' examples, (C,).
    """

    networks: StackedNetworks
    shares: Tensor
    prior: Tensor

    @classmethod
    def of(
        cls,
        updates: Sequence[ClientUpdate],
        form: nn.Module,
        *,
        by_counts: bool = True,
        chunk: int,
        device: torch.device | str,
    ) -> Self:
        """From what the clients of a round sent.

        Args:
            updates: with "model" among the arrays, and with counts of classes.
            form: gives the networks' form, and statistics that a client kept to itself.
            by_counts: shares by the counts, eq. 9 of FedFTG; else 1 / K each.
            chunk: as in `StackedNetworks`.
            device: where it is to be.
        """
        states = [update.arrays["model"] for update in updates]
        counts = torch.stack([update.counts for update in updates])
        shares = class_shares(counts)
        return cls(
            StackedNetworks(form, states, chunk=chunk, device=device),
            (shares if by_counts else torch.full_like(shares, 1 / len(shares))).to(device),
            label_prior(counts).to(device),
        )

    def turns(self, *, one_by_one: bool) -> list[range]:
        """All members together, or each by itself."""
        everybody = range(self.networks.count)
        return [everybody[k : k + 1] for k in everybody] if one_by_one else [everybody]

    def labels(self, count: int, rng: torch.Generator, *, by_counts: bool = True) -> Tensor:
        """Classes that the clients have, (count,), as often as they have them or evenly."""
        drawn = (
            quota_labels(self.prior, count, rng)
            if by_counts
            else uniform_labels(self.prior > 0, count, rng)
        )
        return drawn.to(self.prior.device)

    def probabilities(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """What they say together, (B, C): each about the inputs made for classes that it has."""
        return ensemble_probabilities(self.networks(inputs), self.shares[:, labels])
