"""Real clients on Flower's deployment runtime: the server's grid, and where a client keeps things.

Here the server does not start its clients. They connect when they like, each with its own number,
and what they run comes with the app.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from vestige.errors import ProcessError

Aside = Callable[[], AbstractContextManager[Any]]


class ServerGrid:
    """Flower's grid as a run uses it.

    Args:
        grid: that Flower gave to the server app.
        aside: around all that Flower does, since a run watches which files are opened meanwhile.
    """

    def __init__(self, grid: Any, aside: Aside = nullcontext) -> None:
        self.grid, self.aside = grid, aside

    def get_node_ids(self) -> list[int]:
        """Nodes that are connected."""
        with self.aside():
            return list(self.grid.get_node_ids())

    def send_and_receive(
        self, messages: Iterable[Any], *, timeout: float | None = None
    ) -> Iterable[Any]:
        """Send and wait for the answers."""
        with self.aside():
            return list(self.grid.send_and_receive(messages, timeout=timeout))


@contextmanager
def on_nodes(
    app: Any, count: int, *, grid: ServerGrid, wait_s: float, least: int
) -> Iterator[ServerGrid]:
    """The grid once all clients are connected, or, after `wait_s`, enough of them.

    Args:
        app: of the clients; they have it already.
        count: of clients.
        grid: that Flower gave to the server app.
        wait_s: seconds that clients have to connect.
        least: how many are enough.

    Raises:
        ProcessError: fewer came.
    """
    until = time.monotonic() + wait_s
    while (there := len(grid.get_node_ids())) < count and time.monotonic() < until:
        time.sleep(0.5)
    if there < least:
        raise ProcessError(
            f"got {there} connected clients after {wait_s:g} s, expected {count} and at least "
            f"{least}; start flower-supernode at the others, or see why they are refused there"
        )
    yield grid


def states_folder(chosen: str) -> Path:
    """Where a client keeps what its method wants to find again in the next round.

    Args:
        chosen: by the site; "" takes $VESTIGE_CACHE/clients, else vestige/clients in the user's
            cache folder.
    """
    if chosen:
        return Path(chosen).expanduser()
    if own := os.environ.get("VESTIGE_CACHE"):
        return Path(own).expanduser() / "clients"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vestige" / "clients"
