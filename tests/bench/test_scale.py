"""Sizes, memory and checkpoints of a scale benchmark."""

import json
import os
from pathlib import Path

import pytest
import torch

from vestige.bench import scale, scale_federated
from vestige.bench.scale_cases import IMAGE_CASES
from vestige.errors import OutOfMemoryError, RecipeError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "benchmarks/scale").glob("*.json"))
COMMON = ("images", "draw_seconds_per_10k", "mib_per_10k", "held_mib", "peak_mib")
KEYS = {
    "pool": {*COMMON, "add_seconds_per_10k", "checkpoint_seconds", "again_seconds", "disk_mib"},
    "foreign": {*COMMON, "decode_seconds_per_10k", "again_seconds", "disk_mib"},
}
IMAGE_MIB = 3 * 32 * 32 / 2**20
IMAGES = [path for path in COMMITTED if path.stem != "federated"]
DIRECT = {"clients", "active", "down_kib", "up_kib"} | {
    f"direct_{key}" for key in ("join_seconds", "round_seconds", "server_mib")
}
RAY = {f"ray_{key}" for key in ("join_seconds", "round_seconds", "server_mib", "workers_mib")}
# Parameters and statistics of the network of 26,434 weights, as floats; and of the generator.
UP_KIB, DOWN_KIB = 106.3, 186.5


def check_clients(document, largest, keys):
    assert [size["clients"] for size in document["sizes"]] == [
        largest // 8,
        largest // 4,
        largest // 2,
        largest,
    ]
    for size in document["sizes"]:
        assert set(size) == keys
        # What a client sends and is sent does not depend on how many there are.
        assert size["up_kib"] == pytest.approx(UP_KIB, rel=0.01)
        assert size["down_kib"] == pytest.approx(DOWN_KIB, rel=0.01)
    assert {"machine", "versions", "commit", "command", "date", "threads"} <= set(document)


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
    if path.stem == "federated":
        check_clients(document, document["sizes"][-1]["clients"], DIRECT | RAY)
    else:
        check(document, document["sizes"][-1]["images"])
    assert document["name"] == path.stem
    assert path.stem in scale.CASES


@pytest.mark.parametrize("name", IMAGE_CASES)
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


def test_a_federation_is_measured_at_each_size(tmp_path, monkeypatch):
    """On the engine in this process: Ray takes half a minute to start."""
    pytest.importorskip("flwr")

    def measured(name, clients, *, active):
        folder = fresh(tmp_path, clients)
        return scale_federated.measure_federation(
            clients, folder, active=active, engines=("in-process",)
        )

    monkeypatch.setattr(scale, "_measured", measured)
    monkeypatch.setattr(scale_federated, "ROUNDS", 2)
    told = []
    path = scale.run_scale("federated", clients=8, active=2, out=tmp_path, echo=told.append)
    document = json.loads(path.read_text(encoding="utf8"))
    check_clients(document, 8, DIRECT)
    assert [size["active"] for size in document["sizes"]] == [1, 2, 2, 2]
    assert told[-1] == "federated: 8 clients ..."
    assert document["command"] == "vestige bench scale federated --clients 8 --active 2"


def test_what_was_not_run_is_said_to_be_arithmetic():
    """Joining and memory go on along a line; rounds and bytes by the clients that are asked."""
    small = dict.fromkeys(DIRECT | RAY, 1.0) | {"clients": 500, "active": 50}
    large = small | {
        "clients": 1000,
        "direct_join_seconds": 6.0,
        "direct_round_seconds": 2.0,
        "up_kib": 102.4,
    }
    text, _, _, _, *rows = scale_federated.paper_table([small, large])
    assert text.startswith("By arithmetic, nothing of it was run")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:4] for row in cells] == [
        ["10,000", "50", "96", "2.0"],
        ["10,000", "500", "96", "20.0"],
        ["100,000", "50", "996", "2.0"],
        ["100,000", "5,000", "996", "200.0"],
    ]
    assert [row[-1] for row in cells] == ["5.0", "50.0", "5.0", "500.0"]


def test_foreign_images_do_not_stay_in_memory():
    """30,000 images are 88 MiB on disk: what is held are their hashes and room to work in."""
    found = scale._measured("foreign", 30_000)
    assert found["disk_mib"] > 88
    assert found["held_mib"] < 45


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
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
        RecipeError, match="got scale case 'nothing', expected one of pool, foreign, federated"
    ):
        scale.run_scale("nothing", images=100, out=tmp_path)
    with pytest.raises(RecipeError, match="--images: got 7, expected at least 8"):
        scale.run_scale("pool", images=7, out=tmp_path)
    with pytest.raises(RecipeError, match="--clients: got 7, expected at least 8"):
        scale.run_scale("federated", clients=7, out=tmp_path)

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
