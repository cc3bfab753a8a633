"""Logging, evaluation, budgets, faults and resuming: what happens between two steps."""

import copy
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from vestige.core import modes
from vestige.core.optim import factory
from vestige.core.types import Batch, InputSpec, Loss, Requires, Result, Step, predict
from vestige.errors import CheckpointError, ContractError, Interrupted, NonFiniteLossError
from vestige.methods.kd import KD, KDConfig
from vestige.sources.noise import NoiseSource
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.checkpoint import CheckpointStore
from vestige.training.diagnosis import Diagnosis
from vestige.training.outcome import Outcome
from vestige.training.run_state import KEPT_STATE
from vestige.training.tracking import Event
from vestige.training.tracking.metrics import MetricsFile, read_metrics
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(1, 8, 8)
ROUNDS, ITERATIONS, ROWS = 4, 3, 8
STEPS = ROUNDS * ITERATIONS

Nets = tuple[nn.Module, nn.Module]


@pytest.fixture
def nets(tiny_teacher, dropout_student) -> Nets:
    return tiny_teacher, dropout_student


class Killed(Exception):
    """The process is gone, as far as the run can tell."""


def at_step(number: int, act: Callable[[], Any]) -> Callable[[Event], None]:
    """A callback that does something at a step."""

    def callback(event: Event) -> None:
        if event.kind == "step" and event.data["step"] == number:
            act()

    return callback


def die() -> None:
    raise Killed


