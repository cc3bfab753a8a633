"""The floor benchmark: what it divides by what, its file, and its mistakes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from vestige.bench.floor import known_floors, load_floor, run_floor
from vestige.bench.tables import floor_page, floor_table
from vestige.errors import RecipeError
from vestige.methods import dfad
from vestige.recipes.loading import load_recipe

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "benchmarks/floor").glob("*.json"))


def check(document: dict[str, Any], *, steady: bool = True) -> None:
    """Hold a result against the schema and, from a `steady` machine, times against each other."""
    assert document["schema"] == 1
    assert {"machine", "versions", "commit", "command"} <= set(document)
    assert document["cases"]
    for case in document["cases"]:
        assert case["shapes"]
        passes = case["passes"].values()
        floor = sum(item["count"] * item["seconds"] for item in passes)
        assert min(floor, case["floor_seconds"]) > 0
        # Medians over the rounds, of the sum and of each pass.
        assert not steady or case["floor_seconds"] == pytest.approx(floor, rel=0.25)
        assert case["ratio"] == pytest.approx(case["round_seconds"] / case["floor_seconds"])


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    case = {"recipe": "dfad", "preset": "smoke", "overrides": ["data=null", "config.rounds=6"]}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"cases": {"one": case, "two": {**case, "target": 2.0}}}))
    return path


def measured(tiny: Path, **given: Any) -> dict[str, Any]:
    path = run_floor(str(tiny), repeats=3, out=tiny.parent / "out", echo=lambda line: None, **given)
    assert path == tiny.parent / "out" / f"{tiny.stem}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_file_is_in_the_documented_form(tiny: Path) -> None:
    document = measured(tiny)
    check(document, steady=False)
    assert [case["name"] for case in document["cases"]] == ["one", "two"]
    assert [case["target"] for case in document["cases"]] == [1.1, 2.0]
    case = document["cases"][0]
    assert len(case["ratios"]) == 3
    # smoke: 2 iterations of 5 + 1 steps at batch 16 on 16x16.
    assert case["passes"]["teacher_forward"]["count"] == 10
    assert case["passes"]["teacher_observed"]["count"] == 2
    assert case["shapes"]["student"] == [[[16, 1, 16, 16]]]
    assert case["shapes"]["generator"] == [[[16, 16]]]
    assert "| one | 1 |" in floor_table(document)
    assert floor_page({"tiny": document}).count("## tiny") == 1


def test_what_a_method_wastes_shows(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 ms of idling in each of 12 steps is told to the millisecond, whatever the machine does."""
    lean = measured(tiny, cases=["one"])["cases"][0]
    draw = dfad.latent

    def lazy(count: int, width: int, ctx: Any) -> Any:
        time.sleep(0.04)
        return draw(count, width, ctx)

    monkeypatch.setattr(dfad, "latent", lazy)
    idle = measured(tiny, cases=["one"])["cases"][0]
    assert idle["round_seconds"] >= 0.48
    assert idle["ratio"] > lean["ratio"] + 0.2 * 0.48 / idle["floor_seconds"]


def test_rounds_before_the_students_are_left_out(tmp_path: Path) -> None:
    overrides = ["data=null", "config.rounds=4", "config.warmup=3"]
    case = {"recipe": "cmi", "preset": "smoke", "overrides": overrides}
    path = tmp_path / "pool.yaml"
    path.write_text(yaml.safe_dump({"cases": {"one": case}}))
    (found,) = measured(path)["cases"]
    # smoke: one batch of 2 inversions and 2 imitations a round; three batches come first.
    assert found["passes"]["student_step"]["count"] == 2
    assert found["passes"]["teacher_observed"]["count"] == 2
    assert len(found["ratios"]) == 3


def test_mistakes_are_named(tiny: Path) -> None:
    with pytest.raises(RecipeError, match=r"got cases \['three'\], expected some of one, two"):
        measured(tiny, cases=["three"])
    with pytest.raises(RecipeError, match="raise its number of rounds or lower --repeats"):
        measured(tiny, overrides=["config.rounds=2"])
    with pytest.raises(RecipeError, match="got floor 'nothing', expected a YAML file or one of"):
        load_floor("nothing")
    tiny.write_text("cases: {}\n")
    with pytest.raises(RecipeError, match="cases"):
        load_floor(tiny)
    tiny.write_text("just text\n")
    with pytest.raises(RecipeError, match="expected a mapping with 'cases'"):
        load_floor(tiny)


def test_passes_of_networks_that_nobody_calls_are_named(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dfad.DFAD, "passes", lambda self, cfg: {"critic_forward": 3.0})
    with pytest.raises(RecipeError, match="got the passes critic_forward of networks that no step"):
        measured(tiny)


@pytest.mark.parametrize("name", known_floors())
def test_shipped_cases_are_valid(name: str) -> None:
    for case in load_floor(name).cases.values():
        load_recipe(case.recipe, preset=case.preset, overrides=case.overrides)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_in_the_documented_form(path: Path) -> None:
    document = json.loads(path.read_text())
    check(document)
    assert {case["name"] for case in document["cases"]} == set(load_floor(path.stem).cases)


def test_the_page_is_that_of_the_committed_results() -> None:
    if not COMMITTED:
        pytest.skip("no floor was measured yet: vestige bench floor dfad")
    floors = {path.stem: json.loads(path.read_text()) for path in COMMITTED}
    assert (ROOT / "benchmarks/FLOOR.md").read_text(encoding="utf8") == floor_page(floors)
