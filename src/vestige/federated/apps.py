"""The client's side of Flower: its data, its state, and what a method wants of it."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vestige.core import seeding
from vestige.core.federation import Answer, Ask, Client, ClientData, Payload
from vestige.core.modes import evaluating
from vestige.core.types import predict
from vestige.errors import DataError, RejectedUpdateError
from vestige.federated import records
from vestige.federated.states import ClientStates

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp

logger = logging.getLogger(__name__)

EVALUATE, JOIN = "evaluate", "join"
# What a client says of a network on its own test examples, and the largest that each can be.
JUDGED = {"accuracy": 1.0, "balanced_accuracy": 1.0}
# The data of one client, from its number and the number of all.
LoadData = Callable[[int, int], ClientData]
# Of each client that lives in this process, by number, number of all and device: its data, and what
# gave it.
_OPENED: dict[tuple[int, int, str], tuple[LoadData, ClientData]] = {}


class ClientHost:
    """Answers what the server asks, for whichever client it is told to be.

    It is sent to other processes, so it holds no data: `load_data` opens that where it is wanted,
    once in each process.

    Args:
        client: of the method.
        load_data: gives a client's examples.
        states: what clients keep.
        device: where clients compute.
    """

    def __init__(
        self, client: Client, load_data: LoadData, states: ClientStates, *, device: str = "cpu"
    ) -> None:
        self.client, self.load_data = client, load_data
        self.states, self.device = states, device

    def answer(self, content: "RecordDict", partition: int, count: int) -> "RecordDict":
        """The answer to one record, or a refusal that says why.

        Args:
            content: as `records.write_ask` made it.
            partition: number of this client.
            count: of all clients.
        """
        kind = ""
        try:
            ask, turn = records.read_ask(content, partition, self.device)
            kind = ask.kind
            data = self._data(partition, count)
            before = (ask.round, turn)
            if kind == JOIN:
                joined = Answer({}, 1, metrics={"holds": len(data)})
                return records.write_answer(ask, joined)
            state = self.states.load(partition, before)
            with seeding.seeded(ask.seed, "client"):
                if kind == EVALUATE:
                    answer = self._judged(ask, data, state)
                elif len(data) == 0:
                    raise RejectedUpdateError("no examples")
                else:
                    answer = self.client.answer(ask, data, state)
            if answer.state is not None and answer.state:
                self.states.save(partition, before, answer.state)
            return records.write_answer(ask, answer)
        except RejectedUpdateError as error:
            reason, detail = error.reason, error.detail
        except Exception as error:
            reason, detail = f"{type(error).__name__} at the client", str(error)
        # What is wrong in detail may name files or values of the data, so it stays here.
        logger.warning("client %d refused: %s (%s)", partition, reason, detail)
        return records.write_refusal(kind, partition, reason)

    def _data(self, partition: int, count: int) -> ClientData:
        return _opened(self.load_data, partition, count, self.device)

    def _judged(self, ask: Ask, data: ClientData, state: Payload) -> Answer:
        if len(data.test_labels) == 0:
            raise RejectedUpdateError("no test examples")
        network = self.client.judged(ask, state)
        right = by_class(network, data.test_inputs, data.test_labels, data.num_classes)
        held = torch.bincount(data.test_labels.cpu(), minlength=data.num_classes)
        known = held > 0
        scores = {
            "accuracy": float(right.sum() / held.sum()),
            "balanced_accuracy": float((right[known] / held[known]).mean()),
        }
        return Answer({}, len(data.test_labels), metrics=scores)


def client_app(host: ClientHost) -> "ClientApp":
    """A Flower app around `host`; the client's number comes from the node's configuration."""
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    app = ClientApp()

    def answer(message: "Message", context: "Context") -> "Message":
        config = context.node_config
        content = host.answer(
            message.content, int(config["partition-id"]), int(config["num-partitions"])
        )
        return Message(content=content, reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)
    app.query()(answer)
    return app


@torch.no_grad()
def by_class(network: nn.Module, inputs: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Right answers of each class, (C,), int64, on the CPU; `network` is judged in eval mode."""
    right = torch.zeros(num_classes, dtype=torch.int64)
    with evaluating(network):
        for rows, wanted in zip(inputs.split(1024), labels.split(1024), strict=True):
            hit = predict(network, rows).logits.argmax(1) == wanted
            right += torch.bincount(wanted[hit].cpu(), minlength=num_classes)
    return right


def checked(data: ClientData) -> ClientData:
    """The same data, if it fits together.

    Raises:
        RejectedUpdateError: labels lie outside of the classes, or are not as many as the inputs.
    """
    for inputs, labels in ((data.inputs, data.labels), (data.test_inputs, data.test_labels)):
        if labels.dim() != 1 or len(inputs) != len(labels):
            raise RejectedUpdateError(
                "labels that do not fit the inputs", f"{tuple(labels.shape)} for {len(inputs)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < data.num_classes:
            raise RejectedUpdateError(
                "labels outside the range",
                f"{int(labels.min())} to {int(labels.max())}, expected 0 to {data.num_classes - 1}",
            )
        if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
            raise RejectedUpdateError("inputs that are not finite")
    return data


def _opened(load_data: LoadData, partition: int, count: int, device: str) -> ClientData:
    """The data of a client, checked, on its device; opened once in a process."""
    key = (partition, count, device)
    if key in _OPENED:
        giver, data = _OPENED[key]
        # By equality: each message brings a copy, which need not be hashable.
        if giver is load_data or giver == load_data:
            return data
    try:
        data = checked(load_data(partition, count))
    except (OSError, DataError) as error:
        raise RejectedUpdateError("data that cannot be opened", str(error)) from error
    moved: Mapping[str, Any] = {
        name: getattr(data, name).to(device)
        for name in ("inputs", "labels", "test_inputs", "test_labels")
    }
    data = replace(data, **moved)
    _OPENED[key] = load_data, data
    return data
