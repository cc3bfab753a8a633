"""Flower's grid within one process: the same apps as everywhere, without another process.

Flower sets the numbers of messages and of the running task in parts that it does not call public;
they are touched here alone, and another version than those that were tried is refused.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from vestige.errors import MissingExtraError

_TRIED = (Version("1.41"), Version("1.43"))
_SERVER = 1


def check_flower() -> None:
    """Refuse a Flower whose inner parts nobody tried.

    Raises:
        MissingExtraError: of that version, or none.
    """
    try:
        found = Version(version("flwr"))
    except ImportError as error:
        raise MissingExtraError(
            "federated methods need Flower; pip install 'vestige[federated]'"
        ) from error
    low, high = _TRIED
    if not low <= found < high:
        raise MissingExtraError(
            f"got flwr {found}, expected {low} or newer and below {high}, with which the grid in "
            "one process was tried; pip install 'vestige[federated]' or take engine: ray"
        )


@contextmanager
def in_process(app: Callable[[Any, Any], Any], count: int) -> Iterator[Any]:
    """A grid whose `count` nodes call `app` one after another, in this process.

    Args:
        app: a ClientApp.
        count: nodes; node i + 1 is partition i. As if they ran at one time, each has the whole
            timeout; it is not broken off, but an answer that took longer does not come.
    """
    check_flower()
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, _SERVER
    numbers = itertools.count(1)

    class InProcessGrid(Grid):  # type: ignore[misc]
        """Nodes answer when they are asked."""

        def __init__(self) -> None:
            self.contexts: dict[int, Context] = {}
            self.waiting: dict[str, Message] = {}

        def set_run(self, run: Any) -> None:
            raise NotImplementedError("one process holds one run")

        @property
        def run(self) -> Any:
            raise NotImplementedError("one process holds one run")

        def create_message(self, *given: Any, **named: Any) -> Message:
            return Message(*given, **named)

        def get_node_ids(self) -> Iterable[int]:
            return range(1, count + 1)

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            known = []
            for message in messages:
                number = str(next(numbers))
                message.metadata.__dict__["_message_id"] = number
                self.waiting[number] = message
                known.append(number)
            return known

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [self._answer(self.waiting.pop(number)) for number in message_ids]

        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            replies = []
            for number in self.push_messages(messages):
                began = time.perf_counter()
                reply = self._answer(self.waiting.pop(number))
                if timeout is None or time.perf_counter() - began <= timeout:
                    replies.append(reply)
            return replies

        def _answer(self, message: Message) -> Message:
            node = message.metadata.dst_node_id
            if node not in self.contexts:
                config = {"partition-id": node - 1, "num-partitions": count}
                self.contexts[node] = Context(1, node, config, RecordDict(), {})
            try:
                return app(message, self.contexts[node])
            except Exception as error:
                # As Flower does it: whatever an app raises is the answer of its node.
                reason = f"{type(error).__name__}: {error}"
                return Message(Error(code=0, reason=reason), reply_to=message)

    yield InProcessGrid()
