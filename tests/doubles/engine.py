"""A federation on the grid of one process, with nodes and messages that can go wrong."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vestige.core.federation import Answer, Ask, ClientData, ClientUpdate, Payload, sent
from vestige.core.types import InputSpec
from vestige.federated.federation import Federation
from vestige.federated.grid import in_process
from vestige.federated.states import ClientStates
from vestige.models.factory import build_model

SPEC, CLASSES = InputSpec.image(1, 8, 8), 3
# What a node does instead: from the message and what its app would say.
Wrong = Callable[[Any, Callable[[], Any]], Any]
# What becomes of the replies of one sending on their way back.
Carried = Callable[[list[Any], list[Any]], list[Any]]


@dataclass(eq=False)
class Held:
    """Gives each client what it holds; no two of them are equal."""

    parts: Sequence[ClientData]

    def __call__(self, partition: int, count: int) -> ClientData:
        return self.parts[partition]


class Adding:
    """A client that adds 1 to all that it is sent, so that it is known what comes back."""

    def answer(self, ask: Ask, data: ClientData, state: Payload) -> Answer:
        model = {name: value + 1 for name, value in ask.arrays["model"].items()}
        return Answer({"model": model}, len(data), data.counts(), {"loss": 1.0})

    def judged(self, ask: Ask, state: Payload) -> nn.Module:
        raise NotImplementedError


def tiny_network(seed: int = 0, name: str = "convnet") -> nn.Module:
    """Some hundred weights with BatchNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(name, SPEC, CLASSES, widths=[4, 8])


def engine(
    wrong: Mapping[int, Wrong] | None = None, carried: Carried = lambda sent, replies: replies
) -> Callable[[Any, int], AbstractContextManager[Any]]:
    """`in_process` with misbehaving nodes by partition, and a misbehaving network."""

    @contextmanager
    def opened(app: Any, count: int) -> Iterator[Any]:
        def node(message: Any, context: Any) -> Any:
            does = (wrong or {}).get(int(context.node_config["partition-id"]))
            # At the door everybody behaves.
            if does is None or message.metadata.message_type == "query":
                return app(message, context)
            return does(message, lambda: app(message, context))

        with in_process(node, count) as grid:
            plain = grid.send_and_receive

            def send_and_receive(messages: Any, *, timeout: float | None = None) -> list[Any]:
                messages = list(messages)
                return carried(messages, list(plain(messages, timeout=timeout)))

            grid.send_and_receive = send_and_receive
            yield grid

    return opened


def federation(parts: Sequence[ClientData], folder: Path, **given: Any) -> Federation:
    """All clients of `parts` on the grid of one process."""
    settings = {
        "engine": in_process,
        "load_data": Held(parts),
        "states": ClientStates(folder / "clients", keep=100),
        "seed": 0,
        **given,
    }
    return Federation("test", len(parts), CLASSES, **settings)


def asked(clients: Federation, network: nn.Module, round: int = 0) -> list[ClientUpdate]:
    """What all clients answer when they are sent a network."""
    model = sent(network.state_dict())
    expects = {"model": {name: tuple(value.shape) for name, value in model.items()}}
    return clients.ask("train", round, range(clients.count), {"model": model}, {}, expects=expects)
