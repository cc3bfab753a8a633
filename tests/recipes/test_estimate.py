"""An estimate is near the truth and leaves no trace in the run that follows."""

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vestige.core import seeding
from vestige.recipes.build import Job, build
from vestige.recipes.estimate import Estimate, estimate
from vestige.recipes.loading import load_recipe
from vestige.training import passes

SMALL = ["data=null", "config.rounds=3", "config.iterations=2", "config.generator_width=4"]


def job(*overrides: str, recipe: str = "dfad", out: Path | None = None) -> Job:
    return build(load_recipe(recipe, preset="cpu", overrides=[*SMALL, *overrides]), out=out)


def trained(*, first: bool) -> tuple[dict[str, Any], Any]:
    """State of every part and of every stream after a run, with or without an estimate before."""
    built = job("config.replay=0.5", "config.batch_size=16")
    seeding.seed_globals(7)
    state = seeding.global_state()
    if first:
        assert estimate(built).minutes is not None
        now = seeding.global_state()
        assert torch.equal(now["torch"], state["torch"])
        assert now["python"] == state["python"]
        assert built.trainer.teachers[0].queries == 0
        assert built.trainer.ctx.progress.steps == 0
    outcome = built.trainer.run()
    parts = {name: part.state_dict() for name, part in built.trainer.method.parts().items()}
    return copy.deepcopy(parts), (outcome.steps, outcome.teacher_queries, built.trainer.ctx.state())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_a_run_after_an_estimate_is_bit_identical() -> None:
    assert same(trained(first=False), trained(first=True))


def test_teacher_passes_are_what_the_run_asks() -> None:
    built = job()
    assert estimate(built).teacher_passes == built.trainer.run().teacher_queries


def test_minutes_are_those_of_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which every pass takes a second."""
    clock = itertools.count()
    monkeypatch.setattr(passes, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    # Of 2 iterations: forwards 12 + 10 + 12, backwards 2 + 10 + 2, 2 with statistics, steps 10 + 2.
    seconds = estimate(job("config.batch_size=8")).minutes * 60
    assert seconds == pytest.approx(3 * (34 + 14 + 2 + 12))
    # Timed on 8 rows, since 64 promise to take too long; a step takes as long for any number.
    assert estimate(job()).minutes * 60 == pytest.approx(3 * (8 * (34 + 14 + 2) + 12))


def test_disk_is_enough_and_not_far_off(tmp_path: Path) -> None:
    built = job(out=tmp_path / "run")
    told = estimate(built).disk_mib
    assert told is not None
    assert not (tmp_path / "run").exists()
    built.trainer.run()
    written = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*") if p.is_file()) / 2**20
    assert written < told < written + 6


def test_budgets_are_taken_into_account() -> None:
    whole, half = estimate(job()), estimate(job("trainer.max_steps=18"))
    assert half.teacher_passes == whole.teacher_passes / 2
    short = estimate(job("config.rounds=100000", "trainer.minutes=0.5"))
    assert short.minutes == 0.5
    assert "trainer.minutes stops the run after 30 s" in short.unknown[0]


def test_what_cannot_be_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = job()
    monkeypatch.setattr(type(silent.trainer.method), "passes", lambda self, cfg: {})
    told = estimate(silent)
    assert told.minutes is None
    assert "does not say which passes it makes" in told.lines()[0]


def test_a_teacher_behind_an_interface_is_not_asked() -> None:
    recipe = load_recipe("kd", overrides=["data=null", "access=scores"])
    built = build(recipe)
    assert "No estimate" in estimate(built).lines()[0]
    assert built.trainer.teachers[0].queries == 0


def test_processes_that_wait_for_each_other_are_not_rehearsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = job()
    monkeypatch.setattr("vestige.core.parallel.world", lambda: 2)
    assert "several processes" in estimate(built).lines()[0]


def test_a_failing_copy_costs_only_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    built = job()

    def run(self: object, ctx: object) -> Any:
        raise RuntimeError("out of luck")
        yield

    monkeypatch.setattr(type(built.trainer.method), "run", run)
    assert "out of luck" in estimate(built).lines()[0]


def test_lines_are_for_people() -> None:
    assert Estimate(0.2, 1234567, 41.5).lines() == [
        "Estimate: about 12 s, 1,234,567 inputs through the teacher, 42 MiB on disk"
    ]
    assert Estimate(300.0, None, None, ("Not counted: x.",)).lines() == [
        "Estimate: about 5.0 h",
        "Not counted: x.",
    ]
