"""All clients of a run as its method sees them: whom to ask, what came back, what was refused."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vestige.core import seeding
from vestige.core.federation import (
    Client,
    ClientUpdate,
    Federated,
    Payload,
    Settings,
    Shapes,
)
from vestige.core.types import Inputs
from vestige.errors import ContractError, ProcessError, RejectedUpdateError
from vestige.federated import records
from vestige.federated.apps import EVALUATE, JOIN, ClientHost, LoadData, client_app
from vestige.federated.states import ClientStates

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Opens Flower's grid for a client app and a number of nodes."""

    def __call__(self, app: Any, count: int, /) -> AbstractContextManager[Any]: ...


@dataclass
class Exchange:
    """One asking of clients, for the record of the run.

    Attributes:
        round: from 0.
        kind: of the ask.
        asked: clients that were asked.
        answered: whose answers were valid.
        rejected: how many by reason; those that did not answer in time are among them.
        void: whether there were too few.
        bytes_down: to all clients.
        bytes_up: from all clients, what was rejected included.
        seconds: from the first byte to the last answer.
    """

    round: int
    kind: str
    asked: int
    answered: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    void: bool = False
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0


class Federation:
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
        self.waiting = waiting
        self.name, self.count, self.num_classes = name, count, num_classes
        self.engine, self.load_data, self.states = engine, load_data, states
        self.seed, self.timeout_s, self.least, self.device = seed, timeout_s, least, device
        # Clients of one process with the server read their own states while it runs.
        self.paths: tuple[Path, ...] = (states.folder,)
        self.exchanges: list[Exchange] = []
        # What leaves clients: by kind and group, the number of arrays and their bytes.
        self.leaves: dict[str, dict[str, Any]] = {}
        self.numbers: set[str] = set()
        self.holds: dict[int, int] = {}
        self.nodes: dict[int, int] = {}
        self._strange: set[int] = set()
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
                self.nodes.clear()
                self._strange.clear()

    def sizes(self) -> Tensor:
        """Examples that each client says it has, (N,), int64; 0 of those that were never met."""
        return torch.tensor([self.holds.get(number, 0) for number in range(self.count)])

    def sample(self, count: int, rng: torch.Generator) -> list[int]:
        """`count` clients without replacement, uniformly, in ascending order."""
        order = torch.randperm(self.count, generator=rng, device=rng.device)
        return sorted(order[:count].tolist())

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
        exchange = Exchange(round, kind, len(partitions))
        updates = self._exchange(
            exchange, "train", partitions, arrays, settings or {}, each or {}, expects
        )
        self.exchanges.append(exchange)
        exchange.answered = len(updates)
        exchange.void = len(updates) < self.least
        if exchange.void:
            logger.warning(
                "round %d is void: %d of %d clients gave a valid answer, %d are needed (%s); the "
                "global network stays as it was",
                round + 1,
                len(updates),
                len(partitions),
                self.least,
                ", ".join(f"{reason} {n}" for reason, n in exchange.rejected.items()) or "none",
            )
            return []
        self._note(kind, updates)
        return updates

    def judge(self, method: Federated, round: int, partitions: Sequence[int]) -> list[ClientUpdate]:
        """Let clients test the network that each would use now on its own held-out part.

        Args:
            method: says what they are sent.
            round: number of rounds that are over.
            partitions: whom.

        Returns:
            Updates with the metrics "accuracy" and "balanced_accuracy", and the number of test
            examples; those without a held-out part are not among them.
        """
        self._meet()
        arrays, settings = method.offer()
        self._turn = (round, -1)
        exchange = Exchange(round, EVALUATE, len(partitions))
        return self._exchange(exchange, "evaluate", partitions, arrays, settings, {}, {})

    def _exchange(
        self,
        exchange: Exchange,
        message_type: str,
        partitions: Sequence[int],
        arrays: Payload,
        settings: Settings,
        each: Mapping[int, Payload],
        expects: Shapes,
    ) -> list[ClientUpdate]:
        from flwr.app import Message, RecordDict

        if self._grid is None:
            raise ContractError("clients were asked before the federation was opened")
        began, messages, down = time.perf_counter(), [], 0
        common = {group: records.array_record(values) for group, values in arrays.items()}
        # Counted once: it is the same for every client.
        weight = records.size_of(RecordDict(common)) if common else 0
        rejected: Counter[str] = Counter()
        asked: dict[int, int] = {}
        for partition in partitions:
            node = self.nodes.get(partition)
            if node is None:
                rejected["not connected"] += 1
                continue
            seed = seeding.derive(self.seed, f"client {partition}/{exchange.round}/{exchange.kind}")
            own = each.get(partition, {})
            content = records.write_ask(
                exchange.kind, exchange.round, max(0, self._turn[1]), seed, own, settings
            )
            down += weight + records.size_of(content)
            for group, record in common.items():
                content[group] = record
            asked[node] = partition
            messages.append(
                Message(
                    content=content,
                    dst_node_id=node,
                    message_type=message_type,
                    group_id=str(exchange.round),
                )
            )
        with self.waiting():
            replies = list(self._grid.send_and_receive(messages, timeout=self.timeout_s))
        updates: dict[int, ClientUpdate] = {}
        silent = set(asked.values())
        for reply in replies:
            partition = asked.get(reply.metadata.src_node_id, -1)
            try:
                if partition < 0:
                    raise RejectedUpdateError("nobody asked")
                if partition not in silent:
                    # Neither can be told to be the right one, but the first was sound.
                    raise RejectedUpdateError("answered twice", f"client {partition}")
                silent.discard(partition)
                if reply.has_error():
                    raise RejectedUpdateError("failed", f"client {partition}: {reply.error.reason}")
                exchange.bytes_up += records.size_of(reply.content)
                updates[partition] = records.read_answer(
                    reply.content, exchange.kind, partition, expects, self.num_classes
                )
            except RejectedUpdateError as error:
                rejected[error.reason] += 1
                logger.info("round %d, client %d: %s", exchange.round + 1, partition, error)
        rejected.update({"no answer in time": len(silent)} if silent else {})
        exchange.rejected = dict(sorted(rejected.items()))
        exchange.bytes_down, exchange.seconds = down, time.perf_counter() - began
        return [updates[partition] for partition in sorted(updates)]

    def _meet(self) -> None:
        """Ask nodes that are new for their number; those that left are forgotten."""
        from flwr.app import Message

        present = set(self._grid.get_node_ids())
        self.nodes = {number: node for number, node in self.nodes.items() if node in present}
        new = sorted(present - set(self.nodes.values()) - self._strange)
        if not new:
            return
        messages = [
            Message(
                content=records.write_ask(JOIN, 0, 0, 0, {}, {}),
                dst_node_id=node,
                message_type="query",
                group_id=JOIN,
            )
            for node in new
        ]
        with self.waiting():
            replies = list(self._grid.send_and_receive(messages, timeout=self.timeout_s))
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                if reply.has_error():
                    raise RejectedUpdateError("failed", reply.error.reason)
                number = int(reply.content.metric_records[records.METRICS]["partition-id"])
                found = records.read_answer(reply.content, JOIN, number, {}, self.num_classes)
                if not 0 <= number < self.count or self.nodes.get(number, node) != node:
                    raise RejectedUpdateError(
                        "another client's number", f"{number} of {self.count}, or taken already"
                    )
                self.nodes[number] = node
                self.holds[number] = int(found.metrics["holds"])
            except (RejectedUpdateError, KeyError) as error:
                self._strange.add(node)
                logger.warning("a node was not let in: %s", error)
        if not self.nodes:
            raise ProcessError(
                f"got {len(new)} nodes and none of them could be used, expected {self.count} "
                "clients; see the warnings above"
            )

    def _note(self, kind: str, updates: Sequence[ClientUpdate]) -> None:
        """What left the clients, once for each kind and group."""
        for update in updates:
            self.numbers.update(update.metrics)
            groups = dict(update.arrays)
            if bool(update.counts.any()):
                groups[records.COUNTS] = {"counts": update.counts}
            for group, values in groups.items():
                size = sum(value.numel() * value.element_size() for value in values.values())
                known = self.leaves.setdefault(
                    f"{kind}/{group}",
                    {"kind": kind, "group": group, "arrays": len(values), "bytes": 0},
                )
                known["bytes"] = max(known["bytes"], size)

    # The record of the run

    def state_dict(self) -> dict[str, Any]:
        """What was asked and what came back so far."""
        return {
            "exchanges": [asdict(one) for one in self.exchanges],
            "leaves": self.leaves,
            "numbers": sorted(self.numbers),
            "holds": {str(number): size for number, size in self.holds.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.exchanges = [Exchange(**one) for one in state["exchanges"]]
        self.leaves, self.numbers = dict(state["leaves"]), set(state["numbers"])
        self.holds = {int(number): size for number, size in state["holds"].items()}
