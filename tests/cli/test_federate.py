"""`vestige federate init`: what it writes, and that it runs, in this process and on Ray."""

import importlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vestige.cli import main as cli
from vestige.errors import RecipeError
from vestige.training.files import read_json

BIN = Path(sys.executable).parent
RUFF = Path(__file__).resolve().parents[2] / "pyproject.toml"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def init(*arguments: object):
    return CliRunner().invoke(cli.app, ["federate", "init", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "my-clients"
    assert init(target).exit_code == 0
    return target


def settings(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]


def test_the_folder_is_an_app_whose_parts_are_named_right(folder):
    package = folder / "my_clients"
    assert {path.name for path in package.iterdir()} == {
        "__init__.py",
        "client_app.py",
        "model.py",
        "server_app.py",
    }
    app = settings(folder)
    assert app["components"] == {
        "serverapp": "my_clients.server_app:app",
        "clientapp": "my_clients.client_app:app",
    }
    assert app["config"]["out"] == str(folder / "results")
    assert "{{" not in "".join(path.read_text() for path in folder.rglob("*.*"))
    readme = (folder / "README.md").read_text()
    for word in ("FLWR_TELEMETRY_ENABLED=0", "--ssl-certfile", "--enable-supernode-auth"):
        assert word in readme
    # Results lie in the folder and must not travel to the clients with the app.
    assert "/results/" in (folder / ".gitignore").read_text().split()


def test_what_is_written_is_clean(folder):
    # As another project would check it, and formatted as this one is.
    for arguments in (["check"], ["format", "--check"]):
        command = [BIN / "ruff", *arguments, "--no-cache", "--config", RUFF, "."]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    for path in folder.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")


def test_flower_takes_the_app(folder):
    config_utils = pytest.importorskip("flwr.cli.config_utils")
    build = importlib.import_module("flwr.cli.build")
    (folder / "results").mkdir()
    (folder / "results" / "summary.json").write_text("{}")
    config, warnings = config_utils.load_and_validate(folder / "pyproject.toml")
    assert warnings == []
    assert config["project"]["name"] == "my-clients"
    bundle = build.build_fab_from_disk(folder)
    assert b"my_clients/client_app.py" in bundle
    assert b"results/summary.json" not in bundle


def test_a_folder_that_holds_something_is_left_alone(tmp_path, folder):
    mine = folder / "my_clients" / "client_app.py"
    mine.write_text("mine")
    refused = init(folder)
    assert isinstance(refused.exception, RecipeError)
    assert "is not empty; name another, or add --force" in str(refused.exception)
    assert mine.read_text() == "mine"
    (folder / "notes.txt").write_text("mine")
    assert init(folder, "--force").exit_code == 0
    assert "def load_data" in mine.read_text()
    assert (folder / "notes.txt").read_text() == "mine"
    assert "is a file, expected a folder" in str(init(folder / "notes.txt").exception)


def test_init_needs_no_flower_and_says_how_to_get_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "flwr" else find(name)
    )
    result = init(tmp_path / "clients")
    assert result.exit_code == 0
    assert "pip install 'vestige[federated]'" in result.output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("9clients", "small letters, digits and _"),
        ("class", "no word of Python"),
        ("a" * 33, "up to 32"),
        ("torch", "a package here already"),
        ("json", "a package here already"),
    ],
)
def test_names_that_would_not_work_are_refused(tmp_path, name, message):
    for result in (init(tmp_path / name), init(tmp_path / "fine", "--name", name)):
        assert isinstance(result.exception, RecipeError)
        assert message in str(result.exception)
        assert "--name" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def in_process(nodes: int, client_app, config):
    """A Flower grid that calls the client app in this process, and the reasons of failures."""
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.serverapp import Grid

    contexts = {
        node: Context(
            run_id=7,
            node_id=node,
            node_config={"partition-id": node - 1, "num-partitions": nodes},
            state=RecordDict(),
            run_config=config,
        )
        for node in range(1, nodes + 1)
    }

    class InProcess(Grid):
        failures: list[str]
        run = None

        def set_run(self, run):
            raise NotImplementedError

        def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
            raise NotImplementedError

        def push_messages(self, messages):
            raise NotImplementedError

        def pull_messages(self, message_ids):
            raise NotImplementedError

        def get_node_ids(self):
            return list(contexts)

        def send_and_receive(self, messages, *, timeout=None):
            for number, message in enumerate(messages):
                message.metadata.__dict__["_message_id"] = str(number)
                try:
                    yield client_app(message, contexts[message.metadata.dst_node_id])
                except ValueError as error:
                    self.failures.append(str(error))
                    yield Message(Error(code=0, reason=str(error)), reply_to=message)

    grid = InProcess()
    grid.failures = []
    return grid


@pytest.fixture
def parts(folder, monkeypatch):
    """The modules of a new app, and its settings, for a run of seconds."""
    pytest.importorskip("flwr")
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.syspath_prepend(folder)
    names = ("client_app", "server_app", "model")
    yield (
        *(importlib.import_module(f"my_clients.{name}") for name in names),
        {**settings(folder)["config"], "rounds": 4, "distill-rounds": 2, "distill-iterations": 15},
    )
    for name in ("my_clients", *(f"my_clients.{name}" for name in names)):
        sys.modules.pop(name)


