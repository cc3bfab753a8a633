"""What goes wrong in a run of the command line: exit code, message, nothing lost, no traceback."""

import builtins
import errno
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vestige.cli import main as cli
from vestige.methods.dfad import DFAD
from vestige.tasks.classification import Classification
from vestige.training.files import LOCK, locked
from vestige.training.tracking import metrics, trackers
from vestige.training.tracking.metrics import read_metrics

RUN = (
    *("run", "dfad", "--preset", "smoke", "--set", "trainer.device=cpu"),
    *("--set", "config.rounds=3", "--set", "config.iterations=2"),
    *("--set", "config.student_steps=2", "--set", "trainer.log_every=1", "--out", "run"),
)
STEPS = 18

Main = Callable[..., tuple[int, str, str]]


def student(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def steps(folder: Path) -> list[tuple[int, str]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row["role"]) for row in rows if row["kind"] == "step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["vestige", *RUN])
        with pytest.raises(SystemExit) as left:
            cli.main(list(RUN))
    signal.signal(signal.SIGTERM, before)
    assert not left.value.code
    return folder / "run"


def goes_on(program: Main, whole: Path) -> None:
    """What was disturbed ends as if nothing had been."""
    code, _, err = program(*RUN, "--resume")
    assert code == 0, err
    assert student(Path("run")) == student(whole)
    assert steps(Path("run")) == steps(whole)
    assert json.loads(Path("run/summary.json").read_text())["steps"] == STEPS
    assert {p.name for p in Path("run").iterdir()} - {LOCK} == {p.name for p in whole.iterdir()} - {
        LOCK
    }


# A full disk

WRITTEN = (
    *("recipe.yaml", "run.json", "00000000-", "00000002-", "student.safetensors", "student.json"),
    *("evaluation.json", "samples.png", "samples-over-time.png", "summary.json", "report.html"),
)


def fill(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """No byte of `name` gets to the disk."""
    sync = os.fsync

    def full(descriptor: int) -> None:
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if file.startswith((f".{name}", name)):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_is_told_with_the_file_and_the_run_goes_on_with_space(
    name, program, whole, monkeypatch
):
    with monkeypatch.context() as patch:
        fill(patch, name, errno.ENOSPC)
        code, _, err = program(*RUN)
    assert code == 1
    assert f"{Path('run')}" in err and name in err
    assert "No space left on device; free some space" in err
    assert "--resume" in err
    assert not list(Path("run").rglob(".*.partial"))
    # What stands is whole.
    for path in Path("run").glob("*.json"):
        json.loads(path.read_text())
    assert Path("run/summary.json").exists() == (name == "report.html")
    goes_on(program, whole)


def test_a_disk_that_is_full_in_the_middle_of_the_metrics_loses_no_row(program, whole, monkeypatch):
    class Half:
        """Takes a part of what is written."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> "Half":
            return self

        def __exit__(self, *error: object) -> None:
            self.stream.close()

        def write(self, text: str) -> None:
            self.stream.write(text[: len(text) // 2])
            self.stream.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flushes = [0]

    def half(path: Any, mode: str = "r", **given: Any) -> Any:
        stream = builtins.open(path, mode, **given)  # noqa: SIM115
        if mode != "a":
            return stream
        flushes[0] += 1
        return Half(stream) if flushes[0] == 2 else stream

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "open", half, raising=False)
        code, _, err = program(*RUN)
    assert code == 1
    assert "could not write run/metrics.jsonl: No space left on device; free some space" in err
    assert not Path("run/metrics.jsonl").read_bytes().endswith(b"\n")
    goes_on(program, whole)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EROFS, "make the folder writable"), (errno.EIO, "see that nothing is in the way")],
)
def test_other_faults_of_a_disk_have_remedies_of_their_own(number, remedy, program, monkeypatch):
    fill(monkeypatch, "run.json", number)
    code, _, err = program(*RUN)
    assert code == 1
    assert f"could not write run/run.json: {os.strerror(number)}; {remedy}" in err


def test_a_file_where_a_folder_should_be_is_told(program, whole):
    Path("run").mkdir()
    Path("run/checkpoints").write_text("in the way")
    code, _, err = program(*RUN, "--resume")
    assert code == 1
    assert "run/checkpoints" in err and "nothing is in the way" in err
    Path("run/checkpoints").unlink()
    goes_on(program, whole)


# Ctrl-C and SIGTERM, where a run spends its time


def second_round() -> bool:
    return len(list(Path("run").glob("checkpoints/*"))) == 2


def stop_in_update(patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    generation = DFAD.generation

    def counted(self: Any, *arguments: Any) -> Any:
        if second_round():
            act()
        return generation(self, *arguments)

    patch.setattr(DFAD, "generation", counted)


def stop_in_evaluation(patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    evaluate = Classification.evaluate

    def counted(self: Any, *arguments: Any) -> Any:
        if second_round():
            act()
        return evaluate(self, *arguments)

    patch.setattr(Classification, "evaluate", counted)


def stop_in_writing(name: str) -> Callable[[pytest.MonkeyPatch, Callable[[], None]], None]:
    def place(patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
        sync = os.fsync

        def counted(descriptor: int) -> None:
            if name in Path(os.readlink(f"/proc/self/fd/{descriptor}")).name:
                act()
            sync(descriptor)

        patch.setattr(os, "fsync", counted)

    return place


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


PLACES: dict[str, tuple[Any, str]] = {
    "a source update": (stop_in_update, "goes on from step 6"),
    "an evaluation": (stop_in_evaluation, "goes on from step 6"),
    "writing a checkpoint": (stop_in_writing("00000002-"), "goes on from step 6"),
    "writing the student": (stop_in_writing("student.safetensors"), "--resume goes on"),
    "writing the summary": (stop_in_writing("summary.json"), "--resume goes on"),
    "writing the report": (stop_in_writing("report.html"), "is whole"),
}


# The handler is the same everywhere, so the second signal is quick for two places only.
STOPS = [
    *(pytest.param(place, ctrl_c, id=f"ctrl-c in {place}") for place in PLACES),
    *(
        pytest.param(
            *(place, sigterm),
            id=f"sigterm in {place}",
            marks=() if index % 2 else pytest.mark.slow,
        )
        for index, place in enumerate(PLACES)
    ),
]


@pytest.mark.parametrize(("place", "act"), STOPS)
def test_a_stop_anywhere_exits_130_and_the_run_goes_on(place, act, program, whole, monkeypatch):
    where, told = PLACES[place]
    with monkeypatch.context() as patch:
        where(patch, act)
        code, _, err = program(*RUN)
    assert code == 130, err
    assert told in err
    assert not list(Path("run").rglob(".*.partial"))
    goes_on(program, whole)


# Wrong requests


def teacher(weights: str, **changes: Any) -> list[str]:
    known = {
        "input": "{channels: 1, height: 8, width: 8}",
        "num_classes": 10,
        "teacher.model": "convnet",
        "teacher.weights": weights,
        **changes,
    }
    settings = {"teacher": "{}", **known}
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def weights(path: str, **changes: torch.Tensor) -> str:
    from vestige.core.types import InputSpec
    from vestige.models.factory import build_model

    network = build_model("convnet", InputSpec.image(1, 8, 8), 10)
    save_file({**network.state_dict(), **changes}, path)
    return path


def pickled() -> list[str]:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.system, ("touch exploded",))

    Path("teacher.pt").write_bytes(pickle.dumps(Bomb()))
    return teacher("teacher.pt")


def poisoned() -> list[str]:
    from vestige.core.types import InputSpec
    from vestige.models.factory import build_model

    state = build_model("convnet", InputSpec.image(1, 8, 8), 10).state_dict()
    name = next(iter(state))
    return teacher(weights("nan.safetensors", **{name: torch.full_like(state[name], torch.nan)}))


REQUESTS: dict[str, tuple[Callable[[], list[str]], tuple[str, ...]]] = {
    "a pickled teacher": (pickled, ("teacher.pt", "safetensors")),
    "a teacher with NaN": (poisoned, ("NaN", "expected finite")),
    "weights of other classes": (
        lambda: teacher(weights("t.safetensors"), num_classes=7),
        ("got", "expected"),
    ),
    "weights cut short": (
        lambda: (
            Path("t.safetensors").write_bytes(Path(weights("w.safetensors")).read_bytes()[:99])
            and teacher("t.safetensors")
        ),
        ("t.safetensors", "expected a whole weights file"),
    ),
    "classes of other data": (
        lambda: [*teacher(weights("t.safetensors"), num_classes=10), "--set", "data=nowhere"],
        ("nowhere", "expected"),
    ),
    "an unknown tracker": (
        lambda: ["--set", "trainer.track=[tensorbord]"],
        ("trainer.track", "did you mean 'tensorboard'"),
    ),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_wrong_request_exits_2_says_what_to_do_and_leaves_nothing(request_, program):
    make, told = REQUESTS[request_]
    code, _, err = program(*RUN, *make())
    assert code == 2, err
    for words in told:
        assert words in err
    assert not Path("run").exists()
    assert not Path("exploded").exists()


def test_a_missing_package_exits_2_with_the_one_command(program, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    code, _, err = program(*RUN, "--set", "trainer.track=[tensorboard]")
    assert code == 2
    assert "pip install 'vestige[track]'" in err
    assert not Path("run").exists()


def test_a_folder_in_which_another_process_runs_is_refused_and_left_alone(program, whole):
    import shutil

    shutil.copytree(whole, "run")
    Path("run/summary.json").unlink()
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    with locked(Path("run")):
        code, _, err = program(*RUN, "--resume")
        assert code == 2
        assert "another process is running in run; wait for it or name another folder" in err
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert {p for p in after if p.name != LOCK} == set(before)
    assert all(after[path] == content for path, content in before.items())


# A run folder that somebody damaged

GARBAGE = {
    "empty": b"",
    "binary": bytes(range(256)),
    "a list": b"[1, 2]",
    "a number": b"3",
    "cut": b'{"schema": 1, "meth',
    "other keys": b'{"a": {"b": [null]}}',
    "wrong kinds": b'{"complete": true, "student": 3, "real_data": 1, "weights": [], "input": 3}',
    "deep": b"[" * 100_000,
}


KINDS = [
    name
    if name in ("binary", "a list", "wrong kinds")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in GARBAGE
]


@pytest.fixture
def copied(whole, program) -> Path:
    import shutil

    shutil.copytree(whole, "run")
    return Path("run")


@pytest.mark.parametrize("garbage", KINDS)
@pytest.mark.parametrize("file", ["summary.json", "run.json", "metrics.jsonl", "evaluation.json"])
def test_a_damaged_record_is_made_again_and_the_page_does_without(file, garbage, copied, program):
    student_before = student(copied)
    (copied / file).write_bytes(GARBAGE[garbage])
    code, _, err = program("report", "run", "--out", "page.html")
    assert code == 0, err
    assert Path("page.html").stat().st_size > 10_000
    code, _, err = program(*RUN, "--resume")
    assert code == 0, err
    assert student(copied) == student_before
    assert json.loads((copied / "summary.json").read_text())["steps"] == STEPS


@pytest.mark.parametrize("garbage", KINDS)
def test_a_damaged_recipe_is_not_resumed_and_nothing_is_lost(garbage, copied, program):
    (copied / "recipe.yaml").write_bytes(GARBAGE[garbage])
    before = student(copied)
    code, _, err = program(*RUN, "--resume")
    assert code == 2, err
    assert "run" in err and ("recipe.yaml" in err or "other settings" in err)
    assert student(copied) == before
    code, _, err = program("report", "run", "--out", "page.html")
    assert code == 0, err


@pytest.mark.parametrize("garbage", KINDS)
def test_a_damaged_card_is_named(garbage, copied, program):
    (copied / "student.json").write_bytes(GARBAGE[garbage])
    code, _, err = program("evaluate", "run")
    assert code == 2, err
    assert "student.json" in err


def test_a_damaged_arm_is_run_again(program, tmp_path):
    demo = ("demo", "--preset", "smoke", "--set", "trainer.device=cpu", "--out", "demo")
    assert program(*demo)[0] == 0
    before = json.loads(Path("demo/summary.json").read_text())["arms"]
    names = sorted(path.name for path in Path("demo/arms").iterdir())
    Path("demo/arms", names[0], "summary.json").write_bytes(b"{")
    Path("demo/arms", names[1], "run.json").write_bytes(b"[]")
    code, _, err = program(*demo, "--resume")
    assert code == 0, err
    assert json.loads(Path("demo/summary.json").read_text())["arms"] == before
