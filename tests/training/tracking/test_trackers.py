"""The metrics file, and what trackers are told: each row once, whatever fails or is resumed."""

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError

from vestige.core.types import InputSpec
from vestige.errors import MissingExtraError, RecipeError
from vestige.methods.kd import KD, KDConfig
from vestige.sources.noise import NoiseSource
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.tracking import Event, trackers
from vestige.training.tracking.backends import TrackedRun
from vestige.training.tracking.metrics import MetricsFile, read_metrics, scalars_of
from vestige.training.tracking.trackers import Trackers
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(1, 8, 8)
ROUNDS, ITERATIONS = 4, 3
STEPS = ROUNDS * ITERATIONS


class Recorder:
    """A tracker that remembers; `runs` outlives it, as a server would."""

    runs: ClassVar[dict[str, list[tuple[Any, ...]]]] = {}
    fail: ClassVar[str] = ""

    def __init__(self, run: TrackedRun) -> None:
        self.said = self.runs.setdefault(run.id, [])
        self._say("start", run)

    def _say(self, kind: str, *what: Any) -> None:
        if self.fail == kind:
            raise ConnectionResetError("the other side is gone")
        torch.rand(3)  # other people's code draws, too
        self.said.append((kind, *what))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._say("scalars", step, dict(values))

    def picture(self, step: int, picture: Any) -> None:
        self._say("picture", step, picture)

    def note(self, step: int, text: str) -> None:
        self._say("note", step, text)

    def summary(self, step: int, values: Mapping[str, Any]) -> None:
        self._say("summary", step, values)

    def close(self, *, failed: bool) -> None:
        self._say("close", failed)


@pytest.fixture
def recorder(monkeypatch):
    """Stands for TensorBoard; gives what it was told by run."""
    monkeypatch.setattr(Recorder, "runs", {})
    monkeypatch.setattr(Recorder, "fail", "")
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Recorder)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    return Recorder


def trainer(nets, out: Path | None, track=("tensorboard",), **given: Any) -> Trainer:
    teacher, student = (copy.deepcopy(net) for net in nets)
    task, teachers = Classification(SPEC, 3), [WhiteBoxTeacher(teacher)]
    sources = {"inputs": NoiseSource(SPEC)}
    cfg = KDConfig(rounds=ROUNDS, iterations=ITERATIONS, batch_size=8)
    settings = given.pop("settings", {})
    return Trainer(
        KD(cfg, task, teachers, student, sources),
        task,
        teachers=teachers,
        student=student,
        sources=sources,
        out=out,
        evaluate=lambda net: {"accuracy": 0.25},
        config=TrainerConfig(device="cpu", log_every=1, track=track, **settings),
        identity={"rounds": ROUNDS},
        **given,
    )


@pytest.fixture
def nets(tiny_teacher, dropout_student):
    return tiny_teacher, dropout_student


def told(said: list[tuple[Any, ...]], kind: str) -> list[tuple[Any, ...]]:
    return [entry[1:] for entry in said if entry[0] == kind]


class Killed(Exception):
    pass


def at_step(number: int):
    def callback(event: Event) -> None:
        if event.kind == "step" and event.data["step"] == number:
            raise Killed

    return callback


# The metrics file


def test_rows_are_handed_on_after_they_were_written(tmp_path):
    path, seen = tmp_path / "metrics.jsonl", []
    metrics = MetricsFile(path, lambda rows: seen.append((rows, read_metrics(path))))
    metrics.add("step", step=1, total=float("nan"))
    metrics.flush()
    metrics.flush()
    row = {"kind": "step", "step": 1, "total": None}
    assert seen == [([row], [row])]


