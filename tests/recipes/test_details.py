"""What a run leaves for its page besides the summary: `evaluation.json` and inputs over time."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import vestige
from vestige.core.types import Access, InputSpec
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
from vestige.recipes.schema import Recipe
from vestige.sources.noise import NoiseSource
from vestige.tasks.classification import Classification
from vestige.teachers.black_box import BlackBoxTeacher
from vestige.training.summary import tensors_fingerprint
from vestige.training.tracking import Event

SPEC = InputSpec.image(1, 8, 8)


class Killed(BaseException):
    """Not an Exception, so that nothing on the way may swallow it."""


@pytest.fixture
def smoke() -> Recipe:
    return load_recipe("dfad", preset="smoke", overrides=["trainer.device=cpu"])


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_details_say_what_the_summary_says_and_are_asked_for_once(
    smoke: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    details = Classification.details

    def counted(self, student, teacher, data, **more):
        asked.append(student)
        return details(self, student, teacher, data, **more)

    monkeypatch.setattr(Classification, "details", counted)
    summary = run_recipe(smoke, tmp_path / "run")
    found = read(tmp_path / "run/evaluation.json")
    assert len(asked) == 1
    assert (found["schema"], found["task"], found["step"]) == (1, "classification", 24)
    assert found["classes"] == [str(digit) for digit in range(10)] and found["inputs"] == 500
    assert found["student"]["accuracy"] == summary["student"]["score"]
    assert found["teacher"]["accuracy"] == summary["teacher"]["score"]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    judged = [row for row in rows if row["kind"] == "evaluation"]
    # Five of the student's steps to one of the source's, two of these to a round.
    assert [(row["step"], row["student_steps"]) for row in judged] == [(12, 10), (24, 20)]
    assert 0 < judged[0]["seconds"] < judged[1]["seconds"]
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    share = found["agreement"]["share"]
    assert f'<data value="{share}">{100 * share:.1f} %</data>' in page
    for value in found["student"]["per_class"]:
        assert f'<data value="{value}">' in page


def test_a_resumed_run_leaves_the_same_strip_and_details(smoke: Recipe, tmp_path: Path) -> None:
    run_recipe(smoke, tmp_path / "whole", report=False)

    def kill(event: Event) -> None:
        if event.kind == "round":
            raise Killed

    with pytest.raises(Killed):
        run_recipe(smoke, tmp_path / "cut", callbacks=[kill], report=False)
    run_recipe(smoke, tmp_path / "cut", resume=True, report=False)
    for name in ("samples-over-time.png", "evaluation.json", "samples.png"):
        whole, cut = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "cut"))
        assert whole == cut, name


def test_a_black_box_of_a_recipe_is_asked_by_the_method_alone(tmp_path: Path) -> None:
    whole = load_recipe("demo", preset="smoke", overrides=["trainer.device=cpu"]).arm("noise")
    rows = run_recipe(whole, tmp_path / "white", report=False)["teacher_queries"]
    hidden = whole.model_copy(update={"access": Access.SCORES, "query_budget": rows})
    summary = run_recipe(hidden, tmp_path / "black", report=False)
    assert summary["teacher_queries"] == rows and summary["complete"]
    # The recipe owns the weights, so that its teacher can be judged beside the budget.
    assert read(tmp_path / "black/evaluation.json")["teacher"]["accuracy"] > 0.9


def test_distill_tells_details_and_asks_no_black_box_for_them(
    tiny_teacher: nn.Module, tiny_student: nn.Module, tmp_path: Path
) -> None:
    data = torch.randn(40, 1, 8, 8), torch.randint(3, (40,))
    given = {
        "method": "kd",
        "spec": SPEC,
        "num_classes": 3,
        "sources": {"inputs": NoiseSource(SPEC)},
        "config": {"rounds": 2, "iterations": 2, "batch_size": 5},
        "device": "cpu",
    }
    black = BlackBoxTeacher(tiny_teacher, budget=20)
    vestige.distill(black, tiny_student, evaluate=data, out=tmp_path / "black", **given)
    assert black.queries == 20
    found = read(tmp_path / "black/evaluation.json")
    assert found["teacher"] is None and found["agreement"] is None
    report = vestige.distill(tiny_teacher, tiny_student, evaluate=data, out=tmp_path / "w", **given)
    found = read(tmp_path / "w/evaluation.json")
    assert found["student"]["accuracy"] == report.summary["student"]["score"]
    assert found["teacher"]["accuracy"] == report.summary["teacher"]["score"]
    record = read(tmp_path / "w/run.json")["real_data"][0]
    assert record["fingerprint"] == tensors_fingerprint(*data) and record["images"] == 40


def test_a_callable_judge_leaves_no_details(
    tiny_teacher: nn.Module, tiny_student: nn.Module, tmp_path: Path
) -> None:
    vestige.distill(
        tiny_teacher, tiny_student, method="kd", spec=SPEC, num_classes=3,
        sources={"inputs": NoiseSource(SPEC)}, evaluate=lambda student: {"accuracy": 0.5},
        config={"rounds": 1, "iterations": 1, "batch_size": 4}, device="cpu", out=tmp_path / "run",
    )  # fmt: skip
    assert not (tmp_path / "run/evaluation.json").exists()
    assert "On real test data" not in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_a_fingerprint_of_tensors_tells_values_shapes_and_types_apart() -> None:
    base = torch.arange(6.0)
    others = [base + 1, base.view(2, 3), base.double(), base.to(torch.bfloat16), base[:5]]
    digests = {tensors_fingerprint(one) for one in [base, *others]}
    assert len(digests) == 6
    assert tensors_fingerprint(base.view(2, 3).T) == tensors_fingerprint(
        base.view(2, 3).T.contiguous()
    )
    assert tensors_fingerprint(base, base) != tensors_fingerprint(base)
