"""Who the clients of a grid are, what they were asked and what they said; the same for each engine.

`Federation` and `strategy` stand on it: how messages get to clients and back is theirs.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vestige.core import seeding
from vestige.core.federation import ClientUpdate, Payload, Settings, Shapes
from vestige.errors import ProcessError, RejectedUpdateError
from vestige.federated import records
from vestige.federated.apps import JOIN
from vestige.federated.records import Expected

logger = logging.getLogger(__name__)


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


@dataclass
class Asked:
    """One asking whose answers are waited for.

    Attributes:
        exchange: for the record of the run.
        messages: to send.
        message_type: Flower's, "train" or "evaluate".
        nodes: whom, partition by node.
        arrays: the same for each of them.
        expects: as of `Clients.ask`.
        numbers: metrics that must be there, each from 0 to what is given.
        rejected: by reason, so far.
        began: when, by a clock that only goes on.
    """

    exchange: Exchange
    messages: list[Any]
    message_type: str
    nodes: dict[int, int]
    arrays: Payload
    expects: Shapes
    numbers: Mapping[str, float]
    rejected: Counter[str]
    began: float


class Roster:
    """Clients by number, with the record of what was asked of them.

    Args:
        count: N, all clients.
        num_classes: C.
        seed: of the run.
        least: valid answers that make a round.
    """

    def __init__(self, count: int, num_classes: int, *, seed: int, least: int) -> None:
        self.count, self.num_classes, self.seed, self.least = count, num_classes, seed, least
        self.exchanges: list[Exchange] = []
        # What leaves clients: by kind and group, the number of arrays and their bytes.
        self.leaves: dict[str, dict[str, Any]] = {}
        self.numbers: set[str] = set()
        self.holds: dict[int, int] = {}
        self.nodes: dict[int, int] = {}
        self._strange: set[int] = set()

    def sizes(self) -> Tensor:
        """Examples that each client says it has, (N,), int64; 0 of those that were never met."""
        return torch.tensor([self.holds.get(number, 0) for number in range(self.count)])

    def sample(self, count: int, rng: torch.Generator) -> list[int]:
        """`count` clients without replacement, uniformly, in ascending order; at most all."""
        order = torch.randperm(self.count, generator=rng, device=rng.device)
        return sorted(order[:count].tolist())

    def written(
        self,
        exchange: Exchange,
        message_type: str,
        partitions: Sequence[int],
        arrays: Payload,
        settings: Settings,
        *,
        expects: Shapes,
        each: Mapping[int, Payload] | None = None,
        turn: int = 0,
        numbers: Mapping[str, float] | None = None,
    ) -> Asked:
        """The messages of one asking.

        Args:
            exchange: its round and kind; what becomes of it is noted there.
            message_type: Flower's.
            partitions: whom.
            arrays: as of `Clients.ask`.
            settings: likewise.
            expects: likewise.
            each: likewise.
            turn: the how manieth asking of this round, from 0.
            numbers: metrics that must come back, each from 0 to what is given.
        """
        from flwr.app import Message, RecordDict

        asked = Asked(
            exchange,
            [],
            message_type,
            {},
            arrays,
            expects,
            numbers or {},
            Counter(),
            time.perf_counter(),
        )
        common = {group: records.array_record(values) for group, values in arrays.items()}
        # Counted once: it is the same for every client.
        weight = records.size_of(RecordDict(common)) if common else 0
        for partition in partitions:
            node = self.nodes.get(partition)
            if node is None:
                asked.rejected["not connected"] += 1
                continue
            seed = seeding.derive(self.seed, f"client {partition}/{exchange.round}/{exchange.kind}")
            own = (each or {}).get(partition, {})
            content = records.write_ask(exchange.kind, exchange.round, turn, seed, own, settings)
            exchange.bytes_down += weight + records.size_of(content)
            for group, record in common.items():
                content[group] = record
            asked.nodes[node] = partition
            asked.messages.append(
                Message(
                    content=content,
                    dst_node_id=node,
                    message_type=message_type,
                    group_id=str(exchange.round),
                )
            )
        return asked

    def read(self, asked: Asked, replies: Iterable[Any]) -> list[ClientUpdate]:
        """The valid answers in ascending order of partition.

        Of a client that answers twice the first answer counts, valid or not; each further one is
        rejected.
        """
        exchange, rejected = asked.exchange, asked.rejected
        updates: dict[int, ClientUpdate] = {}
        silent = set(asked.nodes.values())
        for reply in replies:
            partition = asked.nodes.get(reply.metadata.src_node_id, -1)
            try:
                if partition < 0:
                    raise RejectedUpdateError("nobody asked")
                if partition not in silent:
                    raise RejectedUpdateError("answered twice", f"client {partition}")
                silent.discard(partition)
                if reply.has_error():
                    raise RejectedUpdateError("failed", f"client {partition}: {reply.error.reason}")
                exchange.bytes_up += records.size_of(reply.content)
                expected = Expected(
                    exchange.kind,
                    exchange.round,
                    partition,
                    asked.expects,
                    asked.arrays,
                    asked.numbers,
                    # Of its own test examples the server knows nothing.
                    self.holds.get(partition) if asked.message_type == "train" else None,
                )
                updates[partition] = records.read_answer(reply.content, expected, self.num_classes)
            except RejectedUpdateError as error:
                rejected[error.reason] += 1
                logger.info("round %d, client %d: %s", exchange.round + 1, partition, error)
        rejected.update({"no answer in time": len(silent)} if silent else {})
        exchange.rejected = dict(sorted(rejected.items()))
        exchange.seconds = time.perf_counter() - asked.began
        return [updates[partition] for partition in sorted(updates)]

    def closed(self, asked: Asked, updates: list[ClientUpdate]) -> list[ClientUpdate]:
        """Enter a training exchange into the record; none of its answers where it is void."""
        exchange = asked.exchange
        self.exchanges.append(exchange)
        exchange.answered, exchange.void = len(updates), len(updates) < self.least
        if not exchange.void:
            self.note(exchange.kind, updates)
            return updates
        logger.warning(
            "round %d is void: %d of %d clients gave a valid answer, %d are needed (%s); the "
            "global network stays as it was",
            exchange.round + 1,
            len(updates),
            exchange.asked,
            self.least,
            ", ".join(f"{reason} {n}" for reason, n in exchange.rejected.items()) or "none",
        )
        return []

    def meet(self, grid: Any, timeout_s: float | None) -> None:
        """Ask nodes that are new for their number; those that left are forgotten."""
        from flwr.app import Message

        present = set(grid.get_node_ids())
        stayed = {number: node for number, node in self.nodes.items() if node in present}
        if len(stayed) < len(self.nodes):
            # Who came with a number that was taken may have it now.
            self._strange.clear()
        self.nodes = stayed
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
        refused: Counter[str] = Counter()
        first = ""
        for reply in grid.send_and_receive(messages, timeout=timeout_s):
            node = reply.metadata.src_node_id
            try:
                if node not in new:
                    raise RejectedUpdateError("nobody asked")
                self._let_in(node, reply)
            except RejectedUpdateError as error:
                self._strange.add(node)
                refused[error.reason] += 1
                first = first or str(error).splitlines()[-1]
                logger.info("node %d was not let in: %s", node, error)
        told = ", ".join(f"{reason} {number}" for reason, number in refused.items())
        if refused:
            logger.warning("%d of %d nodes were not let in: %s", refused.total(), len(new), told)
        if not self.nodes:
            raise ProcessError(
                f"got {len(new)} nodes and none of them could be used ({told or 'no answer'}), "
                f"expected {self.count} clients; the first said: {first or 'nothing'}"
            )

    def _let_in(self, node: int, reply: Any) -> None:
        if reply.has_error():
            raise RejectedUpdateError("failed", reply.error.reason)
        number = records.partition_of(reply.content)
        expected = Expected(JOIN, 0, number, numbers={"holds": records.MOST})
        holds = records.read_answer(reply.content, expected, self.num_classes).metrics["holds"]
        if not 0 <= number < self.count or self.nodes.get(number, node) != node:
            raise RejectedUpdateError(
                "another client's number", f"{number} of {self.count}, or taken already"
            )
        if holds % 1:
            raise RejectedUpdateError("examples that cannot be", f"{holds:g}")
        self.nodes[number], self.holds[number] = node, int(holds)

    def forget(self) -> None:
        """Forget nodes: the grid is closed."""
        self.nodes.clear()
        self._strange.clear()

    def note(self, kind: str, updates: Sequence[ClientUpdate]) -> None:
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
