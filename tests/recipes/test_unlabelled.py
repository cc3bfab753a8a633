"""Recipes with foreign images: what is drawn, what the record says, what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vestige.core.rows import KnowsParts, RowSource
from vestige.core.types import InputSpec
from vestige.data.image import load_images
from vestige.errors import DataError, RecipeError
from vestige.recipes.build import build
from vestige.recipes.loading import load_recipe, validate
from vestige.recipes.presence import absent
from vestige.recipes.run import run_recipe
from vestige.recipes.schema import PartConfig, Recipe, SourceConfig
from vestige.recipes.unlabelled import few_rows, open_folder, open_given, open_heap
from vestige.sources.noise import NoiseSource

CPU = torch.device("cpu")
SPEC = InputSpec.image(3, 6, 5, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def images(count: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, 6, 5, 3), dtype=np.uint8)


def pictures(folder: Path, count: int = 30, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images(count, seed)):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def recipe(**source: Any) -> Recipe:
    return validate(
        {
            "method": "kd",
            "data": "digits",
            "teacher": "builtin:digits-convnet",
            "student": {"name": "convnet", "args": {"widths": [4]}},
            "trainer": {"device": "cpu"},
            "sources": {"inputs": source},
            "config": {"rounds": 1, "iterations": 2, "batch_size": 8},
        }
    )


def folder(**given: Any) -> SourceConfig:
    return SourceConfig(kind="folder", **given)


def test_a_folder_is_a_source_of_rows(tmp_path: Path) -> None:
    web = pictures(tmp_path / "web")
    opened = open_folder("inputs", folder(data=str(web)), SPEC, 0, CPU)
    source = opened.source
    assert isinstance(source, RowSource) and len(source) == 30
    assert source.origin == "foreign" and source.name == "web"
    rows = source.rows(torch.arange(30))
    back = SPEC.denormalize(rows).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    assert {one.tobytes() for one in back} == {one.tobytes() for one in images()}
    (read,) = opened.read
    assert (read.name, read.images) == ("web", 30) and len(read.fingerprint) == 64


@pytest.mark.parametrize("form", ["npz", "npy", "folder"])
def test_the_same_images_are_the_same_source_in_any_form(tmp_path: Path, form: str) -> None:
    np.savez(tmp_path / "web.npz", x=images())
    np.save(tmp_path / "web.npy", images())
    pictures(tmp_path / "web")
    data = "web" if form == "folder" else f"web.{form}"
    found = open_folder("inputs", folder(data=f"./{data}"), SPEC, 0, CPU).source
    rows = found.rows(torch.arange(30)).flatten(1)
    expected = SPEC.normalize(torch.from_numpy(images()).permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(rows.sort(0).values, expected.flatten(1).sort(0).values)


def test_a_heap_knows_its_parts_and_the_record_tells_them(tmp_path: Path) -> None:
    pictures(tmp_path / "web")
    (tmp_path / "web" / "torn.png").write_bytes(b"\x89PNG")
    np.save(tmp_path / "more.npy", images(20, 1))
    config = SourceConfig(
        kind="heap",
        parts={
            "photos": PartConfig(data="web", shift=("invert",), wanted=True),
            "more": PartConfig(data="./more.npy", count=5),
            "junk": PartConfig(data="textures", count=10, wanted=False),
        },
    )
    opened = open_heap("inputs", config, SPEC, 0, CPU)
    source = opened.source
    assert isinstance(source, KnowsParts) and len(source) == 45
    assert dict(source.parts) == {"photos": True, "more": None, "junk": False}
    assert torch.bincount(source.part_of(torch.arange(45))).tolist() == [30, 5, 10]
    # What was made up is not data that was read.
    assert [(read.name, read.images) for read in opened.read] == [
        ("inputs/photos: web", 30),
        ("inputs/more: more", 5),
    ]
    photos = opened.about["parts"]["photos"]
    assert photos["skipped"] == 1 and photos["first_skipped"][0].startswith("torn.png: ")
    assert photos["shift"] == ["invert"] and photos["wanted"] is True


def test_a_run_on_a_heap_leaves_the_whole_record(tmp_path: Path) -> None:
    pictures(tmp_path / "web")
    (tmp_path / "web" / "notes.txt").touch()
    heap = {"photos": {"data": "web"}, "junk": {"data": "noise", "count": 9}}
    summary = run_recipe(recipe(kind="heap", parts=heap), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    read = [one for one in record["real_data"] if one["purpose"] == "distillation"]
    assert [(one["name"], one["origin"], one["images"]) for one in read] == [
        ("inputs/photos: web", "foreign", 30)
    ]
    source = record["sources"]["inputs"]
    assert source["rows"] == 39 and source["rows_in_test"] == 0
    assert source["parts"]["photos"]["skipped"] == 1
    assert source["parts"]["photos"]["repeated"] == 0 and source["parts"]["photos"]["greyed"] == 0
    assert source["parts"]["junk"]["rows"] == 9
    assert summary["images_made"] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "30 of web, 1 file left out (notes.txt: no picture)" in page
    # A second run reads what the first one decoded, and is the same run.
    again = run_recipe(recipe(kind="heap", parts=heap), tmp_path / "again")
    assert again["student"] == summary["student"]


def test_another_seed_is_another_choice(tmp_path: Path) -> None:
    np.save(tmp_path / "web.npy", images())
    first, again, other = (
        open_folder("inputs", folder(data="./web.npy", count=9), SPEC, seed, CPU).source
        for seed in (0, 0, 1)
    )
    index = torch.arange(9)
    assert torch.equal(first.rows(index), again.rows(index))
    assert not torch.equal(first.rows(index), other.rows(index))


def test_images_of_one_channel_serve_a_teacher_of_three(tmp_path: Path) -> None:
    grey = images()[..., 0].copy()
    np.save(tmp_path / "grey.npy", grey)
    source = open_folder("inputs", folder(data="./grey.npy"), SPEC, 0, CPU).source
    rows = source.rows(torch.arange(30))
    assert rows.shape == (30, 3, 6, 5)
    assert torch.equal(rows[:, 0], rows[:, 2])
    expected = SPEC.normalize(torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1).float() / 255)
    assert torch.equal(rows, expected)


PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "folder"}, "sources.inputs.data: a folder needs its path, that of a file, or"),
    ({"kind": "heap"}, "sources.inputs.parts: got 0 parts, expected 1 to 255"),
    (
        {"kind": "heap", "data": "web", "parts": {"a": {"data": "web"}}},
        "sources.inputs.data: a heap has 'parts', each with its own data",
    ),
    (
        {"kind": "heap", "parts": {"a": {"data": "web", "shift": ["rotat"]}}},
        "sources.inputs.parts.a.shift: got 'rotat'; did you mean 'rotate'?",
    ),
    (
        {"kind": "heap", "parts": {"a": {"data": "web", "shift": ["blur|swirl"]}}},
        "sources.inputs.parts.a.shift: got 'swirl'; expected one of invert",
    ),
    (
        {"kind": "heap", "parts": {"a": {"data": "noise"}}},
        "sources.inputs.parts.a.count: 'noise' is made up, so say how many",
    ),
    (
        {"kind": "heap", "parts": {"a": {"data": "noise", "count": 5, "split": "test"}}},
        "sources.inputs.parts.a.split: 'noise' is made up and has none",
    ),
    (
        {"kind": "heap", "parts": {"a": {"count": 5}}},
        "sources.inputs.parts.a.data: is missing",
    ),
    (
        {"kind": "heap", "parts": {"a": {"data": "web", "shifts": []}}},
        "sources.inputs.parts.a.shifts: no such key; did you mean 'shift'?",
    ),
    (
        {"kind": "folder", "data": "web", "count": 0},
        "sources.inputs.count: got 0; Input should be greater than or equal to 1",
    ),
    (
        {"kind": "images", "data": "digits", "count": 5},
        "sources.inputs.count: means something for kind 'folder' only, got kind 'images'",
    ),
    (
        {"kind": "noise", "parts": {"a": {"data": "web"}}},
        "sources.inputs.parts: means something for kind 'heap' only, got kind 'noise'",
    ),
    (
        {"kind": "images", "data": "digits", "split": "all"},
        "sources.inputs.split: got 'all', expected train, select or test of images",
    ),
]


@pytest.mark.parametrize(("source", "told"), PROBLEMS)
def test_mistakes_are_named(source: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(**source)
    assert told in str(error.value)


def test_mistakes_are_told_together() -> None:
    parts = {
        "a": {"data": "web", "shift": ["rotat", "blurr"]},
        "b": {"data": "noise"},
        "c": {"data": "textures", "count": 3, "column": "image"},
    }
    with pytest.raises(RecipeError, match="the recipe has 4 mistakes"):
        recipe(kind="heap", parts=parts)


def test_what_is_not_there_is_found_without_reading(tmp_path: Path) -> None:
    pictures(tmp_path / "web", 2)
    parts = {"a": {"data": "web"}, "b": {"data": "nowhere"}, "c": {"data": "noise", "count": 3}}
    (line,) = absent(recipe(kind="heap", parts=parts))
    assert line.startswith("sources.inputs.parts.b.data: got no folder")
    (line,) = absent(recipe(kind="folder", data="gone.npz"))
    assert line.startswith("sources.inputs.data: got no file gone.npz")
    assert absent(recipe(kind="folder", data="web")) == []


def test_a_package_that_is_missing_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved").mkdir()
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "saved" / name).write_text("{}")
    monkeypatch.setattr("vestige.recipes.presence.find_spec", lambda name: None)
    (line,) = absent(recipe(kind="folder", data="./saved"))
    assert line.endswith("which needs pyarrow; pip install 'vestige[arrow]'")


def test_a_source_smaller_than_a_batch_is_a_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "web.npy", images(7))
    job = build(recipe(kind="folder", data="./web.npy"))
    (found,) = [one for one in job.trainer.noticed if one.code == "few-rows"]
    assert "source 'inputs' has 7 rows and batch_size is 8" in found.message
    assert not few_rows(job.trainer.sources, {"batch_size": 7})
    assert not few_rows({"inputs": NoiseSource(SPEC)}, job.trainer.method.cfg)  # type: ignore[attr-defined]


def test_arrays_of_the_teachers_size_stay_where_they_are(tmp_path: Path) -> None:
    array = images()
    opened = open_given("inputs", array, SPEC, 0, CPU)
    assert len(opened.source) == 30 and not (tmp_path / "cache").exists()
    assert opened.source.hashes is not None
    larger = np.random.RandomState(0).randint(0, 256, (9, 12, 10, 3), dtype=np.uint8)
    assert open_given("inputs", larger, SPEC, 0, CPU).source.draw(
        4, torch.Generator().manual_seed(0)
    ).shape == (4, 3, 6, 5)
    assert (tmp_path / "cache" / "images").is_dir()
    with pytest.raises(DataError, match="got float64 values of shape"):
        open_given("inputs", array / 255, SPEC, 0, CPU)


def test_labelled_images_still_take_train_unless_told() -> None:
    job = build(recipe(kind="images", data="digits"))
    assert len(job.trainer.sources["inputs"]) == len(load_images("digits", "train"))  # type: ignore[arg-type]


def test_the_keys_stand_in_the_resolved_recipe(tmp_path: Path) -> None:
    made = recipe(kind="heap", parts={"a": {"data": "noise", "count": 3, "shift": ["blur|tint"]}})
    (tmp_path / "again.yaml").write_text(made.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == made
