"""`vestige federate init`: what it writes, and that it runs, in this process and on Ray."""

import importlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vestige.cli import main as cli
from vestige.errors import Interrupted, ProcessError, RecipeError
from vestige.federated.federation import Federation
from vestige.federated.grid import in_process
from vestige.recipes.deployment import client_app as vestige_client_app
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
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
        "recipe.yaml",
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


def test_the_app_runs_the_recipe_that_is_named(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        read_text("fedavg")
        .replace("method: fedavg", "method: fedftg")
        .replace("clients: 8", "clients: 7")
    )
    folder = tmp_path / "wards"
    assert init(folder, "--recipe", own, "--preset", "cpu").exit_code == 0
    assert settings(folder)["config"]["clients"] == 7
    chosen = load_recipe(folder / "wards" / "recipe.yaml")
    assert chosen.method == "fedftg"
    assert chosen.student is not None
    assert chosen.student.factory == "wards.model:make_model"
    assert '"stride-cnn", spec, 10' in (folder / "wards" / "model.py").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kd": ""}, "expected one of kind 'clients'"),
        (
            {"student: {name: stride-cnn}": "student: {factory: a.b:c}"},
            "put your own network into model.py",
        ),
        ({"num_classes: 10": ""}, "num_classes"),
    ],
)
def test_recipes_that_no_app_can_run_are_refused(tmp_path, changed, message):
    recipe = "kd"
    if "kd" not in changed:
        text = read_text("fedavg")
        for old, new in changed.items():
            assert old in text
            text = text.replace(old, new)
        recipe = tmp_path / "own.yaml"
        recipe.write_text(text)
    refused = init(tmp_path / "wards", "--recipe", recipe)
    assert isinstance(refused.exception, RecipeError)
    assert message in str(refused.exception)
    assert not (tmp_path / "wards").exists()


def read_text(name):
    return files("vestige.recipes").joinpath(f"{name}.yaml").read_text()


@pytest.fixture
def parts(folder, monkeypatch):
    """The client's and the server's module of a new app, and its run config."""
    pytest.importorskip("flwr")
    monkeypatch.syspath_prepend(folder)
    names = ("client_app", "server_app", "model")
    client, server, _ = (importlib.import_module(f"my_clients.{name}") for name in names)
    yield client, server, dict(settings(folder)["config"])
    for name in ("my_clients", *(f"my_clients.{name}" for name in names)):
        sys.modules.pop(name)


def served(parts, count, *, run_id, node=None, **config):
    """Run the app's server with its own clients in this process; the run folder."""
    from flwr.app import Context, RecordDict

    client, server, known = parts
    known |= {"clients": count, **config}

    def answer(message, context):
        # As Flower hands it to a client: the run config of the server, the site's own node config.
        context.run_config, context.run_id = known, run_id
        context.node_config |= node or {}
        return client.app(message, context)

    context = Context(
        run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config=known
    )
    with in_process(answer, count) as grid:
        server.app(grid, context)
    return Path(known["out"]) / f"run-{config.get('resume') or run_id}"


def test_the_app_learns_what_the_simulation_of_its_recipe_learns(
    parts, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    changes = ("config.rounds=2", "config.base=feddyn", "config.local_epochs=1")
    out = served(parts, 3, run_id=7, set=" ".join(changes))
    count = "sources.clients.partition.clients=3"
    # The app asks as many as there are, where the recipe wants more.
    changes = (count, "config.active=3", "federation.engine=in-process", *changes)
    recipe = load_recipe(folder / "my_clients" / "recipe.yaml", overrides=changes)
    run_recipe(recipe, tmp_path / "simulated")
    there, here = (
        load_file(where / "student.safetensors") for where in (out, tmp_path / "simulated")
    )
    assert all(torch.equal(there[name], value) for name, value in here.items())
    # What FedDyn keeps lies at the clients, not with the server.
    kept = tmp_path / "cache" / "clients" / "run-7"
    assert [one.name for one in sorted(kept.iterdir())] == ["000000", "000001", "000002"]
    assert not (out / "clients").exists()
    federated = read_json(out / "federated.json")
    assert federated["engine"] == "deployment"
    assert sum(federated["holds"]["sizes"]) == 1168


def test_a_run_goes_on_where_an_earlier_one_stopped(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    base = "config.base=scaffold config.client_momentum=0 config.local_epochs=1 config.rounds=3"
    whole = served(parts, 2, run_id=1, set=base)
    ask, asked = Federation.ask, []

    def stopping(self, kind, round, *given, **named):
        asked.append(round)
        if round == 2 and len(asked) == 3:
            raise KeyboardInterrupt
        return ask(self, kind, round, *given, **named)

    monkeypatch.setattr(Federation, "ask", stopping)
    with pytest.raises(Interrupted):
        served(parts, 2, run_id=2, set=f"{base} trainer.checkpoint_every=1")
    done = served(parts, 2, run_id=3, resume="2", set=f"{base} trainer.checkpoint_every=1")
    assert asked == [0, 1, 2, 2]
    expected = load_file(whole / "student.safetensors")
    found = load_file(done / "student.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_client_whose_data_is_wrong_is_left_out(parts, tmp_path, monkeypatch):
    client, _, _ = parts
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    right = client.load_data

    def one_is_wrong(partition, count):
        data = right(partition, count)
        return replace(data, labels=data.labels + 10 * (partition == 1))

    wrong = vestige_client_app(client.RECIPE, one_is_wrong)
    monkeypatch.setattr(client, "app", wrong)
    out = served(parts, 2, run_id=9, set="config.rounds=1 config.local_epochs=1")
    (only,) = read_json(out / "federated.json")["rounds"]
    assert only["answered"] == 1
    assert only["asked"] == 2


def test_too_few_clients_end_a_run_with_a_plain_word(parts):
    from flwr.app import Context, RecordDict

    _, server, config = parts
    config |= {"clients": 3, "wait-s": 0, "set": "federation.least=3"}
    context = Context(run_id=8, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    with (
        in_process(lambda message, given: None, 2) as grid,
        pytest.raises(ProcessError, match=r"got 2 connected clients .* at least 3"),
    ):
        server.app(grid, context)


@pytest.mark.slow
def test_flower_runs_the_app_on_ray(folder, tmp_path, monkeypatch):
    """`flwr run` with 2 clients: server, Ray workers and app processes, as in this process."""
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
                *("--run-config", 'clients=2 set="config.rounds=3"'),
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
    assert "6 of 6 answers, 0 void rounds" in said
    (out,) = (folder / "results").iterdir()
    monkeypatch.syspath_prepend(folder)
    changes = ("config.rounds=3", "config.active=null", "federation.engine=in-process")
    count = "sources.clients.partition.clients=2"
    recipe = load_recipe(folder / "my_clients" / "recipe.yaml", overrides=[count, *changes])
    alone = run_recipe(recipe, tmp_path / "alone")["student"]["score"]
    # Chance is 0.1.
    assert read_json(out / "summary.json")["student"]["score"] == alone > 0.3, said


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