def test_the_bytes_of_a_broken_file_end_its_rows_and_raise_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "step"}\n\xff\xfe{"kind"\n{"kind": "round"}\n')
    assert read_metrics(path) == [{"kind": "step"}]


def test_names_say_role_term_and_kind():
    rows = [
        {
            "kind": "step",
            "step": 3,
            "role": "student",
            "terms": {"l1": 0.5, "kl": None},
            "total": 1,
        },
        {"kind": "step", "step": 3, "role": "source", "terms": {}, "total": -2.0},
        {
            **{"kind": "round", "step": 3, "round": 1, "agreement": 0.5},
            **{"classes": [3, 0, 1, 0], "train_eval_agreement": None},
        },
        {"kind": "evaluation", "step": 3, "round": 1, "scores": {"accuracy": 0.75}},
    ]
    assert scalars_of(rows) == {
        **{"student/l1": 0.5, "student/total": 1.0, "source/total": -2.0},
        **{"round/number": 1.0, "round/agreement": 0.5, "round/class_coverage": 0.5},
        "test/accuracy": 0.75,
    }


# What is refused before a run


def test_an_unknown_name_is_told_with_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match=r"'tensorbord'.*did you mean 'tensorboard'"):
        Trackers(["tensorbord"], tmp_path, {})
    with pytest.raises(ValidationError, match="did you mean 'wandb'"):
        TrainerConfig(track=("wandbb",))


def test_a_name_twice_and_a_run_without_folder_are_refused(recorder):
    with pytest.raises(RecipeError, match="each name once"):
        Trackers(["tensorboard", "tensorboard"], Path("x"), {})
    with pytest.raises(RecipeError, match="without a run folder"):
        Trackers(["tensorboard"], None, {})
    assert not Trackers([], None, {})


@pytest.mark.parametrize(
    ("name", "command"),
    [("tensorboard", r"pip install 'vestige\[track\]'"), ("mlflow", "pip install mlflow")],
)
def test_a_package_that_is_missing_is_told_with_its_command(name, command, nets, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=command):
        trainer(nets, Path("never-made"), track=(name,))
    assert not Path("never-made").exists()


def test_only_the_first_of_several_processes_tells(monkeypatch, tmp_path, recorder):
    monkeypatch.setattr(trackers.parallel, "rank", lambda: 1)
    assert not Trackers(["tensorboard"], tmp_path, {})


# What is told


def test_a_tracker_hears_of_everything_in_order(nets, tmp_path, recorder):
    made = trainer(nets, tmp_path)
    with made.trackers:
        made.run()
        made.trackers.summary({"steps": STEPS, "student": {"score": 0.25}})
    ((run, said),) = recorder.runs.items()
    assert told(said, "start")[0][0].config["rounds"] == ROUNDS
    assert told(said, "start")[0][0].config["trainer"]["track"] == ["tensorboard"]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    scalars = told(said, "scalars")
    assert [step for step, _ in scalars] == list(range(1, STEPS + 1))
    for step, values in scalars:
        assert values == scalars_of([row for row in rows if row["step"] == step])
    assert "test/accuracy" in scalars[-1][1] and "round/class_coverage" in scalars[-1][1]
    pictures = told(said, "picture")
    assert [step for step, _ in pictures] == [3, 6, 9, 12]
    assert all(picture.ndim == 3 and picture.dtype == "uint8" for _, picture in pictures)
    # Steps never go back: a picture comes after the rows of its step.
    order = [entry[1] for entry in said if entry[0] in ("scalars", "picture")]
    assert order == sorted(order)
    assert said[-2:] == [("summary", STEPS, told(said, "summary")[0][1]), ("close", False)]
    state = json.loads((tmp_path / "trackers/state.json").read_text())
    assert state == {"tensorboard": {"id": run, "step": STEPS}}


