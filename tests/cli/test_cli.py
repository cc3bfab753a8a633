"""The command line as its users meet it: output, files, messages and exit codes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from vestige.cli import main as cli
from vestige.data.image import BUILT_IN
from vestige.recipes.catalog import METHODS, shipped
from vestige.recipes.loading import load_recipe

CPU = ["--set", "trainer.device=cpu"]
ROOT = typer.main.get_command(cli.app)


def commands(group=ROOT, path=()):
    """Every command with the words that lead to it."""
    for name, command in sorted(getattr(group, "commands", {}).items()):
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def run(*arguments: str) -> str:
    """Output of a command that must succeed, in this process."""
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def process(*arguments: str, cwd: Path, **given) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "vestige", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **given,
    )


# Help and lists


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_has_an_example_that_names_it(words):
    help_ = " ".join(run(*words, "--help").split())
    _, _, examples = help_.partition("Example")
    assert re.search(rf"vestige {' '.join(words)}\b", examples)
    options = [p for p in COMMANDS[words].params if p.param_type_name == "option"]
    assert all(option.help for option in options)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_example_in_the_help_has_options_that_exist(words):
    examples = re.findall(r"`vestige ([^`]*)`", COMMANDS[words].epilog or "")
    assert examples
    known = {name for option in COMMANDS[words].params for name in option.opts}
    for example in examples:
        assert {word for word in example.split() if word.startswith("--")} <= known


def test_help_of_the_whole_needs_no_torch_and_little_time(tmp_path):
    code = (
        "import sys\n"
        "from vestige.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as left:\n    assert not left.code\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'torchmetrics', 'matplotlib', 'pydantic'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ran.returncode == 0, ran.stderr
    for words in COMMANDS:
        assert words[0] in ran.stdout


@pytest.mark.parametrize("kind", ["methods", "models", "recipes", "data", "plugins", "teachers"])
def test_lists_are_json_for_programs_and_tables_for_people(kind):
    rows = json.loads(run("list", kind, "--json"))
    table = run("list", kind)
    for row in rows:
        assert row["name"] in table
    if not rows:
        assert f"there are no {kind} yet" in table


def test_lists_hold_everything_there_is():
    methods = {row["name"]: row for row in json.loads(run("list", "methods", "--json"))}
    assert set(methods) == set(METHODS.names())
    for name, row in methods.items():
        assert set(row) >= {"paper", "tasks", "access", "needs", "recipes"}
        assert row["paper"] and row["summary"], name
    assert set(methods["dfad"]["recipes"]) >= {"dfad", "demo"}
    assert "1912.11006" in methods["dfad"]["paper"]
    assert "inputs" in " ".join(methods["kd"]["needs"])
    recipes = {row["name"]: row for row in json.loads(run("list", "recipes", "--json"))}
    assert set(recipes) == set(shipped())
    assert {"cpu", "smoke", "gpu", "paper"} <= set(recipes["dfad"]["presets"])
    data = {row["name"]: row for row in json.loads(run("list", "data", "--json"))}
    assert data[BUILT_IN]["splits"] == {"train": 1168, "select": 129, "test": 500}


def test_sets_of_texts_are_listed_with_those_of_images(tmp_path, monkeypatch):
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "train.jsonl").write_text('{"text": "a", "label": 0}\n' * 3)
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path))
    data = {row["name"]: row for row in json.loads(run("list", "data", "--json"))}
    where = str(tmp_path / "things")
    assert data["things"] == {
        "name": "things",
        "kind": "text",
        "where": where,
        "splits": {"train": 3},
    }
    assert data[BUILT_IN]["kind"] == "image"
    assert "train 3" in run("list", "data")


def test_without_filters_methods_and_is_refused_elsewhere(program):
    kept = json.loads(run("list", "methods", "--json", "--without", "batchnorm"))
    assert all(not row["batchnorm"] for row in kept)
    assert program("list", "models", "--without", "batchnorm")[0] == 2
    assert program("list", "methods", "--without", "x")[0] == 2
    assert program("list", "nothing")[0] == 2


# Recipes


@pytest.mark.parametrize("name", shipped())
def test_show_prints_a_recipe_that_is_valid_and_the_same(name, tmp_path):
    shown = run("show", name, "--set", "seed=3")
    values = yaml.safe_load(shown)
    assert values["seed"] == 3
    assert values["config"] == json.loads(load_recipe(name).method_config().model_dump_json()), (
        "not every default is written out"
    )
    (tmp_path / "shown.yaml").write_text(shown)
    again = load_recipe(tmp_path / "shown.yaml")
    expected = load_recipe(name, seed=3)
    assert again.method_config() == expected.method_config()
    for arm in expected.arms:
        assert again.arm(arm).method_config() == expected.arm(arm).method_config()
        assert again.arm(arm).sources == expected.arm(arm).sources
    assert "is valid" in run("validate", str(tmp_path / "shown.yaml"))


def test_validate_tells_every_mistake_and_exits_2(program):
    wrong = ["config.rouns=1", "trainer.devce=cpu", "seed=-1", "student.args.wdths=[1]"]
    code, out, err = program("validate", "dfad", *(x for w in wrong for x in ("--set", w)))
    assert (code, out) == (2, "")
    assert "the recipe has 4 mistakes" in err
    for nearest in ("'rounds'", "'device'", "'widths'"):
        assert f"did you mean {nearest}?" in err
    assert "seed: got -1" in err


@pytest.mark.parametrize("command", ["run", "show", "validate"])
def test_an_unknown_recipe_exits_2_and_names_the_nearest(command, program):
    code, _, err = program(command, "dfda")
    assert code == 2
    assert "got recipe 'dfda'" in err
    assert "did you mean 'dfad'?" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["no-such-command"],
        ["run", "dfad", "--no-such-option"],
        ["run", "dfad", "--seed", "-1"],
        ["run", "dfad", "--preset", "no"],
        ["run", "dfad", "--set", "x"],
        ["run", "dfad", "--plugin", "no"],
        ["run", "dfad", "--arms"],
        ["run", "dfad", "--compare", "dfad"],
        ["run", "dfad", "--compare", "dfad,kdd"],
        ["run", "dfad", "--compare", "dfad,kd", "--arms"],
        ["run", "dfad", "--arms", "--dry-run"],
        ["run", "dfad", "--track", "no-such-tracker"],
        ["show", "dfad", "--plugin", "no"],
        ["validate", "dfad", "--set", "data=no-such-set"],
        ["run", "dfad", "--set", "trainer.device=gpu"],
        ["run", "kd", "--set", "teacher={model: convnet, weights: no.safetensors}"],
        ["run", "dfad", "--set", "data=no-such-set"],
        ["report", "nothing-here"],
        ["bench", "claims", "no-such-claim"],
        ["bench", "claims", "dfad", "--arms", "no-such-arm"],
        ["train-teacher", "no-such-teacher"],
    ],
    ids=" ".join,
)
def test_a_wrong_request_exits_2_with_a_message_and_leaves_nothing(arguments, program, tmp_path):
    code, _, err = program(*arguments)
    assert code == 2
    assert err.strip()
    assert not list(tmp_path.iterdir())


def test_a_missing_data_set_says_where_to_put_which_file(program, monkeypatch, tmp_path):
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    code, _, err = program("run", "dfad", *CPU, "--set", "data=mnist", "--out", "x")
    assert code == 2
    assert str(tmp_path / "data/mnist/test.npz") in err
    assert "Put train.npz and test.npz into" in err
    assert "'digits' is always there" in err


# Runs


def test_a_run_writes_its_folder_once_and_says_where(program, tmp_path):
    code, out, _ = program("run", "dfad", "--preset", "smoke", *CPU, "--out", "x[/b]")
    assert code == 0
    assert "x[/b]: samples.png, report.html, summary.json, student.safetensors" in out
    record = json.loads((tmp_path / "x[/b]/run.json").read_text())
    assert shlex.split(record["command"])[:3] == ["vestige", "run", "dfad"]
    assert shlex.split(record["command"])[-1] == "x[/b]"
    assert json.loads((tmp_path / "x[/b]/summary.json").read_text())["complete"]

    code, _, err = program("run", "dfad", "--preset", "smoke", *CPU, "--out", "x[/b]")
    assert code == 2
    assert "is not empty; add --resume" in err

    code, _, err = program(
        "run", "dfad", "--preset", "smoke", *CPU, "--out", "x[/b]", "--resume", "--seed", "1"
    )
    assert code == 2
    assert "other settings (seed)" in err

    code, _, _ = program("run", "dfad", "--preset", "smoke", *CPU, "--out", "x[/b]", "--resume")
    assert code == 0


def test_folders_are_numbered_and_resume_takes_the_newest(program, tmp_path):
    kd = ("run", "kd", "--preset", "smoke", *CPU)
    for expected in ("kd-seed0", "kd-seed0-2", "kd-seed0-3"):
        assert program(*kd)[0] == 0
        assert (tmp_path / "runs" / expected / "summary.json").is_file()
    assert program(*kd, "--seed", "7")[0] == 0
    assert (tmp_path / "runs/kd-seed7").is_dir()
    (tmp_path / "runs/kd-seed0-3/summary.json").unlink()
    assert program(*kd, "--resume")[0] == 0
    assert (tmp_path / "runs/kd-seed0-3/summary.json").is_file()
    assert not (tmp_path / "runs/kd-seed0-4").exists()


def test_the_demo_shows_every_arm_and_the_report_compares_runs(program, tmp_path):
    code, out, _ = program("demo", "--preset", "smoke", *CPU, "--out", "demo")
    assert code == 0
    recipe = load_recipe("demo")
    for arm in recipe.arms.values():
        assert arm.title in out
    for column in ("accuracy", "gap closed", "seconds", "real images read"):
        assert column in out
    assert "1,168" in out
    assert (tmp_path / "demo/report.html").stat().st_size > 10_000
    assert set(json.loads((tmp_path / "demo/summary.json").read_text())["arms"]) == set(recipe.arms)

    arms = [f"demo/arms/{name}" for name in ("dfad-bn", "noise")]
    code, out, _ = program("report", *arms, "--out", "both.html")
    assert (code, out.strip()) == (0, "both.html")
    page = (tmp_path / "both.html").read_text()
    assert "dfad-bn" in page and "noise" in page
    code, out, _ = program("report", "demo")
    assert (code, out.strip()) == (0, "demo/report.html")


def test_a_loss_that_becomes_nan_exits_1_and_names_the_step(program, tmp_path):
    code, _, err = program(
        "run", "dfad", "--preset", "smoke", *CPU, "--set", "config.student_lr=1e30", "--out", "x"
    )
    assert code == 1
    assert re.search(r"the loss became NaN or infinite at step \d+", err)
    assert "lower the learning rates" in err
    assert list((tmp_path / "x/checkpoints").glob("*.safetensors"))
    assert not (tmp_path / "x/summary.json").exists()


def test_a_folder_that_cannot_be_written_exits_with_a_message(program, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = program("run", "kd", "--preset", "smoke", *CPU, "--out", "file/run")
    assert code == 1
    assert "could not read or write" in err
    code, _, err = program("run", "kd", "--preset", "smoke", *CPU, "--out", "file")
    assert code == 2
    assert "is a file, expected a folder" in err
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_read_only_folder_exits_with_a_message(program, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("needs a user who cannot write everywhere; this one is root")
    code, _, err = program("run", "kd", "--preset", "smoke", *CPU, "--out", "locked/run")
    assert code in (1, 2)
    assert "locked" in err


def test_training_a_teacher_leaves_weights_and_card(program, tmp_path):
    from vestige.recipes.teacher_schema import RECIPES_FOLDER

    values = yaml.safe_load((RECIPES_FOLDER / "digits-convnet.yaml").read_text())
    values["training"]["epochs"] = 1
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(values))
    code, out, _ = program("train-teacher", "quick.yaml", "--out", "made")
    assert code == 0
    card = json.loads((tmp_path / "made/quick.json").read_text())
    assert f"test accuracy {card['accuracy']:.1%}" in out
    assert (tmp_path / "made/quick.safetensors").is_file()


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_run_says_what_will_be_repeated_and_resumes(number, tmp_path):
    # Rounds of a few tenths of a second, long enough to be stopped inside one.
    arguments = [
        *("run", "dfad", "--preset", "smoke", *CPU, "--out", "x"),
        *("--set", "config.rounds=4", "--set", "config.iterations=20"),
        *("--set", "config.batch_size=16"),
    ]
    running = process(*arguments, cwd=tmp_path)
    deadline = time.monotonic() + 60
    # The second: a signal may come when a file is there and its step not yet noted.
    while not list((tmp_path / "x").glob("checkpoints/0000000[2-9]-*")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, (out, err)
    told = re.search(
        r"stopped at step (\d+); --resume goes on from step (\d+), so (\d+) steps will be repeated",
        err,
    )
    assert told, err
    stopped, kept, repeated = map(int, told.groups())
    assert stopped - kept == repeated
    assert kept % 120 == 0 and kept > 0
    assert "Traceback" not in err
    assert not (tmp_path / "x/summary.json").exists()

    resumed = process(*arguments, "--resume", cwd=tmp_path)
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert json.loads((tmp_path / "x/summary.json").read_text())["steps"] == 480


def test_ctrl_c_before_a_run_begins_exits_130_with_a_message(tmp_path, capfd, monkeypatch):
    def stop(*arguments, **given):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vestige.recipes.loading.load_recipe", stop)
    with pytest.raises(SystemExit) as left:
        cli.main(["run", "kd", "--preset", "smoke"])
    assert left.value.code == 130
    assert "Traceback" not in capfd.readouterr().err


def test_exit_codes_are_the_documented_ones():
    assert (cli.DONE, cli.FAILED, cli.WRONG_REQUEST, cli.INTERRUPTED) == (0, 1, 2, 130)