def trainer(
    nets: Nets,
    out: Path | None = None,
    *,
    source: Any = None,
    method: Callable[..., Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    **given: Any,
) -> Trainer:
    teacher, student = (copy.deepcopy(net) for net in nets)
    config = {"device": "cpu", "log_every": 1, **(settings or {})}
    task, teachers = Classification(SPEC, 3), [WhiteBoxTeacher(teacher)]
    sources = {"inputs": source or NoiseSource(SPEC)}
    cfg = KDConfig(rounds=ROUNDS, iterations=ITERATIONS, batch_size=ROWS)
    built = (method or KD)(cfg, task, teachers, student, sources)
    return Trainer(
        built,
        task,
        teachers=teachers,
        student=student,
        sources=sources,
        out=out,
        config=TrainerConfig(**config),
        **given,
    )


def run(nets: Nets, out: Path | None = None, *, resume: bool = False, **given: Any) -> Trainer:
    made = trainer(nets, out, **given)
    made.outcome = made.run(resume=resume)
    return made


def same(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


class TwoLoops:
    """Imitates in two loops, each with an optimizer of its own."""

    Config = BaseModel
    requires = Requires()

    def __init__(self, cfg: Any, task: Any, teachers: Any, student: Any, sources: Any) -> None:
        self.teacher, self.student = teachers[0], student

    def parts(self) -> dict[str, Any]:
        return {"student": self.student}

    def run(self, ctx: Any) -> Iterator[Step]:
        for name in ("first", "second"):
            optimizer = ctx.optimizer(name, self.student.parameters(), factory("adam", 0.01))
            modes.train_mode(self.student)
            for _ in ctx.rounds(name, 2):
                for _ in range(ITERATIONS):
                    batch = Batch(inputs=torch.randn(ROWS, 1, 8, 8, generator=ctx.rng))
                    yield ctx.update("student", self.student, self.loss, batch, optimizer)

    def loss(self, student: Any, batch: Batch) -> Loss:
        teacher, answer = predict(self.teacher, batch.inputs), predict(student, batch.inputs)
        total = batch.mean((answer.logits - teacher.logits).abs().mean(1))
        return Loss({"l1": total}, total, batch.inputs, teacher, answer)

    def result(self) -> Result:
        return Result("student", self.student)

    def passes(self, cfg: Any) -> Mapping[str, float]:
        return {}


# Outcome


def test_the_outcome_says_what_was_done(nets):
    made = run(nets, evaluate=lambda student: {"accuracy": 0.5})
    outcome: Outcome = made.outcome
    assert outcome.complete
    assert outcome.steps == STEPS
    assert outcome.teacher_queries == STEPS * ROWS
    assert outcome.result == Result("student", made.student)
    assert [score["step"] for score in outcome.scores] == [3, 6, 9, 12]
    assert outcome.seconds > 0


@pytest.mark.parametrize("normed", [True, False])
def test_the_weight_of_statistics_is_no_knob_where_the_teacher_has_none(nets, monkeypatch, normed):
    asked = []
    monkeypatch.setattr(Diagnosis, "findings", lambda self, settings: asked.append(settings) or [])

    class Weighed(KD):
        class Config(KDConfig):
            bn_weight: float = 0.0

    teacher = nets[0] if normed else nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    run((teacher, nets[1]), method=Weighed)
    assert ("bn_weight" in asked[0]) == normed
    assert "rounds" in asked[0]


def test_events_come_in_order(nets):
    events: list[tuple[str, int | None]] = []
    run(
        nets,
        evaluate=lambda student: {"accuracy": 0.5},
        settings={"log_every": 2, "evaluate_every": 3},
        callbacks=[lambda event: events.append((event.kind, event.data.get("step")))],
    )
    rounds = [(kind, step) for kind, step in events if kind in ("round", "evaluation")]
    assert events[0] == ("start", 0)
    assert events[-1] == ("end", STEPS)
    assert rounds == [
        ("round", 3),
        ("round", 6),
        ("evaluation", 9),
        ("round", 9),
        ("evaluation", 12),
        ("round", 12),
    ]
    assert [step for kind, step in events if kind == "step"] == [2, 4, 6, 8, 10, 12]


# Evaluation


def test_evaluation_and_callbacks_bend_nothing(nets):
    def judge(student: nn.Module) -> dict[str, float]:
        student.eval()
        torch.rand(7), np.random.random(5), random.random()
        return {"accuracy": float(student(torch.randn(4, 1, 8, 8)).detach().mean())}

    def chatter(event: Event) -> None:
        torch.rand(3), np.random.random(), random.random()

    plain = run(nets)
    assert same(plain.student, run(nets, evaluate=judge, callbacks=[chatter]).student)
    often = run(nets, evaluate=judge, settings={"evaluate_every": 3, "log_every": 5})
    assert same(plain.student, often.student)
    # Dropout draws from the global generator, so the statement is not empty.
    other = run(nets, seed=1)
    assert not same(plain.student, other.student)


def test_evaluation_sees_eval_mode_only_if_it_asks_and_flags_come_back(nets):
    flags: list[dict[str, bool]] = []

    def judge(student: nn.Module) -> dict[str, float]:
        flags.append(modes.flags(student))
        student.eval()
        return {"accuracy": 0.0}

    run(nets, evaluate=judge)
    # Train mode each time: what the evaluation before did was undone.
    assert all(all(found.values()) for found in flags)
    assert len(flags) == ROUNDS


# Budgets


def weights_after(nets: Nets, rounds: int) -> dict[str, Tensor]:
    """The student of an unlimited run at the end of a round."""
    kept: dict[str, Tensor] = {}

    def keep(event: Event) -> None:
        if event.kind == "round" and event.data["round"] == rounds:
            kept.update(copy.deepcopy(made.student.state_dict()))

    made = trainer(nets, callbacks=[keep])
    made.run()
    return kept


@pytest.mark.parametrize(("max_steps", "rounds"), [(1, 1), (3, 1), (4, 2), (9, 3)])
def test_a_step_budget_stops_at_a_round_end_and_bends_no_schedule(
    nets, max_steps, rounds, tmp_path
):
    made = run(nets, tmp_path, settings={"max_steps": max_steps})
    assert not made.outcome.complete
    assert made.outcome.steps == rounds * ITERATIONS
    # KD's rate falls along a cosine over all rounds: these weights would differ if it were bent.
    expected = weights_after(nets, rounds)
    assert all(torch.equal(expected[n], v) for n, v in made.student.state_dict().items())
    # With a larger budget it goes on as if it had never stopped.
    resumed = run(nets, tmp_path, resume=True)
    assert resumed.outcome.complete
    assert same(resumed.student, run(nets).student)


@pytest.mark.parametrize("max_steps", [STEPS, STEPS + 1])
def test_a_budget_that_suffices_leaves_the_run_complete(nets, max_steps):
    outcome = run(nets, settings={"max_steps": max_steps}).outcome
    assert outcome.complete
    assert outcome.steps == STEPS


def test_a_budget_that_ends_with_a_loop_lets_no_further_one_begin(nets, tmp_path):
    made = run(nets, tmp_path, method=TwoLoops, settings={"max_steps": 2 * ITERATIONS})
    assert made.outcome.steps == 2 * ITERATIONS
    assert not made.outcome.complete
    resumed = run(nets, tmp_path, method=TwoLoops, resume=True)
    assert resumed.outcome.complete
    assert resumed.outcome.steps == 4 * ITERATIONS
    assert same(resumed.student, run(nets, method=TwoLoops).student)


class Slow(NoiseSource):
    """Takes ten seconds a draw, by a clock that is turned by hand."""

    def __init__(self, spec: InputSpec, clock: list[float]) -> None:
        super().__init__(spec)
        self.clock = clock

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        self.clock[0] += 10
        return super().draw(count, rng)


def test_a_minutes_budget_says_at_once_how_many_rounds_fit(nets, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(
        "vestige.training.budget.time", SimpleNamespace(perf_counter=lambda: clock[0])
    )
    warned: list[tuple[float, str]] = []

    def listen(event: Event) -> None:
        if event.kind == "warning":
            warned.append((clock[0], event.data["message"]))

    made = run(nets, source=Slow(SPEC, clock), settings={"minutes": 1.4}, callbacks=[listen])
    # 84 seconds: two rounds of 30 fit, and the third is the one in which the time runs out.
    assert made.outcome.steps == 3 * ITERATIONS
    assert not made.outcome.complete
    assert len(warned) == 1
    when, message = warned[0]
    assert when == 30
    assert "1.4 minutes is enough for about 2 of 4 rounds of 'distill'" in message
    expected = weights_after(nets, 3)
    assert all(torch.equal(expected[n], v) for n, v in made.student.state_dict().items())


def test_without_a_callback_a_warning_is_logged(nets, caplog):
    with caplog.at_level(logging.WARNING):
        assert run(nets, settings={"minutes": 1e-9}).outcome.steps == ITERATIONS
    assert "schedules are not shortened" in caplog.text


def test_a_minutes_budget_that_suffices_is_silent(nets):
    warned: list[Event] = []

    def listen(event: Event) -> None:
        if event.kind == "warning" and "budget" in event.data["message"]:
            warned.append(event)

    assert run(nets, settings={"minutes": 60}, callbacks=[listen]).outcome.complete
    assert warned == []


def test_the_time_of_earlier_parts_counts(nets, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(
        "vestige.training.budget.time", SimpleNamespace(perf_counter=lambda: clock[0])
    )
    source = Slow(SPEC, clock)
    run(nets, tmp_path, source=source, settings={"max_steps": 6})
    clock[0] += 1e6  # the pause does not
    assert run(nets, tmp_path, source=source, resume=True).outcome.seconds == 10 * STEPS


# Faults


class Poisoned(NoiseSource):
    """Gives NaN from one draw on."""

    def __init__(self, bad: int, value: float) -> None:
        super().__init__(SPEC)
        self.left, self.value = bad, value

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        self.left -= 1
        drawn = super().draw(count, rng)
        return torch.full_like(drawn, self.value) if self.left <= 0 else drawn


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize(("bad", "kept"), [(1, 0), (5, 3), (6, 3), (12, 9)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_loss_that_is_not_finite_is_named_and_the_checkpoint_kept(
    nets, tmp_path, bad, kept, value, log_every
):
    settings = {"log_every": log_every}
    message = f"at step {bad}, expected.*lower the learning rates.*at step {kept}, is kept"
    with pytest.raises(NonFiniteLossError, match=message):
        run(nets, tmp_path, source=Poisoned(bad, value), settings=settings)
    state = CheckpointStore(tmp_path / "checkpoints").load()
    assert state["context"]["progress"]["steps"] == kept
    assert all(torch.isfinite(value).all() for value in state["parts"]["method.student"].values())
    # With what caused it mended, the run goes on and ends as if nothing had been.
    resumed = run(nets, tmp_path, resume=True, settings=settings)
    assert same(resumed.student, run(nets).student)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "act", [interrupt, lambda: os.kill(os.getpid(), signal.SIGTERM)], ids=["ctrl-c", "sigterm"]
)
@pytest.mark.parametrize(("step", "kept"), [(2, 0), (5, 3), (6, 3), (8, 6)])
def test_an_interrupted_run_says_how_many_steps_will_be_repeated(nets, tmp_path, act, step, kept):
    handler = signal.getsignal(signal.SIGTERM)
    message = f"at step {step}; --resume goes on from step {kept}, so {step - kept} steps"
    with pytest.raises(Interrupted, match=message):
        run(nets, tmp_path, callbacks=[at_step(step, act)])
    assert signal.getsignal(signal.SIGTERM) is handler
    assert same(run(nets, tmp_path, resume=True).student, run(nets).student)


def test_an_interrupted_run_without_a_folder_says_that_nothing_is_kept(nets):
    with pytest.raises(Interrupted, match="nothing was kept"):
        run(nets, callbacks=[at_step(2, interrupt)])


# Resuming


@pytest.mark.parametrize("step", [1, 3, 7, 9, 10, 12])
def test_metrics_have_every_step_once_after_a_kill(nets, tmp_path, step):
    settings = {"log_every": 2, "checkpoint_every": 2}
    given = {"settings": settings, "evaluate": lambda student: {"accuracy": 0.25}}
    run(nets, tmp_path / "whole", **given)

    def rows(name: str) -> list[dict[str, Any]]:
        found = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{key: row[key] for key in row if key != "seconds"} for row in found]

    whole = rows("whole")
    assert [row["step"] for row in whole if row["kind"] == "step"] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert [row["step"] for row in whole if row["kind"] == "round"] == [3, 6, 9, 12]
    assert [row["step"] for row in whole if row["kind"] == "evaluation"] == [3, 6, 9, 12]

    draws = [0]

    class Deadly(NoiseSource):
        def draw(self, count: int, rng: torch.Generator) -> Tensor:
            draws[0] += 1
            if draws[0] == step:
                raise Killed
            return super().draw(count, rng)

    with pytest.raises(Killed):
        run(nets, tmp_path / "cut", source=Deadly(SPEC), **given)
    run(nets, tmp_path / "cut", resume=True, **given)
    assert rows("cut") == whole


def test_a_line_that_a_kill_cut_short_is_dropped(nets, tmp_path):
    run(nets, tmp_path, settings={"max_steps": 3})
    path = tmp_path / "metrics.jsonl"
    complete = path.read_text()
    with open(path, "a") as stream:
        stream.write('{"kind": "step", "st')
    assert len(read_metrics(path)) == len(complete.splitlines())
    run(nets, tmp_path, resume=True)
    assert path.read_text().startswith(complete)
    steps = [row["step"] for row in read_metrics(path) if row["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))


def test_values_that_are_not_json_become_null(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.add("step", step=1, terms={"a": float("nan"), "b": [float("inf"), 1.5]}, total=2.0)
    metrics.flush()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row == {"kind": "step", "step": 1, "terms": {"a": None, "b": [None, 1.5]}, "total": 2.0}


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_checkpoint_costs_a_round_and_nothing_else(nets, tmp_path, damage):
    with pytest.raises(Killed):
        run(nets, tmp_path, callbacks=[at_step(11, die)])
    newest = max((tmp_path / "checkpoints").glob("*.safetensors"))
    data = newest.read_bytes()
    middle = len(data) // 2
    altered = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    newest.write_bytes(data[:middle] if damage == "truncated" else altered)
    steps: list[int] = []

    def begin(event: Event) -> None:
        if event.kind == "start":
            steps.append(event.data["step"])

    resumed = run(nets, tmp_path, resume=True, callbacks=[begin])
    assert steps == [6]
    assert same(resumed.student, run(nets).student)


@pytest.mark.parametrize("step", [2, 6, 7, 11])
def test_a_run_of_two_loops_resumes_in_the_right_one(nets, tmp_path, step):
    with pytest.raises(Killed):
        run(nets, tmp_path, method=TwoLoops, callbacks=[at_step(step, die)])
    resumed = run(nets, tmp_path, method=TwoLoops, resume=True)
    assert same(resumed.student, run(nets, method=TwoLoops).student)
    assert resumed.ctx.progress.steps == STEPS


def test_a_finished_run_is_finished(nets, tmp_path):
    given = {"evaluate": lambda student: {"accuracy": 0.25}}
    whole = run(nets, tmp_path, **given)
    again = run(nets, tmp_path, resume=True, **given)
    assert same(whole.student, again.student)
    assert again.outcome.steps == STEPS
    assert again.outcome.scores == whole.outcome.scores
    assert again.outcome.teacher_queries == whole.outcome.teacher_queries
    assert again.outcome.complete


def test_queries_are_counted_once_over_a_resumed_run(nets, tmp_path):
    with pytest.raises(Killed):
        run(nets, tmp_path, callbacks=[at_step(8, die)])
    assert run(nets, tmp_path, resume=True).outcome.teacher_queries == STEPS * ROWS


def test_resuming_without_a_checkpoint_starts_from_the_beginning(nets, tmp_path):
    assert same(run(nets, tmp_path / "new", resume=True).student, run(nets).student)


def test_a_run_that_is_not_resumed_starts_anew(nets, tmp_path):
    run(nets, tmp_path)
    made = run(nets, tmp_path, seed=1)
    assert same(made.student, run(nets, seed=1).student)
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert len([step for step in steps if step == 1]) == 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"identity": {"rounds": 5}}, "rounds"),
        ({"identity": {}}, "rounds"),
        ({"identity": {"rounds": 4, "more": 1}}, "more"),
    ],
    ids=str,
)
def test_other_settings_are_refused(nets, tmp_path, changed, named):
    given = {"identity": {"rounds": 4}}
    with pytest.raises(Killed):
        run(nets, tmp_path, callbacks=[at_step(8, die)], **given)
    with pytest.raises(CheckpointError, match=rf"started with other settings \({named}\)"):
        run(nets, tmp_path, resume=True, **{**given, **changed})
    # Refusing changed nothing.
    resumed = run(nets, tmp_path, resume=True, **given)
    assert same(resumed.student, run(nets).student)


def test_how_a_run_is_driven_may_change(nets, tmp_path):
    with pytest.raises(Killed):
        run(nets, tmp_path, callbacks=[at_step(8, die)])
    settings = {"log_every": 5, "evaluate_every": 2, "checkpoint_every": 3}
    resumed = run(nets, tmp_path, resume=True, settings=settings)
    assert same(resumed.student, run(nets).student)


def test_a_checkpoint_of_another_method_is_refused(nets, tmp_path):
    with pytest.raises(Killed):
        run(nets, tmp_path, callbacks=[at_step(8, die)])
    with pytest.raises(CheckpointError, match=r"stands in loop 'distill'.*began loop 'first'"):
        run(nets, tmp_path, method=TwoLoops, resume=True)


def test_a_checkpoint_of_another_version_is_refused(nets, tmp_path):
    with pytest.raises(Killed):
        run(nets, tmp_path, callbacks=[at_step(8, die)])
    store = CheckpointStore(tmp_path / "checkpoints")
    state = store.load()
    store.save(9, {key: state[key] for key in state if key not in ("moments", "shards")}, {})
    with pytest.raises(CheckpointError, match="holds nothing of moments; it is of another version"):
        run(nets, tmp_path, resume=True)


def test_what_a_checkpoint_holds_is_what_is_asked_for(nets, tmp_path):
    run(nets, tmp_path)
    state = CheckpointStore(tmp_path / "checkpoints").load()
    assert set(state) - {"shards"} == KEPT_STATE


def test_a_student_of_another_shape_is_refused(nets, tmp_path, tiny_student):
    with pytest.raises(Killed):
        run(nets, tmp_path, callbacks=[at_step(8, die)])
    with pytest.raises(CheckpointError, match=r"'method\.student' does not fit"):
        run((nets[0], tiny_student), tmp_path, resume=True)


def test_frozen_layers_stay_frozen_over_a_resume(nets, tmp_path):
    # Set by code that runs once: the flags are part of the state.
    class Freezes(KD):
        def run(self, ctx: Any) -> Iterator[Step]:
            for step in super().run(ctx):
                if ctx.progress.steps == 4:
                    self.student[1].eval()
                yield step

    with pytest.raises(Killed):
        run(nets, tmp_path, method=Freezes, callbacks=[at_step(8, die)])
    resumed = run(nets, tmp_path, method=Freezes, resume=True)
    assert same(resumed.student, run(nets, method=Freezes).student)


def test_a_teacher_that_moved_is_told_whoever_started_the_run(nets):
    made = trainer(nets)
    made.callbacks.append(at_step(2, lambda: made.teachers[0].module[1].running_mean.add_(1)))
    with pytest.raises(ContractError, match="teacher's weights changed during the run"):
        made.run()
