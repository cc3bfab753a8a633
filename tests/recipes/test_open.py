"""What later systems bring needs no edit: their method, task, inputs, teachers and sources."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from vestige.core.types import Access, Batch, InputSpec, Loss, Requires, Result, predict
from vestige.errors import QueryBudgetExceeded, RecipeError
from vestige.losses.distill import l1_logits
from vestige.recipes.build import build
from vestige.recipes.loading import validate
from vestige.recipes.run import run_recipe


class Empty(BaseModel):
    """No settings."""


class Pairs:
    """A foreign method: two teachers, seen as far as the recipe shows them."""

    Config = Empty
    requires = Requires(
        access=Access.SCORES, tasks=("naming",), teachers=(2, 3), optional_sources=("inputs",)
    )

    def __init__(self, cfg, task, teachers, student, sources):
        self.task, self.teachers, self.student, self.sources = task, teachers, student, sources

    def parts(self):
        return {"student": self.student}

    def run(self, ctx):
        optimizer = ctx.optimizer("s", self.student.parameters(), lambda p: torch.optim.SGD(p, 0.1))
        for _ in ctx.rounds("distill", 2):
            batch = Batch(self.sources["inputs"].draw(4, ctx.rng))
            yield ctx.update("student", self.student, self.loss, batch, optimizer)

    def loss(self, student, batch):
        answers = torch.cat([predict(one, batch.inputs).logits for one in self.teachers], 1)
        total = batch.mean(l1_logits(predict(student, batch.inputs).logits, answers))
        return Loss({"l1": total}, total, batch.inputs)

    def result(self):
        return Result("student", self.student)

    def passes(self, cfg):
        return {}


class Impression:
    """A foreign method without a student: its result is inputs."""

    Config = Empty
    requires = Requires(tasks=("naming",), student=False)

    def __init__(self, cfg, task, teachers, student, sources):
        assert student is None
        self.teacher, self.spec = teachers[0], task.spec
        self.inputs = nn.Parameter(torch.zeros(2, *task.spec.shape))
        self.held = nn.ParameterDict({"inputs": self.inputs})

    def parts(self):
        return {"inputs": self.held}

    def run(self, ctx):
        optimizer = ctx.optimizer("inputs", [self.inputs], lambda p: torch.optim.SGD(p, 0.1))
        for _ in ctx.rounds("invert", 2):
            yield ctx.update("source", self.teacher, self.loss, Batch(self.inputs), optimizer)

    def loss(self, teacher, batch):
        total = -predict(teacher, batch.inputs).logits[:, 0].mean()
        return Loss({"score": total}, total, batch.inputs)

    def result(self):
        return Result("images", self.inputs.detach())

    def passes(self, cfg):
        return {}


class Naming:
    """A foreign task."""

    kind, metric, higher_is_better = "naming", "distance", False

    def __init__(self, spec, num_classes):
        self.spec, self.num_classes = spec, num_classes

    def check(self, model):
        predict(model, torch.zeros(2, *self.spec.shape))

    @torch.no_grad()
    def evaluate(self, model, data):
        return {"distance": float(predict(model, data).logits.abs().mean())}


class VectorSet:
    """A foreign kind of data set."""

    name, split, classes, fingerprint = "points", "test", (), "f" * 64

    @classmethod
    def open(cls, name, split):
        return cls()

    def __len__(self):
        return 3

    def inputs(self, spec):
        return torch.ones(3, *spec.shape)

    def examples(self, spec):
        return self.inputs(spec)


class Ones:
    origin, paths = "foreign", ()
    name = "ones"

    def __init__(self, spec, value):
        self.spec, self.value = spec, value

    def draw(self, count, rng):
        return torch.full((count, *self.spec.shape), self.value)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """As if another distribution offered all of it."""
    package = ModuleType("foreign_package")
    package.net = lambda outputs: nn.Sequential(nn.Flatten(), nn.Linear(6, outputs))
    package.ones = Ones
    monkeypatch.setitem(sys.modules, "foreign_package", package)
    offers = {
        "vestige.methods": {"pairs": Pairs, "impression-of-mine": Impression},
        "vestige.tasks": {"naming": Naming},
        "vestige.data": {"vector": VectorSet},
    }

    def points(group):
        found = offers.get(group, {})
        return [SimpleNamespace(name=n, load=lambda v=v: v) for n, v in found.items()]

    monkeypatch.setattr("vestige.core.registry.entry_points", points)


def recipe(**changes):
    teacher = {"factory": "foreign_package:net", "args": {"outputs": 2}, "num_classes": 2}
    return {
        "method": "pairs",
        "task": "naming",
        "data": "points",
        "input": {"kind": "vector", "shape": [2, 3]},
        "num_classes": 4,
        "teacher": teacher,
        "more_teachers": [teacher],
        "student": {"factory": "foreign_package:net", "args": {"outputs": 4}},
        "sources": {
            "inputs": {"kind": "factory", "factory": "foreign_package:ones", "args": {"value": 2.0}}
        },
        **changes,
    }


def test_a_foreign_method_task_input_and_source_run_from_a_recipe(tmp_path):
    summary = run_recipe(validate(recipe()), tmp_path / "run")
    assert (summary["method"], summary["task"], summary["metric"]) == (
        "pairs",
        "naming",
        "distance",
    )
    assert summary["steps"] == 2
    scores = [row["distance"] for row in build(validate(recipe())).trainer.run().scores]
    assert summary["student"]["score"] == scores[-1]
    assert summary["student"]["best_score"] == min(scores)
    assert summary["teacher_queries"] == 2 * 2 * 4
    assert [(item["name"], item["purpose"]) for item in summary["real_data"]] == [
        ("ones", "distillation"),
        ("points/test", "evaluation"),
    ]
    assert build(validate(recipe())).task.spec == InputSpec("vector", (2, 3))


def test_black_boxes_have_the_recipes_budget(tmp_path):
    shown = validate(recipe(access="scores", query_budget=7))
    job = build(shown)
    assert [teacher.access for teacher in job.trainer.teachers] == [Access.SCORES, Access.SCORES]
    with pytest.raises(QueryBudgetExceeded):
        job.trainer.run()
    with pytest.raises(RecipeError, match="query_budget: counts for a black box only"):
        validate(recipe(query_budget=7))
    with pytest.raises(RecipeError, match="access: 'pairs' needs scores, got labels"):
        validate(recipe(access="labels"))


def test_a_method_without_a_student_leaves_none(tmp_path):
    alone = recipe(method="impression-of-mine", more_teachers=[], sources={}, num_classes=2)
    del alone["student"]
    summary = run_recipe(validate(alone), tmp_path / "run")
    assert summary["student"] is None
    assert summary["result"] == {"kind": "images", "path": None}
    assert not (tmp_path / "run" / "student.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more_teachers": []}, "takes 2 to 3 teachers, got 1"),
        ({"student": None}, "student: 'pairs' trains one"),
        ({"task": "namin"}, "did you mean 'naming'"),
        ({"input": {"kind": "vector"}}, "give either shape, or channels, height and width"),
        ({"input": {"shape": [2], "channels": 1}}, "give either shape"),
        ({"input": {"channels": 3, "height": 4, "width": 4, "mean": [0.5]}}, "means and 0 stds"),
        ({"sources": {"inputs": {"kind": "factory"}}}, "factory: is missing"),
    ],
)
def test_what_does_not_fit_is_told(changes, message):
    with pytest.raises(RecipeError, match=message):
        validate(recipe(**changes))


def test_inputs_that_nobody_can_open_are_told():
    with pytest.raises(
        RecipeError, match="got input kind 'smell', expected one of audio, image, text, vector"
    ):
        build(validate(recipe(input={"kind": "smell", "shape": [2, 3]})))


def test_a_teacher_of_another_task_and_other_inputs_is_refused():
    with pytest.raises(RecipeError, match="task: got 'naming', expected 'classification'"):
        build(validate(recipe(more_teachers=["builtin:digits-convnet"])))
