"""A teacher without BatchNorm is refused at once by what needs it, and told what does not."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import vestige
from vestige.core.types import InputSpec, Requires
from vestige.errors import NoBatchNormError, RecipeError
from vestige.recipes.build import build, build_method
from vestige.recipes.catalog import METHODS
from vestige.recipes.loading import load_recipe
from vestige.recipes.requirements import check_requirements, no_batchnorm
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher

SPEC = InputSpec.image(1, 8, 8)
TASK = Classification(SPEC, 3)
PLAIN = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def method(weight: float | None, **requires: Any) -> Any:
    """A method as the registry knows it; with a weight one that has the setting."""
    fields = {} if weight is None else {"bn_weight": SimpleNamespace(default=weight)}
    return SimpleNamespace(
        requires=Requires(**requires), Config=SimpleNamespace(model_fields=fields)
    )


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    known: dict[str, Any] = {
        "bare": method(None),
        "optional": method(0.0),
        "inverting": method(10.0),
        "statistical": method(None, batchnorm=True),
        "segmenting": method(None, tasks=("segmentation",)),
    }

    def get(name: str) -> Any:
        if known[name] is None:
            raise RecipeError("broken")
        return known[name]

    monkeypatch.setattr(METHODS, "names", lambda: list(known))
    monkeypatch.setattr(METHODS, "get", get)
    return known


def test_the_methods_that_work_are_named(registry: dict[str, Any]) -> None:
    registry["broken"] = None
    with pytest.raises(NoBatchNormError) as caught:
        check_requirements(
            "statistical", Requires(batchnorm=True), TASK, [WhiteBoxTeacher(PLAIN)], {}
        )
    assert str(caught.value) == (
        "'statistical' needs BatchNorm statistics, but the teacher has 0 BatchNorm layers that "
        "store them; take another method (bare, optional; with bn_weight: 0 inverting)"
    )


def test_a_setting_that_asks_for_it_can_be_switched_off(registry: dict[str, Any]) -> None:
    told = no_batchnorm("inverting", SimpleNamespace(bn_weight=0.5), "classification")
    assert told.startswith("'inverting' with bn_weight: 0.5 needs BatchNorm statistics")
    assert told.endswith("set bn_weight: 0, or take another method (bare, optional)")


def test_where_nothing_else_serves_the_task_another_teacher_does(registry: dict[str, Any]) -> None:
    told = no_batchnorm("segmenting", None, "segmentation")
    assert told.endswith("store them; take a teacher with BatchNorm")


def test_layers_without_running_statistics_are_none() -> None:
    network = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False), nn.Linear(64, 3)
    )
    with pytest.raises(NoBatchNormError):
        check_requirements("x", Requires(batchnorm=True), TASK, [WhiteBoxTeacher(network)], {})


WEIGHTED = [
    name for name in METHODS.names() if "bn_weight" in METHODS.get(name).Config.model_fields
]


@pytest.mark.parametrize("name", WEIGHTED)
def test_every_method_with_the_setting_is_refused_while_it_is_built(name: str) -> None:
    recipe = load_recipe(name, preset="smoke", overrides=["config.bn_weight=1"])
    bare = recipe.model_copy(
        update={"teacher": {"model": "lenet5"}, "input": _digits(), "num_classes": 10}
    )
    with pytest.raises(NoBatchNormError) as caught:
        build(bare.model_copy(update={"data": None}))
    told = str(caught.value)
    assert f"'{name}' with bn_weight: 1 needs BatchNorm statistics" in told
    assert "set bn_weight: 0, or take another method (" in told
    others = re.findall(r"[\w-]+", told.partition("take another method")[2])
    assert "kd" in others and name not in others


def _digits() -> Any:
    return load_recipe(
        "kd",
        preset="smoke",
        overrides=["input={channels: 1, height: 16, width: 16}"],
    ).input


def test_what_a_method_looks_up_while_it_is_built_is_no_question_to_the_teacher() -> None:
    class Looks:
        Config = requires = parts = run = result = passes = None

        def __init__(self, cfg: Any, task: Any, teachers: Any, *rest: Any) -> None:
            teachers[0](torch.zeros(1, 1, 8, 8, requires_grad=True))

    Looks.requires = Requires(student=False)
    teacher = WhiteBoxTeacher(PLAIN)
    teacher(torch.zeros(5, 1, 8, 8))
    build_method(Looks, None, TASK, [teacher], None, {}, seed=0)
    assert (teacher.queries, teacher.gradients) == (5, 0)


def test_python_is_told_the_same_before_the_first_step(tmp_path: Path) -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(NoBatchNormError, match=r"'dfad' with bn_weight: 2 .* set bn_weight: 0"):
        vestige.distill(
            PLAIN,
            student,
            method="dfad",
            spec=SPEC,
            num_classes=3,
            config={"bn_weight": 2, "rounds": 1},
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run/checkpoints").exists()
    assert all(torch.isfinite(weight).all() for weight in student.parameters())
