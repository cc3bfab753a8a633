"""readings.json: what a student learned from, by the class that its teacher saw."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vestige.core.texts import PAIR, to_bytes
from vestige.core.types import InputSpec
from vestige.tasks.classification import Classification
from vestige.tasks.text import Text
from vestige.training.readings import write_readings
from vestige.training.report.page_readings import mistakes_view, readings_view


def outcome(texts: list[str], answers: list[int]) -> Any:
    return SimpleNamespace(samples=(to_bytes(texts, 16), torch.tensor(answers)))


def written(out: Path, texts: list[str], answers: list[int], classes: Any = ()) -> list[Any]:
    task = Text(InputSpec.text(16), 30)
    assert write_readings(out, outcome(texts, answers), task, None, classes)
    found = json.loads((out / "readings.json").read_text(encoding="utf8"))
    assert found["schema"] == 1
    return list(found["classes"])


def test_texts_are_sorted_by_class_and_the_latest_are_kept(tmp_path: Path) -> None:
    texts = [f"é {number}" for number in range(10)]
    found = written(tmp_path, [*texts, f"a{PAIR}b"], [1] * 10 + [0], ("no", "yes"))
    assert found[0] == {"class": "no", "inputs": 1, "texts": ["a | b"]}
    assert found[1] == {"class": "yes", "inputs": 10, "texts": texts[-6:]}


def test_the_twenty_classes_with_the_most_are_kept_in_their_order(tmp_path: Path) -> None:
    answers = [label for label in range(25) for _ in range(1 if label in (3, 7, 8, 20, 24) else 2)]
    found = written(tmp_path, ["x"] * len(answers), answers)
    assert [one["class"] for one in found] == [
        str(label) for label in range(25) if label not in (3, 7, 8, 20, 24)
    ]


def test_a_class_without_a_name_is_its_number(tmp_path: Path) -> None:
    found = written(tmp_path, ["x", "y", "z"], [0, 5, -1], ("only",))
    assert [one["class"] for one in found] == ["-1", "only", "5"]


def test_without_samples_or_a_task_that_reads_nothing_is_written(tmp_path: Path) -> None:
    text, picture = Text(InputSpec.text(16), 2), Classification(InputSpec.image(1, 4, 4), 2)
    assert not write_readings(tmp_path, SimpleNamespace(samples=None), text, None, ())
    assert not write_readings(tmp_path, outcome(["a"], [0]), picture, None, ())
    assert not list(tmp_path.iterdir())


def test_the_page_shows_names_and_leaves_out_what_is_empty() -> None:
    run: Any = SimpleNamespace(
        readings={"classes": [{"class": "a", "texts": ["x"]}, {"class": "b", "texts": []}, 3]},
        evaluation={
            "classes": ["no", "yes"],
            "texts": [{"text": "t", "truth": 1, "student": 0, "teacher": None}, "damaged"],
        },
    )
    assert readings_view(run) == [{"class": "a", "texts": ["x"]}]
    found = mistakes_view(run)
    assert found[0] == {"text": "t", "truth": "yes", "teacher": "", "student": "no"}
    run.evaluation["classes"] = ["no"]
    assert mistakes_view(run)[0]["truth"] == "1"


def test_a_run_without_texts_has_nothing_to_show() -> None:
    run: Any = SimpleNamespace(readings={}, evaluation={})
    assert readings_view(run) == [] and mistakes_view(run) == []
