"""Flower's simulation on Ray, on this machine or on a cluster."""

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from typing import Any

from vestige.errors import ProcessError

# Flower and Ray tell their makers about every run unless they are told not to.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


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
    # Without an address Ray would look for a cluster on this machine and wait for one that is gone.
    init: dict[str, Any] = {
        "address": "local",
        "include_dashboard": False,
        "log_to_driver": False,
    }
    if address is not None:
        init = {"address": address, "log_to_driver": False}

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
        logging.getLogger(name).setLevel(logging.WARNING)
    thread = threading.Thread(target=simulate, name="flower-simulation", daemon=True)
    thread.start()
    try:
        yield _waited(grids, failures, thread)
    finally:
        done.set()
        thread.join(timeout=60)


def _waited(grids: "Queue[Any]", failures: "Queue[BaseException]", thread: threading.Thread) -> Any:
    while True:
        try:
            return grids.get(timeout=0.2)
        except Empty:
            if not failures.empty():
                error = failures.get()
                raise ProcessError(
                    f"the simulation on Ray did not start ({type(error).__name__}: {error}); take "
                    "federation.engine: in-process, or see what `ray status` says"
                ) from error
            if not thread.is_alive():
                raise ProcessError("the simulation on Ray ended before it began") from None
