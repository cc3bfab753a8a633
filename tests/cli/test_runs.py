"""Starting runs: comparisons, previews, what a pipe gets, and runs that are whole already."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vestige.cli import progress as progress_module
from vestige.cli.progress import RunProgress
from vestige.recipes.estimate import Estimate
from vestige.training.tracking import Event

CPU = ["--set", "trainer.device=cpu"]
SMOKE = ["--preset", "smoke", *CPU]


@pytest.fixture
def long_run(monkeypatch):
    """Every run is estimated to take a quarter of an hour; tells how often it was asked."""
    asked = []

    def estimate(job):
        asked.append(job)
        return Estimate(15.0, 1000, 12.0)

    monkeypatch.setattr("vestige.recipes.estimate.estimate", estimate)
    return asked


# Comparisons


def test_compare_runs_each_method_in_its_folder_and_prints_one_table(program, tmp_path):
    code, out, _ = program("run", "--compare", "kd, dfad", "dfad", *SMOKE)
    assert code == 0
    folder = tmp_path / "runs/dfad-compared-seed0"
    assert {path.name for path in (folder / "arms").iterdir()} == {"dfad", "kd"}
    assert "dfad as this recipe has it" in out
    assert "kd as in the recipe 'kd'" in out
    assert "Each makes 20 updates of the student." in out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["headline"] == "dfad"
    assert set(summary["arms"]) == {"dfad", "kd"}
    assert [row["gap_closed"] for row in summary["arm_details"]] == [None, None]
    # Whole already, so it is only gathered again.
    before = (folder / "arms/kd/summary.json").read_bytes()
    assert program("run", "--compare", "kd,dfad", "dfad", *SMOKE, "--resume")[0] == 0
    assert (folder / "arms/kd/summary.json").read_bytes() == before


def test_the_help_says_what_a_comparison_has_in_common(program):
    _, out, _ = program("run", "--help")
    told = " ".join(out.replace("│", " ").split())
    assert "the recipe's teacher, student, seed, data and budget" in told
    assert "as in the arm or the shipped recipe of any other" in told


# Estimates


def test_a_dry_run_builds_says_what_it_takes_and_leaves_nothing(program, tmp_path, long_run):
    code, out, _ = program("run", "dfad", *SMOKE, "--dry-run", "--out", "later")
    assert code == 0
    assert "about 15 min, 1,000 inputs through the teacher, 12 MiB on disk" in out
    assert "would write to later; nothing was run" in out
    assert len(long_run) == 1
    assert not list(tmp_path.iterdir())

    code, out, _ = program("run", "--compare", "dfad,kd", "dfad", *SMOKE, "--dry-run")
    assert code == 0
    assert "All 2 arms: about 30.0 min" in out
    assert "would write to runs/dfad-compared-seed0" in out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_finds_what_only_building_finds(program, tmp_path):
    code, _, err = program("run", "kd", "--set", "num_classes=7", "--dry-run")
    assert code == 2
    assert "num_classes: got 7, expected 10" in err


def test_a_long_run_is_estimated_once_and_not_again_on_resume(program, tmp_path, long_run):
    steps = ["--set", "trainer.max_steps=12"]
    code, _, err = program("run", "dfad", *SMOKE, *steps, "--out", "x")
    assert (code, len(long_run)) == (0, 1)
    assert "Estimate: about 15 min" in err
    code, _, err = program("run", "dfad", *SMOKE, "--out", "x", "--resume")
    assert (code, len(long_run)) == (0, 1)
    assert "Estimate" not in err


def test_a_short_run_says_nothing_of_its_length(program, monkeypatch):
    monkeypatch.setattr("vestige.recipes.estimate.estimate", lambda job: Estimate(0.9, 1, 1.0))
    assert "Estimate" not in program("run", "kd", *SMOKE)[2]
    monkeypatch.setattr("vestige.recipes.estimate.estimate", lambda job: Estimate())
    assert "Estimate" not in program("run", "kd", *SMOKE)[2]


# Going on


def test_a_whole_run_is_not_repeated_and_its_report_is_written_again(program, tmp_path):
    assert program("run", "dfad", *SMOKE, "--out", "x")[0] == 0
    (tmp_path / "x/report.html").unlink()
    kept = {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()}
    assert program("run", "dfad", *SMOKE, "--out", "x", "--resume")[0] == 0
    assert (tmp_path / "x/report.html").is_file()
    assert kept == {path: path.read_bytes() for path in kept}


def test_a_stop_while_the_report_is_written_leaves_a_whole_run(program, tmp_path, monkeypatch):
    def stop(*arguments, **given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vestige.recipes.run.write_report", stop)
        code, _, err = program("run", "dfad", *SMOKE, "--out", "x")
    assert code == 130
    assert "the run in x is whole, and --resume writes its report" in err
    assert json.loads((tmp_path / "x/summary.json").read_text())["complete"]
    assert not (tmp_path / "x/report.html").exists()
    assert program("run", "dfad", *SMOKE, "--out", "x", "--resume")[0] == 0
    assert (tmp_path / "x/report.html").is_file()


def test_a_stop_while_the_result_is_written_goes_on_from_the_checkpoint(
    program, tmp_path, monkeypatch
):
    def stop(*arguments, **given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vestige.recipes.run.write_student", stop)
        code, _, err = program("run", "dfad", *SMOKE, "--out", "x")
    assert code == 130
    assert "--resume goes on from the last checkpoint" in err
    assert not (tmp_path / "x/summary.json").exists()
    assert program("run", "dfad", *SMOKE, "--out", "x", "--resume")[0] == 0
    assert json.loads((tmp_path / "x/summary.json").read_text())["steps"] == 24


def test_resume_without_checkpoints_says_that_it_starts_anew(program, tmp_path, caplog):
    assert program("run", "dfad", *SMOKE, "--out", "x")[0] == 0
    for path in (tmp_path / "x/checkpoints").iterdir():
        path.unlink()
    (tmp_path / "x/summary.json").unlink()
    assert program("run", "dfad", *SMOKE, "--out", "x", "--resume")[0] == 0
    assert "x holds no checkpoint to go on from; the run starts anew" in caplog.messages
    # In a folder where nothing ever ran, that is no news.
    caplog.clear()
    assert program("run", "dfad", *SMOKE, "--out", "y", "--resume")[0] == 0
    assert not any("anew" in message for message in caplog.messages)


# Recipes


def test_show_and_validate_take_plug_ins_and_seed(program):
    code, out, _ = program("show", "kd", "--seed", "5")
    assert (code, yaml.safe_load(out)["seed"]) == (0, 5)
    code, _, err = program("validate", "kd", "--plugin", "no-such", "--seed", "5")
    assert code == 2
    assert "plugins.0.name: got plugin 'no-such'" in err


def test_validate_counts_what_the_machine_lacks(program):
    code, out, err = program(
        *("validate", "kd", "--set", "config.rouns=1", "--set", "data=no-such-set"),
        *("--set", "sources.inputs={kind: factory, factory: 'no_such:thing'}"),
    )
    assert (code, out) == (2, "")
    assert "the recipe has 3 mistakes" in err
    for expected in ("did you mean 'rounds'?", "data: got no file", "sources.inputs.factory: got"):
        assert expected in err


def test_a_factory_beside_the_recipe_is_found(program, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "net_beside_the_recipe.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))\n"
    )
    made = "student={factory: 'net_beside_the_recipe:make', name: null, args: {widths: 1}}"
    chosen = ["--set", made, "--set", "student.args='!drop'"]
    assert program("validate", "kd", *chosen)[0] == 0
    assert program("run", "kd", *SMOKE, *chosen, "--out", "x")[0] == 0


def test_track_is_short_for_a_setting_of_the_trainer(program):
    code, _, err = program("run", "kd", *SMOKE, "--track", "no-such-tracker")
    assert code == 2
    assert "trainer.track" in err and "no-such-tracker" in err


# What others read


def test_version_and_nearest_names(program):
    from vestige import __version__

    code, out, _ = program("--version")
    assert (code, out.strip()) == (0, f"vestige {__version__}")
    code, _, err = program("rn")
    assert code == 2 and "'run'" in err
    code, _, err = program("run", "kd", "--presets", "smoke")
    assert code == 2 and "--preset" in err


def test_a_reader_that_leaves_is_no_error(tmp_path):
    for command in ("list models", "list methods --json"):
        piped = f"set -o pipefail; {sys.executable} -m vestige {command} | head -c 1 >/dev/null"
        ran = subprocess.run(
            ["bash", "-c", piped], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert ran.stderr == "", command


def test_what_is_piped_has_no_colours_and_whole_lines(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    ran = subprocess.run(
        [sys.executable, "-m", "vestige", "list", "recipes"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert "\x1b" not in ran.stdout
    assert any("demo" in line and "judged against" in line for line in ran.stdout.splitlines())


def round_event(number: int, rounds: int) -> Event:
    data = {"loop": "distill", "round": number, "rounds": rounds, "step": number, "seconds": 1.0}
    return Event("round", {**data, "agreement": None})


def test_progress_in_a_pipe_is_a_line_at_times(capfd, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(progress_module, "time", time)
    with RunProgress(["a", "b"]) as shown:
        (follow,) = shown.callbacks("a")
        follow(Event("start", {"step": 0}))
        for number in range(1, 101):
            clock["now"] += 1.0
            if number == 50:
                follow(Event("evaluation", {"scores": {"accuracy": 0.25}}))
            follow(round_event(number, 100))
        follow(Event("warning", {"message": "look [out]"}))
    err = capfd.readouterr().err
    lines = err.splitlines()
    assert "\x1b" not in err
    # Ten tenths of 10 s each, and the warning.
    assert lines[0] == "a (1 of 2): 10% after 10 s"
    assert lines[4] == "a (1 of 2): 50% after 50 s, test accuracy 25.0 %"
    assert len(lines) == 11
    assert lines[-1] == "a: look [out]"


def test_slow_progress_is_told_every_half_minute_and_quick_runs_say_nothing(capfd, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    with RunProgress(["a"]) as shown:
        (follow,) = shown.callbacks("a")
        for number in range(1, 13):
            clock["now"] += 10.0
            follow(round_event(number, 1000))
    assert capfd.readouterr().err.splitlines() == [
        "a: 0% after 30 s",
        "a: 1% after 60 s",
        "a: 1% after 90 s",
        "a: 1% after 120 s",
    ]
    with RunProgress(["a"]) as shown:
        (follow,) = shown.callbacks("a")
        for number in range(1, 11):
            clock["now"] += 0.1
            follow(round_event(number, 10))
    assert capfd.readouterr().err == ""


def test_sigterm_before_a_run_exits_130(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from vestige.cli import main\n"
        "import vestige.recipes.loading as loading\n"
        "loading.load_recipe = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\n"
        "main.main(['run', 'kd'])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ran.returncode == 130, ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_folder_of_a_run_is_below_the_working_folder(program, tmp_path):
    assert program("run", "kd", *SMOKE)[0] == 0
    assert [path.name for path in Path(tmp_path / "runs").iterdir()] == ["kd-seed0"]


def test_a_warning_is_told_once(tmp_path):
    command = ["run", "kd", *SMOKE, "--set", "config.rounds=5", "--set", "config.iterations=5"]
    done = subprocess.run(
        [sys.executable, "-m", "vestige", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    # Noise, of which the teacher makes few classes.
    assert done.stderr.count("within a round the inputs cover") == 1