def test_findings_and_warnings_are_notes(nets, tmp_path, recorder, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(nets, tmp_path, settings={"minutes": 1e-9}).run()
    (said,) = recorder.runs.values()
    assert any("schedules are not shortened" in text for _, text in told(said, "note"))


def test_trackers_bend_nothing(nets, tmp_path, recorder):
    with_one, without = trainer(nets, tmp_path / "a"), trainer(nets, tmp_path / "b", track=())
    with_one.run()
    without.run()
    other = without.student.state_dict()
    assert all(torch.equal(v, other[n]) for n, v in with_one.student.state_dict().items())


def test_a_failed_run_is_closed_as_failed(nets, tmp_path, recorder):
    with pytest.raises(Killed):
        trainer(nets, tmp_path, callbacks=[at_step(5)]).run()
    (said,) = recorder.runs.values()
    assert said[-1] == ("close", True)


# Resuming


@pytest.mark.parametrize("step", [1, 3, 5, 8, 10, 12])
@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_is_the_same_run_with_every_step_once(nets, tmp_path, recorder, step, every):
    settings = {"checkpoint_every": every}
    with pytest.raises(Killed):
        trainer(nets, tmp_path, callbacks=[at_step(step)], settings=settings).run()
    trainer(nets, tmp_path, settings=settings).run(resume=True)
    ((_, said),) = recorder.runs.items()
    assert [step for step, _ in told(said, "scalars")] == list(range(1, STEPS + 1))
    assert [step for step, _ in told(said, "picture")] == [3, 6, 9, 12]
    assert [run.resumed for (run,) in told(said, "start")] == [False, True]


def test_a_run_that_starts_anew_is_another_run(nets, tmp_path, recorder):
    trainer(nets, tmp_path).run()
    trainer(nets, tmp_path).run()
    assert [len(told(said, "scalars")) for said in recorder.runs.values()] == [STEPS, STEPS]


def test_a_tracker_that_is_added_on_resume_gets_what_was_before(nets, tmp_path, recorder):
    with pytest.raises(Killed):
        trainer(nets, tmp_path, track=(), callbacks=[at_step(8)]).run()
    trainer(nets, tmp_path).run(resume=True)
    (said,) = recorder.runs.values()
    assert [step for step, _ in told(said, "scalars")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"tensorboard": 3}', '{"tensorboard": {}}', "ü"])
def test_a_damaged_state_file_begins_a_new_run_with_everything(nets, tmp_path, recorder, text):
    with pytest.raises(Killed):
        trainer(nets, tmp_path, callbacks=[at_step(8)]).run()
    (tmp_path / "trackers/state.json").write_bytes(text.encode("latin-1"))
    trainer(nets, tmp_path).run(resume=True)
    said = list(recorder.runs.values())[-1]
    assert len(recorder.runs) == 2
    assert [step for step, _ in told(said, "scalars")] == list(range(1, STEPS + 1))


# Faults


@pytest.mark.parametrize("kind", ["start", "scalars", "picture", "note", "summary", "close"])
def test_a_tracker_that_fails_costs_a_warning_and_nothing_else(
    nets, tmp_path, recorder, monkeypatch, caplog, kind
):
    monkeypatch.setattr(recorder, "fail", kind)
    made = trainer(nets, tmp_path)
    with caplog.at_level(logging.WARNING), made.trackers:
        outcome = made.run()
        made.trackers.note(STEPS, "x")
        made.trackers.summary({"steps": STEPS})
    assert outcome.steps == STEPS and outcome.complete
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    failed = [r.getMessage() for r in caplog.records if "tracker 'tensorboard' failed" in r.message]
    assert len(failed) == 1
    assert "ConnectionResetError: the other side is gone" in failed[0]


def test_what_a_failed_tracker_missed_is_sent_on_resume(nets, tmp_path, recorder, monkeypatch):
    def break_it(event: Event) -> None:
        if event.kind == "step" and event.data["step"] == 5:
            monkeypatch.setattr(recorder, "fail", "scalars")
        if event.kind == "step" and event.data["step"] == 11:
            raise Killed

    with pytest.raises(Killed):
        trainer(nets, tmp_path, callbacks=[break_it]).run()
    monkeypatch.setattr(recorder, "fail", "")
    trainer(nets, tmp_path).run(resume=True)
    (said,) = recorder.runs.values()
    assert [step for step, _ in told(said, "scalars")] == list(range(1, STEPS + 1))


def test_a_stop_is_no_fault_of_the_tracker(nets, tmp_path, recorder, monkeypatch):
    def stop(self: Any, step: int, values: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recorder, "scalars", stop)
    from vestige.errors import Interrupted

    with pytest.raises(Interrupted, match="--resume goes on from step 0"):
        trainer(nets, tmp_path).run()
