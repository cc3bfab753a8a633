"""All clients of a run as its method sees them, on an engine that carries messages."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from vestige.core.federation import Client, ClientUpdate, Federated, Payload, Settings, Shapes
from vestige.core.types import Inputs
from vestige.errors import ContractError
from vestige.federated.apps import EVALUATE, JUDGED, ClientHost, LoadData, client_app
from vestige.federated.roster import Asked, Exchange, Roster
from vestige.federated.states import ClientStates


class Engine(Protocol):
    """Opens Flower's grid for a client app and a number of nodes."""

    def __call__(self, app: Any, count: int, /) -> AbstractContextManager[Any]: ...


class Federation(Roster):
    """The `Clients` of `core.federation` on a grid of Flower.

    Args:
        name: what is shown to the user.
        count: N, all clients.
        num_classes: C.
        engine: opens the grid.
        load_data: gives one client's examples, at the client.
        states: what clients keep.
        seed: of the run.
        timeout_s: that clients have for an answer; None waits for all of them.
        least: valid answers that make a round.
        device: where clients compute.
        waiting: entered while other processes are waited for.
    """

    origin = "client-private"

    def __init__(
        self,
        name: str,
        count: int,
        num_classes: int,
        *,
        engine: Engine,
        load_data: LoadData,
        states: ClientStates,
        seed: int,
        timeout_s: float | None = None,
        least: int = 1,
        device: str = "cpu",
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        super().__init__(count, num_classes, seed=seed, least=least)
        self.name, self.engine, self.load_data, self.states = name, engine, load_data, states
        self.timeout_s, self.device = timeout_s, device
        self.waiting = waiting
        # Clients of one process with the server read their own states while it runs.
        self.paths: tuple[Path, ...] = (states.folder,)
        self._grid: Any = None
        self._turn = (-1, -1)

    def draw(self, count: int, rng: torch.Generator) -> Inputs:
        """No input ever comes from a client.

        Raises:
            ContractError: always.
        """
        raise ContractError(
            f"got a request for {count} inputs of clients, whose data stays with them; ask for "
            "what their networks learned"
        )

    @contextmanager
    def opened(self, method: Federated) -> Iterator[None]:
        """Start the engine with the client's half of `method`, and meet the clients."""
        with self._serving(method.client):
            yield

    @contextmanager
    def _serving(self, client: Client) -> Iterator[None]:
        host = ClientHost(client, self.load_data, self.states, device=self.device)
        with self.engine(client_app(host), self.count) as grid:
            self._grid = grid
            try:
                self._meet()
                yield
            finally:
                self._grid = None
                self.forget()

    def ask(
        self,
        kind: str,
        round: int,
        partitions: Sequence[int],
        arrays: Payload,
        settings: Settings | None = None,
        *,
        expects: Shapes,
        each: Mapping[int, Payload] | None = None,
    ) -> list[ClientUpdate]:
        """Ask clients and wait for those that answer in time; see `core.federation.Clients`."""
        self._meet()
        last, turn = self._turn
        self._turn = (round, turn + 1 if round == last else 0)
        asked = self.written(
            Exchange(round, kind, len(partitions)),
            "train",
            partitions,
            arrays,
            settings or {},
            expects=expects,
            each=each,
            turn=self._turn[1],
        )
        return self.closed(asked, self._answers(asked))

    def judge(self, method: Federated, partitions: Sequence[int]) -> list[ClientUpdate]:
        """Let clients test the network that each would use now on its own held-out part.

        Args:
            method: says what they are sent.
            partitions: whom.

        Returns:
            Updates with the metrics "accuracy" and "balanced_accuracy", and the number of test
            examples; those without a held-out part are not among them.
        """
        self._meet()
        arrays, settings = method.offer()
        # Behind all that was asked, in whichever loop of the method, so that a client finds what it
        # kept the last time.
        round = self.exchanges[-1].round + 1 if self.exchanges else 0
        exchange = Exchange(round, EVALUATE, len(partitions))
        asked = self.written(
            exchange, "evaluate", partitions, arrays, settings, expects={}, numbers=JUDGED
        )
        updates = self._answers(asked)
        self.note(EVALUATE, updates)
        return updates

    def _answers(self, asked: Asked) -> list[ClientUpdate]:
        with self.waiting():
            replies = list(self._grid.send_and_receive(asked.messages, timeout=self.timeout_s))
        return self.read(asked, replies)

    def _meet(self) -> None:
        if self._grid is None:
            raise ContractError("clients were asked before the federation was opened")
        with self.waiting():
            self.meet(self._grid, self.timeout_s)
