"""Sizes, memory and checkpoints of a scale benchmark."""

import json
import os
from pathlib import Path

import pytest
import torch

from vestige.bench import scale
from vestige.errors import OutOfMemoryError, RecipeError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "benchmarks/scale").glob("*.json"))
COMMON = ("images", "draw_seconds_per_10k", "mib_per_10k", "held_mib", "peak_mib")
KEYS = {
    "pool": {*COMMON, "add_seconds_per_10k", "checkpoint_seconds", "again_seconds", "disk_mib"},
    "foreign": {*COMMON, "decode_seconds_per_10k", "again_seconds", "disk_mib"},
}
IMAGE_MIB = 3 * 32 * 32 / 2**20


def check(document, largest):
    assert document["schema"] == 1
    assert [size["images"] for size in document["sizes"]] == [
        largest // 8,
        largest // 4,
        largest // 2,
        largest,
    ]
    for size in document["sizes"]:
        assert set(size) == KEYS[document["name"]]
        assert size["peak_mib"] >= size["held_mib"]
        # A byte a value and 8 for the label or the hash; what is more are headers.
        written = size["images"] * (IMAGE_MIB + 8 / 2**20)
        assert written <= size["disk_mib"] <= 1.2 * written + 0.1
    assert {"machine", "versions", "commit", "command", "date", "threads"} <= set(document)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_in_the_documented_form(path):
    document = json.loads(path.read_text(encoding="utf8"))
    check(document, document["sizes"][-1]["images"])
    assert document["name"] == path.stem
    assert path.stem in scale.CASES


@pytest.mark.parametrize("name", scale.CASES)
def test_a_run_measures_each_size(name, tmp_path, monkeypatch):
    # In this process: a new one for each size costs seconds.
    monkeypatch.setattr(
        scale, "_measured", lambda name, images: scale.CASES[name](images, fresh(tmp_path, images))
    )
    told = []
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "mine"))
    path = scale.run_scale(name, images=4000, out=tmp_path / "out", echo=told.append)
    document = json.loads(path.read_text(encoding="utf8"))
    check(document, 4000)
    assert told[-1] == f"{name}: 4,000 images ..."
    assert scale.scale_table(document["sizes"]).count("\n| 4,000 |") == 1
    page = scale.scale_page({name: document})
    assert f"`vestige bench scale {name} --images 4000`" in page and "| 4,000 |" in page
    # What was measured is no cache of the user's.
    assert not (tmp_path / "mine").exists()
    assert os.environ["VESTIGE_CACHE"] == str(tmp_path / "mine")


def test_foreign_images_do_not_stay_in_memory():
    """30,000 images are 88 MiB on disk: what is held are their hashes and room to work in."""
    found = scale._measured("foreign", 30_000)
    assert found["disk_mib"] > 88
    assert found["held_mib"] < 45


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_memory_does_not_grow_with_a_million_images(path):
    """Twice as many images may take their hashes (8 bytes each, or pages) but not their bytes."""
    sizes = json.loads(path.read_text(encoding="utf8"))["sizes"]
    more = sizes[-1]["images"] - sizes[0]["images"]
    assert sizes[-1]["held_mib"] - sizes[0]["held_mib"] < 0.05 * more * IMAGE_MIB


def test_the_page_is_that_of_the_committed_results():
    results = {path.stem: json.loads(path.read_text(encoding="utf8")) for path in COMMITTED}
    page = (ROOT / "benchmarks/SCALE.md").read_text(encoding="utf8")
    assert page == scale.scale_page(results)


def fresh(folder, images):
    (folder / str(images)).mkdir()
    return folder / str(images)


def test_a_size_has_a_process_of_its_own():
    """What this process holds does not hide what the pool takes: 16,000 images are 47 MiB."""
    ballast = torch.ones(2**25)
    found = scale._measured("pool", 16_000)
    del ballast
    # Some MiB that imports took and gave back are used again.
    assert 16_000 * IMAGE_MIB - 15 <= found["held_mib"] <= 16_000 * IMAGE_MIB + 60
    assert found["peak_mib"] >= found["held_mib"]


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(
        RecipeError, match="got scale case 'nothing', expected one of pool, foreign"
    ):
        scale.run_scale("nothing", images=100, out=tmp_path)
    with pytest.raises(RecipeError, match="--images: got 7, expected at least 8"):
        scale.run_scale("pool", images=7, out=tmp_path)

    class Killed:
        def __init__(self, *given, **more):
            pass

        def __enter__(self):
            raise scale.BrokenProcessPool

        def __exit__(self, *error):
            return False

    monkeypatch.setattr(scale, "ProcessPoolExecutor", Killed)
    with pytest.raises(OutOfMemoryError, match=r"100 images was killed, .* lower --images"):
        scale.run_scale("pool", images=800, out=tmp_path)
    assert list(tmp_path.iterdir()) == []
