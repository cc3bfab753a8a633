"""Flower's simulation on Ray, on this machine or on a cluster."""

import logging
import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, Queue
from typing import Any

from vestige.errors import ProcessError

# Flower and Ray tell their makers about every run unless they are told not to.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_POLL_S = 0.01

logger = logging.getLogger(__name__)


def keep_quiet() -> None:
    """Switch reports to the makers of Flower and Ray off, unless somebody switched them on."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


@contextmanager
def on_ray(
    app: Any, count: int, *, client_cpus: float, client_gpus: float, address: str | None
) -> Iterator[Any]:
    """A grid whose nodes are run by Ray's workers.

    Args:
        app: a ClientApp.
        count: virtual nodes.
        client_cpus: cores that one client takes; as many clients run at a time as fit.
        client_gpus: share of a GPU that one client takes.
        address: of a running cluster, or None for workers on this machine.

    Raises:
        ProcessError: the simulation did not start, or broke down.
    """
    keep_quiet()
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    grids: Queue[Any] = Queue()
    failures: Queue[BaseException] = Queue()
    done = threading.Event()

    def main(grid: Any, context: Any) -> None:
        grids.put(grid)
        done.wait()

    server = ServerApp()
    server.main()(main)
    # "local": without an address Ray would join whatever cluster was last started here.
    init: dict[str, Any] = {
        "address": address or "local",
        "log_to_driver": False,
        # They warn that the simulation has a thread of its own, and of what is to come in Flower.
        "logging_level": logging.ERROR,
    }
    if address is None:
        init["include_dashboard"] = False

    def simulate() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run_simulation(
                    server_app=server,
                    client_app=app,
                    num_supernodes=count,
                    backend_config={
                        "client_resources": {"num_cpus": client_cpus, "num_gpus": client_gpus},
                        "init_args": init,
                    },
                )
        except BaseException as error:
            # Of a thread nobody would hear it; it is told where the grid is waited for.
            failures.put(error)
            done.set()

    for name in ("flwr", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logger.info("starting Ray for %d clients, which takes about half a minute", count)
    thread = threading.Thread(target=simulate, name="flower-simulation", daemon=True)
    thread.start()
    try:
        yield _Watched(_waited(grids, failures, thread, count), failures, thread)
    finally:
        done.set()
        thread.join(timeout=60)


class _Watched:
    """A grid that says so when nobody is left who could answer; else everybody would wait for ever.

    Args:
        grid: of Flower.
        failures: gets what ended the simulation.
        thread: that runs it.
    """

    def __init__(
        self, grid: Any, failures: "Queue[BaseException]", thread: threading.Thread
    ) -> None:
        self._grid, self._failures, self._thread = grid, failures, thread

    def get_node_ids(self) -> Iterable[int]:
        """The virtual nodes."""
        found: Iterable[int] = self._grid.get_node_ids()
        return found

    def send_and_receive(
        self, messages: Iterable[Any], *, timeout: float | None = None
    ) -> list[Any]:
        """Replies so far when all are there or the time is over, as of Flower's own grids.

        Raises:
            ProcessError: the simulation broke down.
        """
        waiting = set(self._grid.push_messages(messages))
        ends = None if timeout is None else time.monotonic() + timeout
        replies: list[Any] = []
        while waiting:
            found = list(self._grid.pull_messages(waiting))
            replies += found
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
            if not waiting or (ends is not None and time.monotonic() > ends):
                break
            if not self._thread.is_alive():
                told = "" if self._failures.empty() else f" ({self._failures.get()})"
                raise ProcessError(
                    f"the simulation on Ray broke down{told}; --resume goes on from the last "
                    "checkpoint, federation.engine=in-process goes on without Ray"
                )
            time.sleep(_POLL_S)
        return replies


def _waited(
    grids: "Queue[Any]", failures: "Queue[BaseException]", thread: threading.Thread, count: int
) -> Any:
    """The grid, once all its nodes are there: Flower hands it out before it has made them."""
    grid = None
    while grid is None or len(list(grid.get_node_ids())) < count:
        if not failures.empty():
            error = failures.get()
            raise ProcessError(
                f"the simulation on Ray did not start ({type(error).__name__}: {error}); take "
                "federation.engine: in-process, or see what `ray status` says"
            ) from error
        if not thread.is_alive():
            raise ProcessError("the simulation on Ray ended before it began")
        if grid is None:
            with suppress(Empty):
                grid = grids.get(timeout=0.2)
        else:
            time.sleep(0.05)
    return grid
