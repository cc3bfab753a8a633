"""Images that are learned from and judged on are found, whatever way they came in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vestige
from vestige.core.types import InputSpec
from vestige.data.image import load_images
from vestige.recipes.leaks import hashes_of_inputs, hashes_of_rows, hashes_of_set, leaks
from vestige.recipes.loading import validate
from vestige.recipes.run import run_recipe
from vestige.sources.images import TensorSource

SPEC = InputSpec.image(1, 16, 16, mean=(0.3058,), std=(0.3193,))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def judging() -> np.ndarray:
    found = load_images("digits", "test").images
    assert isinstance(found, np.ndarray)
    return found


def mixed(leaked: int, count: int = 100) -> np.ndarray:
    """`leaked` of the 8x8 images that judge, among others that do not."""
    rows = np.random.RandomState(0).randint(0, 256, (count, 8, 8), dtype=np.uint8)
    rows[:leaked] = judging()[5 : 5 + leaked]
    return rows


def run(out: Path, **source: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    recipe = {
        "method": "kd",
        "data": "digits",
        "teacher": "builtin:digits-convnet",
        "student": {"name": "convnet", "args": {"widths": [4]}},
        "trainer": {"device": "cpu"},
        "sources": {"inputs": source},
        "config": {"rounds": 1, "iterations": 1, "batch_size": 4},
    }
    summary = run_recipe(validate(recipe), out)
    return summary, json.loads((out / "run.json").read_text())["sources"]["inputs"]


def told(summary: dict[str, Any]) -> list[str]:
    return [
        one["message"] for one in summary["diagnosis"] if one["code"] == "test-images-in-source"
    ]


def pictures(folder: Path, leaked: int) -> None:
    (folder / "deep").mkdir(parents=True)
    for number, image in enumerate(mixed(leaked)):
        Image.fromarray(image).save(folder / "deep" / f"{number}.png")


def test_a_folder_with_test_images_is_told_with_count_and_share(tmp_path: Path) -> None:
    """Compared as the teacher sees them: 8x8 pictures are resized to 16x16 on either side."""
    pictures(tmp_path / "web", 12)
    summary, record = run(tmp_path / "out", kind="folder", data="web")
    (message,) = told(summary)
    assert message.startswith(
        "12 of 100 rows of source 'inputs' (12.0%) are images that the student is judged on, 12 of "
        "500 of these (2.4%)"
    )
    assert record["rows_in_test"] == 12
    page = (tmp_path / "out" / "report.html").read_text()
    assert "12 of 100 rows of source" in page


def test_none_is_no_warning_and_is_on_record(tmp_path: Path) -> None:
    pictures(tmp_path / "web", 0)
    summary, record = run(tmp_path / "out", kind="folder", data="web")
    assert told(summary) == [] and record["rows_in_test"] == 0


def test_a_distorted_heap_is_seen_through(tmp_path: Path) -> None:
    np.savez(tmp_path / "web.npz", x=mixed(10))
    parts = {"web": {"data": "./web.npz", "shift": ["rotate", "noise"]}}
    summary, record = run(tmp_path / "out", kind="heap", parts=parts)
    assert len(told(summary)) == 1 and record["rows_in_test"] == 10


def test_labelled_sets_are_looked_through(tmp_path: Path) -> None:
    summary, record = run(tmp_path / "a", kind="images", data="digits", origin="real")
    assert told(summary) == [] and record == {"rows_in_test": 0}
    summary, record = run(tmp_path / "b", kind="images", data="digits", split="test")
    assert len(told(summary)) == 1 and record["rows_in_test"] == 500


def test_nothing_is_compared_where_nothing_judges(tmp_path: Path) -> None:
    def never() -> None:
        raise AssertionError("the test images were decoded for nothing")

    assert leaks({}, never) == ([], {})
    assert leaks({"noise": lambda: None}, never) == ([], {})


def test_hashes_are_the_same_by_every_way() -> None:
    spec = InputSpec.image(1, 8, 8, mean=(0.3,), std=(0.3,))
    found = load_images("digits", "test")
    inputs = found.inputs(spec)
    expected = hashes_of_set(found, spec)
    assert expected is not None and len(expected) == 500
    assert np.array_equal(hashes_of_inputs(inputs, spec), expected)  # type: ignore[arg-type]
    source = TensorSource(inputs, origin="foreign", name="rows")
    assert np.array_equal(hashes_of_rows(source, spec), expected)  # type: ignore[arg-type]


def test_of_resized_inputs_nearly_all_are_found() -> None:
    """Rounding of float32 moves a grey level in few images: most of a leak is seen anyway."""
    found = load_images("digits", "test")
    exact, rounded = hashes_of_set(found, SPEC), hashes_of_inputs(found.inputs(SPEC), SPEC)
    assert exact is not None and rounded is not None
    assert np.isin(exact, rounded).mean() > 0.9


def test_what_is_no_image_is_not_compared() -> None:
    assert hashes_of_inputs(torch.zeros(3, 4), SPEC) is None
    assert hashes_of_inputs({"mask": torch.zeros(3)}, SPEC) is None
    assert hashes_of_inputs(torch.zeros(3, 1, 8, 8), SPEC) is None
    assert hashes_of_set(object(), SPEC) is None
    assert hashes_of_set(load_images("digits", "test"), InputSpec("table", (4,))) is None


@pytest.mark.parametrize("form", ["tensor", "array", "path", "source"])
def test_what_is_handed_in_from_python_is_compared_too(tmp_path: Path, form: str) -> None:
    spec = InputSpec.image(1, 8, 8)
    rows = mixed(20)
    np.save(tmp_path / "web.npy", rows)
    inputs = torch.from_numpy(rows)[:, None].float() / 255
    given: Any = {
        "tensor": inputs,
        "array": rows,
        "path": tmp_path / "web.npy",
        "source": TensorSource(inputs, origin="unlabelled", name="mine"),
    }[form]
    judged = torch.from_numpy(judging())[:, None].float() / 255

    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    report = vestige.distill(
        network(),
        network(),
        method="kd",
        spec=spec,
        num_classes=10,
        config={"rounds": 1, "iterations": 1, "batch_size": 128},
        sources={"inputs": given},
        evaluate=(judged, torch.zeros(500, dtype=torch.int64)),
        device="cpu",
        out=tmp_path / "out",
    )
    (message,) = told(report.summary)
    assert message.startswith("20 of 100 rows of source 'inputs' (20.0%)")
    assert "few-rows" in {one["code"] for one in report.summary["diagnosis"]}
    (read,) = [one for one in report.summary["real_data"] if one["purpose"] == "distillation"]
    assert read["images"] == 100
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["sources"]["inputs"]["rows_in_test"] == 20
