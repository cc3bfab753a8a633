"""A recipe between processes that know one another by certificates and keys, on loopback."""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vestige.cli import main as cli
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
from vestige.training.files import read_json

pytest.importorskip("flwr")

BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
CLIENTS, ROUNDS = 3, 3
# SCAFFOLD, so that what stays with a client between two rounds is needed as well.
CHANGES = (
    f"config.rounds={ROUNDS}",
    "config.active=null",
    "config.base=scaffold",
    "config.client_momentum=0",
    # Each asking starts a process at each client: the clients test the last network alone.
    f"trainer.evaluate_every={ROUNDS}",
)
needs_tools = pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="no openssl or ssh-keygen"
)


class Site:
    """A folder of certificates and keys, a superlink, and what is started beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.environment = {
            **os.environ,
            **QUIET,
            "FLWR_HOME": str(folder / "flower"),
            "VESTIGE_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    def make_keys(self) -> None:
        """An authority and a server's certificate, a foreign authority, and the clients' keys."""
        made = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        for name in ("ca", "foreign"):
            own = ("-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt")
            self.run("openssl", "req", "-x509", *made, "-days", "1", *own)
        own = ("-subj", "/CN=127.0.0.1", "-keyout", "server.key", "-out", "server.csr")
        self.run("openssl", "req", *made, *own)
        (self.folder / "san.txt").write_text("subjectAltName=IP:127.0.0.1")
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-days", "1", "-extfile", "san.txt")
        self.run(
            *("openssl", "x509", "-req", "-in", "server.csr", *signed),
            *("-CAcreateserial", "-out", "server.pem"),
        )
        for name in (*map(str, range(CLIENTS)), "stranger"):
            key = ("-t", "ecdsa", "-b", "384", "-N", "", "-f", f"client-{name}")
            self.run("ssh-keygen", "-q", *key)
        home = self.folder / "flower"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink.site]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.folder / "ca.crt"}"\n'
        )

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 60) -> str:
        done = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        return said

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    @contextmanager
    def started(self, name: str, *command: str):
        """A process that is ended with all that it started."""
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)

    def superlink(self):
        return self.started(
            *("superlink", "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem"),
            *("--ssl-keyfile", "server.key", "--enable-supernode-auth"),
            "--disable-runtime-dependency-installation",
        )

    def supernode(self, name: str, *access: str, number: int = 0):
        """A client's daemon; it gives up soon where it gets no connection."""
        config = f'partition-id={number} num-partitions={CLIENTS} state="{self.folder / name}"'
        return self.started(
            *(name, "flower-supernode", "--superlink", f"127.0.0.1:{self.port}", *access),
            *("--host", "127.0.0.1", "--port", str(free_port()), "--max-retries", "1"),
            *("--node-config", config),
        )

    def wait_for(self, name: str, words: str, times: int = 1) -> None:
        """Until a log says so."""
        until = time.monotonic() + 120
        while self.log(name).count(words) < times:
            if time.monotonic() > until:
                pytest.fail(f"{name} never said {words!r}:\n{self.log(name)}")
            time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A superlink with TLS that lets registered keys in; three are registered."""
    made = Site(tmp_path_factory.mktemp("site"))
    made.make_keys()
    with made.superlink():
        made.wait_for("superlink", "running on https://")
        for number in range(CLIENTS):
            made.run("flwr", "supernode", "register", f"client-{number}.pub", "site")
        yield made


@needs_tools
@pytest.mark.slow
def test_real_clients_learn_what_simulated_ones_learn(site, monkeypatch):
    """TLS, node keys, three supernodes: the weights are those of one process, bit for bit."""
    app = site.folder / "ward-app"
    assert CliRunner().invoke(cli.app, ["federate", "init", str(app)]).exit_code == 0
    with ExitStack() as clients:
        for number in range(CLIENTS):
            access = ("--root-certificates", "ca.crt")
            key = ("--auth-supernode-private-key", f"client-{number}")
            clients.enter_context(site.supernode(f"node-{number}", *access, *key, number=number))
        changed = " ".join(CHANGES)
        said = site.run(
            *("flwr", "run", ".", "site", "--stream"),
            *("--run-config", f'clients={CLIENTS} set="{changed}"'),
            cwd=app,
            timeout=500,
        )
    asked = CLIENTS * ROUNDS
    assert f"{asked} of {asked} answers, 0 void rounds" in said, said
    (out,) = (app / "results").iterdir()
    monkeypatch.syspath_prepend(app)
    count = f"sources.clients.partition.clients={CLIENTS}"
    changes = (count, "federation.engine=in-process", *CHANGES)
    recipe = load_recipe(app / "ward_app" / "recipe.yaml", overrides=changes)
    run_recipe(recipe, site.folder / "simulated")
    weights = load_file(site.folder / "simulated" / "student.safetensors")
    for name, value in load_file(out / "student.safetensors").items():
        assert torch.equal(value, weights[name]), name
    federated = read_json(out / "federated.json")
    assert federated["engine"] == "deployment"
    assert [one["answered"] for one in federated["rounds"]] == [CLIENTS] * ROUNDS
    simulated = read_json(site.folder / "simulated" / "federated.json")
    assert federated["scores"] == simulated["scores"]
    # The variates of a client stay in its own folder, and no other's are there.
    for number in range(CLIENTS):
        (run,) = (site.folder / f"node-{number}").iterdir()
        assert [own.name for own in run.iterdir()] == [f"{number:06d}"]


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize(
    ("access", "here", "there"),
    [
        pytest.param(
            ["--root-certificates", "ca.crt", "--auth-supernode-private-key", "client-stranger"],
            "Failed to activate SuperNode",
            "No SuperNode found with the given public key",
            id="unregistered-key",
        ),
        pytest.param(
            ["--root-certificates", "ca.crt"],
            "All SuperNodes must be registered",
            "Attempted to register SuperNode with public key",
            id="no-key",
        ),
        pytest.param(
            ["--root-certificates", "foreign.crt", "--auth-supernode-private-key", "client-0"],
            "CERTIFICATE_VERIFY_FAILED",
            "",
            id="wrong-authority",
        ),
        pytest.param(["--insecure"], "Giving up reconnection", "", id="plain-text"),
    ],
)
def test_a_client_that_is_not_known_gets_no_connection(site, access, here, there):
    before = len(site.log("superlink"))
    with site.supernode("refused", *access) as process:
        assert process.wait(60) == 1, site.log("refused")
    said, heard = site.log("refused"), site.log("superlink")[before:]
    assert "Exit Code: 305" in said
    assert here in said
    assert there in heard
    assert "Activated node_id" not in heard
