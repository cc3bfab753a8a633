"""Two nodes of a Ray cluster on this machine: clients run on both, and the result is the same."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest
import torch

from vestige.core.types import InputSpec
from vestige.federated.federation import Federation
from vestige.federated.grid import in_process
from vestige.federated.simulation import on_ray
from vestige.federated.states import ClientStates
from vestige.methods.fedavg import FedAvg, FedAvgConfig
from vestige.models.factory import build_model
from vestige.tasks.classification import Classification
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

pytest.importorskip("flwr")
pytest.importorskip("ray")

DOUBLES = Path(__file__).resolve().parents[1] / "doubles"
RAY = Path(sys.executable).with_name("ray")
SPEC, CLASSES, CLIENTS = InputSpec.image(1, 8, 8), 3, 4


class NotedClients:
    """Gives skewed examples, and leaves a file for each process that asked for some."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, partition, count):
        import ray
        from federation import skewed

        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
        (self.folder / f"{partition}-{node}").touch()
        return skewed(count, SPEC.shape, CLASSES)[partition]


def learned(engine, folder):
    """Weights after three rounds of SCAFFOLD, whose clients keep something between rounds."""
    noted = folder / "noted"
    noted.mkdir(parents=True)
    federation = Federation(
        "clients",
        CLIENTS,
        CLASSES,
        engine=engine,
        load_data=NotedClients(noted),
        states=ClientStates(folder / "states", keep=10),
        seed=0,
    )
    torch.manual_seed(0)
    network = build_model("convnet", SPEC, CLASSES, widths=[4, 8])
    task = Classification(SPEC, CLASSES)
    settings = FedAvgConfig(rounds=3, base="scaffold", batch_size=8)
    method = FedAvg(settings, task, [], network, {"clients": federation})
    with federation.opened(method):
        Trainer(
            method,
            task,
            student=network,
            sources={"clients": federation},
            config=TrainerConfig(device="cpu", threads=1),
        ).run()
    assert [one.answered for one in federation.exchanges] == [CLIENTS] * 3
    return network.state_dict(), {path.name.partition("-")[2] for path in noted.iterdir()}


@contextmanager
def ray_node(log, *arguments):
    """One node of a cluster, a core large, that is ended with all that it started."""
    command = [
        *(RAY, "start", *arguments, "--node-ip-address", "127.0.0.1", "--num-cpus", "1"),
        *("--object-store-memory", "100000000", "--disable-usage-stats", "--block"),
    ]
    # The workers import the doubles, and are started by the node.
    paths = [str(DOUBLES), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"no node of Ray:\n{log.read_text()}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)
        # What the node started shares its group; a worker that is left would keep a core.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def cluster(tmp_path_factory):
    """The address of a cluster of two nodes."""
    # Ray gives ports from 10002 to 19999 to its workers.
    with socket.socket() as one:
        port = next(port for port in range(26379, 26479) if is_free(one, port))
    folder = tmp_path_factory.mktemp("ray")
    # A folder of its own, lest other runs join this cluster; the paths of sockets must be short.
    own = mkdtemp(prefix="ray-")
    head = ("--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir", own)
    address = f"127.0.0.1:{port}"
    with (
        ray_node(folder / "head.log", *head),
        ray_node(folder / "second.log", "--address", address),
    ):
        yield address
    rmtree(own, ignore_errors=True)


def is_free(one, port):
    try:
        one.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_clients_on_two_nodes_learn_what_one_process_learns(cluster, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOUBLES)
    engine = partial(on_ray, client_cpus=1.0, client_gpus=0.0, address=cluster)
    spread, nodes = learned(engine, tmp_path / "cluster")
    alone, here = learned(in_process, tmp_path / "alone")
    assert here == {"here"}
    assert len(nodes) == 2, nodes
    for name, value in alone.items():
        assert torch.equal(spread[name], value), name
