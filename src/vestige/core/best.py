"""The best state of a network so far."""

from collections.abc import Mapping
from typing import Any

from torch import nn


class KeptBest:
    """A copy of a network's state, replaced when a better one is offered.

    Attributes:
        stale: offers in a row that were not better.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was kept."""
        self.stale = 0
        self._score: tuple[float, ...] | None = None
        self._state: dict[str, Any] = {}

    def offer(self, network: nn.Module, score: tuple[float, ...]) -> None:
        """Keep the state of `network` if its score is higher than all before.

        Args:
            network: is copied.
            score: compared value by value; () says nothing and always counts as better.
        """
        if self._score is not None and score and score <= self._score:
            self.stale += 1
            return
        self.stale, self._score = 0, score
        self._state = {name: one.detach().clone() for name, one in network.state_dict().items()}

    def restore(self, network: nn.Module) -> None:
        """Put the kept state into `network`; nothing where none was kept."""
        if self._state:
            network.load_state_dict(self._state)

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        score = None if self._score is None else list(self._score)
        return {"stale": self.stale, "score": score, "state": dict(self._state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.stale = int(state["stale"])
        self._score = None if state["score"] is None else tuple(state["score"])
        self._state = dict(state["state"])
