"""Runs of a teacher that writes, from the recipe to the files; a teacher that fails on the way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ngram import TOPICS, NGram, made_up

from vestige.core.writing import Sampling
from vestige.errors import DataError, QueryBudgetExceeded, RecipeError, TeacherError
from vestige.recipes.loading import validate
from vestige.recipes.run import run_recipe

CALLS: list[int] = []
FAILS: list[int] = []


def writer() -> Callable[[list[str]], list[str]]:
    """A callable that writes by the prompt and its place alone, and fails when `FAILS` says so."""
    teacher = NGram(made_up(200))

    def write(prompts: list[str]) -> list[str]:
        CALLS.append(len(prompts))
        if len(CALLS) in FAILS:
            raise ConnectionResetError("gone")
        rng = torch.Generator().manual_seed(len(CALLS) + 1000 * len(prompts[0]))
        return [teacher.generate([one], 1, Sampling(), rng)[0][0].text for one in prompts]

    return write


def unending() -> Callable[[list[str]], list[str]]:
    return lambda prompts: ["words without an end"] * len(prompts)


@pytest.fixture
def news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of made-up news in a data folder; nothing fails."""
    folder = tmp_path / "data" / "news"
    folder.mkdir(parents=True)
    for split, seed in (("train", 0), ("test", 1)):
        lines = [json.dumps({"text": t, "label": n}) for t, n in made_up(40, seed)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    (folder / "classes.json").write_text(json.dumps([*TOPICS]))
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path / "data"))
    CALLS.clear()
    FAILS.clear()
    return folder


def recipe(**given: Any) -> Any:
    teacher = {"factory": f"{__name__}:writer", "prompts": "ag-news"}
    raw = {
        "method": "zerogen",
        "task": "text",
        "data": "news",
        "teacher": teacher,
        "student": {"name": "tfidf-linear"},
        "trainer": {"device": "cpu"},
        "config": {"samples": 80, "round_texts": 40, "epochs": 4, "student_lr": 0.05},
    }
    return validate({**raw, **given})


def test_a_run_leaves_texts_card_student_and_page(news, tmp_path):
    summary = run_recipe(recipe(), tmp_path / "run")
    assert summary["student"]["score"] > 0.8
    assert summary["teacher"] == {"score": None, "parameters": 0}
    assert summary["teacher_queries"] == sum(CALLS) >= 80
    lines = (tmp_path / "run" / "synthetic.jsonl").read_text().splitlines()
    assert len(lines) == summary["records"]["texts"] == summary["images_made"]
    card = json.loads((tmp_path / "run" / "synthetic.json").read_text())
    assert card["prompts"]["name"] == "ag-news" and set(card["counts"]) == set(TOPICS)
    assert "What the teacher wrote" in (tmp_path / "run" / "report.html").read_text()
    # Nobody was trained on real texts; those of train tell how many labels are right.
    read = [(one["name"], one["by"], one["purpose"]) for one in summary["real_data"]]
    assert read == [
        ("news/test", "evaluation", "evaluation"),
        ("news/train", "quality report", "evaluation"),
    ]
    found = card["quality"]["correctness"]
    assert found == summary["records"]["correctness"] and found["data"] == "news/train"
    assert found["agreement"] > 0.95 and found["texts"] == len(lines)
    assert "a classifier of real texts agrees with" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("gone", ["file", "labels"])
def test_without_real_texts_nobody_says_how_many_labels_are_right(news, tmp_path, gone):
    if gone == "file":
        (news / "train.jsonl").unlink()
    else:
        line = json.dumps({"text": "a text", "label": 0})
        (news / "train.jsonl").write_text("\n".join([line] * 20))
    summary = run_recipe(recipe(), tmp_path / "run")
    assert summary["records"]["correctness"] is None
    assert [one["name"] for one in summary["real_data"]] == ["news/test"]
    assert "classifier of real texts" not in (tmp_path / "run/report.html").read_text()