def test_clients_share_out_the_digits_and_see_different_labels(parts):
    client, _, model, config = parts
    shares = [client.load_data(part, 3, config) for part in range(3)]
    counts = torch.stack([labels.bincount(minlength=10) for _, labels in shares])
    assert counts.sum() == 1168
    together = torch.cat([inputs.flatten(1) for inputs, _ in shares])
    assert len(together.unique(dim=0)) >= 1160
    even = client.load_data(0, 3, {**config, "dirichlet-alpha": 1e6})[1].bincount(minlength=10)
    spread = (counts / counts.sum(0)).std()
    assert spread > 0.15
    assert (even / counts.sum(0) - 1 / 3).abs().max() < 0.01
    inputs, labels = shares[0]
    assert inputs.shape[1:] == model.SPEC.shape
    client.check(inputs, labels)
    client.check(inputs[:0], labels[:0])
    with pytest.raises(ValueError, match="labels from 10 to 10, expected 0 to 9"):
        client.check(inputs[:2], torch.tensor([10, 10]))
    with pytest.raises(ValueError, match=r"inputs \(2, 1, 8, 16\) .* expected \(N, 1, 16, 16\)"):
        client.check(inputs[:2, :, :8], labels[:2])


def test_the_app_averages_then_distils(parts, monkeypatch, tmp_path):
    from flwr.app import Context, RecordDict

    client, server, model, config = parts
    context = Context(run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    grid = in_process(3, client.app, config)
    deal = client.load_data

    def one_is_wrong(partition_id, num_partitions, given):
        inputs, labels = deal(partition_id, num_partitions, given)
        return inputs, labels + 10 * (partition_id == 2)

    monkeypatch.setattr(client, "load_data", one_is_wrong)
    server.app(grid, context)
    # The client whose labels are no classes is left out, and the rounds go on.
    assert len(grid.failures) == 4
    assert all("expected 0 to 9" in failure for failure in grid.failures)
    out = Path(config["out"]) / "run-7"
    network, test = model.make_model(), server.load_test()
    network.load_state_dict(load_file(out / "global_model.safetensors"))
    assert test[1].bincount().tolist() == [50] * 10
    assert server.accuracy(network, *test) >= 0.8
    summary = read_json(out / "student" / "summary.json")
    assert summary["teacher"]["score"] == pytest.approx(server.accuracy(network, *test))
    assert summary["student"]["score"] >= 0.4
    assert summary["student"]["parameters"] < summary["teacher"]["parameters"] / 5
    # The test set judges; nothing else was read.
    assert {read["purpose"] for read in summary["real_data"]} == {"evaluation"}
    assert read_json(out / "student" / "student.json")["weights"] == "student.safetensors"
    student = model.make_student()
    student.load_state_dict(load_file(out / "student" / "student.safetensors"))
    assert server.accuracy(student, *test) == pytest.approx(summary["student"]["score"])


def test_a_run_without_a_model_fails_and_says_so(parts, monkeypatch):
    from flwr.app import Context, RecordDict

    client, server, _, config = parts
    context = Context(run_id=8, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    empty = torch.zeros(2, 1, 16, 16), torch.tensor([10, 11])
    monkeypatch.setattr(client, "load_data", lambda *given: empty)
    with pytest.raises(RuntimeError, match="no client returned a model"):
        server.app(in_process(2, client.app, config), context)


@pytest.mark.slow
def test_flower_runs_the_app_on_ray(folder, tmp_path):
    """`flwr run` with 2 clients: server, Ray workers and app processes, on loopback."""
    pytest.importorskip("ray")
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, other = one.getsockname()[1], two.getsockname()[1]
    home = tmp_path / "flower"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        **os.environ,
        **QUIET,
        "FLWR_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    server = subprocess.Popen(
        [
            *("flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1"),
            *("--port", str(port), "--control-api-address", f"127.0.0.1:{other}"),
            "--disable-runtime-dependency-installation",
        ],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        executable=BIN / "flower-superlink",
    )
    try:
        _wait_for(port)
        done = subprocess.run(
            [
                *(BIN / "flwr", "run", ".", "here", "--stream"),
                *("--federation-config", "num-supernodes=2 client-resources-num-cpus=1"),
                *("--run-config", "rounds=5 distill-rounds=4"),
            ],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    finally:
        server.terminate()
        server.wait(30)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "Received 2 results and 0 failures" in said
    (out,) = (folder / "results").iterdir()
    summary = read_json(out / "student" / "summary.json")
    assert summary["teacher"]["score"] >= 0.8, said
    assert summary["student"]["score"] >= 0.5, said
    assert f"student: {summary['student']['parameters']:,} parameters, accuracy" in said


def _wait_for(port):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    pytest.fail(f"no server on port {port} after a minute")
