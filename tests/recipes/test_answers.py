"""`answers.png`: what a task draws of the answers to test inputs, once, after the last step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import Tensor, nn

import vestige
from vestige.core.types import InputSpec
from vestige.errors import ShapeError
from vestige.recipes.arms import run_arms
from vestige.recipes.catalog import TASKS
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
from vestige.recipes.schema import Recipe
from vestige.sources.noise import NoiseSource
from vestige.tasks.classification import Classification
from vestige.teachers.black_box import BlackBoxTeacher

SPEC = InputSpec.image(1, 8, 8)


@pytest.fixture
def smoke() -> Recipe:
    return load_recipe("dfad", preset="smoke", overrides=["trainer.device=cpu"])


def use(monkeypatch: pytest.MonkeyPatch, answers: Any) -> None:
    """Classification that draws; a class of its own, as what a class can do is remembered."""
    drawing = type("Drawing", (Classification,), {"answers": answers})
    monkeypatch.setattr(TASKS, "get", lambda name: drawing)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """What was asked of a task that draws a flat image of each input's class beside the input."""
    calls: list[tuple[Any, Any, Any]] = []

    def answers(
        self: Classification, student: nn.Module, teacher: Any, data: Any, *, count: int = 6
    ) -> Mapping[str, Tensor]:
        calls.append((student, teacher, data))
        inputs = data[0][:count]
        shown = {"input": self.spec.denormalize(inputs)}
        for name, network in (("teacher", teacher), ("student", student)):
            if network is not None:
                with torch.no_grad():
                    shares = network(inputs).argmax(1) / self.num_classes
                shown[name] = shares.view(-1, 1, 1, 1).expand_as(inputs)
        return shown

    use(monkeypatch, answers)
    return calls


def size(path: Path) -> tuple[int, int]:
    height, width = matplotlib.image.imread(path).shape[:2]
    return height, width


def test_a_run_draws_once_and_shows_it(smoke: Recipe, tmp_path: Path, asked: list) -> None:
    run_recipe(smoke, tmp_path / "run")
    assert len(asked) == 1
    student, teacher, data = asked[0]
    assert not student.training and isinstance(teacher, nn.Module) and len(data[0]) == 500
    # Six rows of 16 pixels enlarged 8 times, three columns, headings and gaps.
    assert size(tmp_path / "run/answers.png") == (8 + 22 + 6 * 136, 8 + 3 * 136)
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "What each says" in page


def test_a_task_that_draws_nothing_leaves_no_picture(smoke: Recipe, tmp_path: Path) -> None:
    run_recipe(smoke, tmp_path / "run")
    assert not (tmp_path / "run/answers.png").exists()
    assert "What each says" not in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_drawing_changes_nothing_of_the_run(smoke: Recipe, tmp_path: Path, monkeypatch) -> None:
    run_recipe(smoke, tmp_path / "plain", report=False)
    empty = {"input": torch.zeros(0, 1, 4, 4)}
    use(monkeypatch, lambda *given, **more: empty)
    run_recipe(smoke, tmp_path / "drawn", report=False)
    assert not (tmp_path / "drawn/answers.png").exists()
    first, second = (
        (tmp_path / name / "student.safetensors").read_bytes() for name in ("plain", "drawn")
    )
    assert first == second


def test_arms_have_a_picture_each_and_the_whole_its_headlines(tmp_path: Path, asked: list) -> None:
    recipe = load_recipe("demo", preset="smoke", overrides=["trainer.device=cpu"])
    run_arms(recipe, tmp_path / "arms")
    drawn = {path.parent.name for path in (tmp_path / "arms/arms").glob("*/answers.png")}
    assert drawn == set(recipe.arms) and len(asked) == len(drawn)
    headline = tmp_path / "arms/arms" / str(recipe.headline) / "answers.png"
    assert (tmp_path / "arms/answers.png").read_bytes() == headline.read_bytes()


def test_distill_draws_and_asks_no_black_box_for_it(
    tiny_teacher: nn.Module, tiny_student: nn.Module, tmp_path: Path, asked: list
) -> None:
    data = torch.rand(40, 1, 8, 8), torch.randint(3, (40,))
    given: dict[str, Any] = {
        "method": "kd",
        "spec": SPEC,
        "num_classes": 3,
        "sources": {"inputs": NoiseSource(SPEC)},
        "config": {"rounds": 1, "iterations": 2, "batch_size": 5},
        "device": "cpu",
    }
    black = BlackBoxTeacher(tiny_teacher, budget=10)
    vestige.distill(black, tiny_student, evaluate=data, out=tmp_path / "black", **given)
    assert black.queries == 10 and asked[0][1] is None
    assert size(tmp_path / "black/answers.png") == (8 + 22 + 6 * 136, 8 + 2 * 136)
    vestige.distill(tiny_teacher, tiny_student, evaluate=data, out=tmp_path / "white", **given)
    assert asked[1][1] is tiny_teacher
    assert size(tmp_path / "white/answers.png") == (8 + 22 + 6 * 136, 8 + 3 * 136)
    vestige.distill(tiny_teacher, tiny_student, evaluate=data, **given)
    vestige.distill(
        tiny_teacher, tiny_student, evaluate=lambda student: {"accuracy": 0.5},
        out=tmp_path / "callable", **given,
    )  # fmt: skip
    assert len(asked) == 2 and not (tmp_path / "callable/answers.png").exists()


def test_columns_that_do_not_fit_are_named(smoke: Recipe, tmp_path: Path, monkeypatch) -> None:
    wrong = {"input": torch.zeros(2, 1, 4, 4), "truth": torch.zeros(3, 1, 4, 4)}
    use(monkeypatch, lambda *given, **more: wrong)
    with pytest.raises(ShapeError, match=r"'truth': \(3, 4, 4\).* the same for all"):
        run_recipe(smoke, tmp_path / "run")
    # What was learned is there all the same.
    assert (tmp_path / "run/student.safetensors").is_file()