def test_labels_that_are_wrong_are_found_whatever_the_student_learned(news, tmp_path):
    arm = recipe(config={"samples": 80, "round_texts": 40, "epochs": 1, "label_in_prompt": False})
    found = run_recipe(arm, tmp_path / "run")["records"]["correctness"]
    assert found["judge_accuracy"] > 0.9
    # Four labels, and texts of any of them.
    assert found["agreement"] < 0.5


def test_a_teacher_that_fails_loses_nothing(news, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    # Each call's texts are a matter of its number; one that failed is no call.
    FAILS.extend(range(6, 20))
    with pytest.raises(TeacherError, match="--resume"):
        run_recipe(recipe(), tmp_path / "run")
    failed = len(CALLS)
    del CALLS[5:]
    FAILS.clear()
    run_recipe(recipe(), tmp_path / "run", resume=True)
    resumed, calls = (tmp_path / "run" / "synthetic.jsonl").read_text(), len(CALLS)
    CALLS.clear()
    run_recipe(recipe(), tmp_path / "whole")
    assert (tmp_path / "whole" / "synthetic.jsonl").read_text() == resumed
    # What was answered before the failure was not asked again.
    assert len(CALLS) == calls < failed + calls
    assert (tmp_path / "whole" / "student.safetensors").read_bytes() == (
        tmp_path / "run" / "student.safetensors"
    ).read_bytes()


def test_a_budget_that_is_spent_can_be_raised(news, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    address = {"endpoint": "http://127.0.0.1:9/v1", "prompts": "ag-news"}
    small = recipe(teacher={**address, "args": {"token_budget": 1}})
    with pytest.raises(QueryBudgetExceeded, match="token_budget"):
        run_recipe(small, tmp_path / "run")
    # Going on with another budget is the same run: now it is the connection that fails.
    large = recipe(teacher={**address, "args": {"token_budget": 10**9, "retries": 0}})
    with pytest.raises(TeacherError, match="cannot be reached"):
        run_recipe(large, tmp_path / "run", resume=True)
    other = recipe(teacher={**address, "model": "another"})
    with pytest.raises(RecipeError, match=r"other settings \(teacher\.model\)"):
        run_recipe(other, tmp_path / "run", resume=True)


def test_nothing_kept_is_an_error_before_training(news, tmp_path):
    bad = recipe(
        teacher={"factory": f"{__name__}:unending", "prompts": "ag-news"},
        config={"samples": 8, "rounds": 2},
    )
    with pytest.raises(DataError, match=r"all of \d+ were dropped \(no-end \d+\)"):
        run_recipe(bad, tmp_path / "run")
    assert not (tmp_path / "run" / "student.safetensors").exists()


def test_labels_that_do_not_fit_the_classes_are_told_before_anything_is_written(news, tmp_path):
    (news / "classes.json").write_text('["world", "sports", "business", "weather"]')
    with pytest.raises(RecipeError, match="without a label: 'weather'"):
        run_recipe(recipe(), tmp_path / "run")
    assert not CALLS


def test_classes_in_another_order_are_found_by_name(news, tmp_path):
    names = [*TOPICS][::-1]
    (news / "classes.json").write_text(json.dumps(names))
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (news / f"{split}.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "label": 3 - row["label"]}) for row in rows]
        (news / f"{split}.jsonl").write_text("\n".join(lines))
    assert run_recipe(recipe(), tmp_path / "run")["student"]["score"] > 0.8


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"teacher": {"lm": "here"}}, "needs 'prompts'"),
        ({"teacher": {"lm": "here", "prompts": "nope"}}, "teacher.prompts: got prompts 'nope'"),
        ({"teacher": {"lm": "a", "endpoint": "b", "prompts": "sst2"}}, "exactly one of"),
        ({"task": "classification"}, "serves text, not classification"),
        ({"config": {"sampels": 5}}, "sampels"),
        ({"sources": {"context": {"kind": "noise"}}}, "contexts"),
    ],
)
def test_mistakes_in_a_recipe_are_told_without_building(given, told):
    with pytest.raises(RecipeError, match=told):
        recipe(**given)


def test_a_query_budget_is_of_other_teachers(news, tmp_path):
    with pytest.raises(RecipeError, match="token_budget"):
        run_recipe(recipe(access="labels", query_budget=5), tmp_path / "run")
