"""Verdicts by fixed rules, cells that are run once, and files in the documented form."""

import json
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import yaml

from vestige.bench import claims
from vestige.bench.claims import load_definition, run_claim
from vestige.bench.tables import results_table
from vestige.bench.verdicts import judge as judged
from vestige.bench.verdicts import measured
from vestige.errors import RecipeError
from vestige.recipes.loading import load_recipe
from vestige.recipes.updates import student_updates
from vestige.training.files import write_json

ROOT = Path(__file__).parents[2]
# Key -> type, of schema 1.
DOCUMENT = {
    "schema": int,
    "method": str,
    "claim": str,
    "verdict": str,
    "metric": str,
    "data": str,
    "teacher": dict | None,
    "seeds": list,
    "arms": dict,
    "tried": list,
    "machine": dict,
    "versions": dict,
    "commit": str | None,
    "recipe_sha256": str,
    "command": str,
}
ARM = {"scores", "mean", "interval_95", "seconds", "teacher_passes", "images"}
VERDICTS = {"holds", "does not hold", "not shown"}


def check_document(document: dict[str, Any]) -> None:
    """Hold a result against the schema, and its numbers against each other."""
    for key, kind in DOCUMENT.items():
        assert isinstance(document[key], kind), key
    assert document["schema"] == 1
    assert document["verdict"] in VERDICTS
    # Where clients train there is none.
    assert document["teacher"] is None or set(document["teacher"]) >= {"score", "parameters"}
    assert len(document["recipe_sha256"]) == 64
    assert document["arms"]
    for arm in document["arms"].values():
        assert set(arm) >= ARM
        assert len(arm["scores"]) == len(arm["seconds"]) == len(document["seeds"])
        if arm["scores"] == [None] * len(arm["scores"]):
            # No student was taught; what was made is measured instead.
            assert arm["mean"] is None
            assert arm["interval_95"] is None
            assert arm["measures"]
            continue
        assert arm["mean"] == pytest.approx(sum(arm["scores"]) / len(arm["scores"]))
        if len(arm["scores"]) > 1:
            low, high = arm["interval_95"]
            assert low <= arm["mean"] <= high
        else:
            assert arm["interval_95"] is None
    for claim in document["further_claims"]:
        assert set(claim) >= {"claim", "verdict"}
        assert claim["verdict"] in VERDICTS


# Figures


@pytest.mark.parametrize("scores", [[0.1, 0.2], [0.968, 0.964, 0.958], [0.5, 0.5, 0.5, 0.6]])
def test_the_interval_is_students_t(scores):
    mean, error = sum(scores) / len(scores), scipy.stats.sem(scores)
    low, high = scipy.stats.t.interval(0.95, len(scores) - 1, loc=mean, scale=error)
    assert claims._interval(scores) == pytest.approx([low, high])


def test_an_arm_without_a_student_has_no_score_and_keeps_what_was_measured():
    summary = {"student": None, "seconds": 2.0, "teacher_queries": 5, "images_made": 4}
    summary |= {"diagnosis": [], "diversity": {"distance": 2.5}}
    found = claims._arm([summary, summary], ["student.score", "diversity.distance"])
    assert (found["scores"], found["mean"], found["interval_95"]) == ([None, None], None, None)
    assert found["measures"] == {"diversity.distance": [2.5, 2.5]}
    # As an earlier version left it.
    assert found["teacher_backward_passes"] is None


def test_a_single_seed_has_no_interval_and_equal_ones_a_narrow_one():
    assert claims._interval([0.5]) is None
    assert claims._interval([0.5, 0.5, 0.5]) == [0.5, 0.5]


# Runs


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A claim named `tiny` on two arms of the demo, with seconds of work in all."""
    definition = {
        "method": "dfad",
        "cases": {
            "digits": {
                "recipe": "demo",
                "overrides": ["shared.rounds=1", "shared.batch_size=2", "config.iterations=1"]
                + ["config.generator_width=2"]
                + [f"arms.{arm}.config.iterations=5" for arm in ("noise", "real")],
                "arms": ["dfad-bn", "noise", "real"],
            }
        },
        "claims": [
            {"claim": "Impossible.", "arm": "dfad-bn", "share_of_teacher": 2.0},
            {"claim": "Certain.", "arm": "dfad-bn", "points_above": {"noise": -1.0}},
            {
                "claim": "Fewer rows.",
                "arm": "noise",
                "measure": "teacher_passes.forward",
                "smaller": True,
                "points_above": {"dfad-bn": 2},
            },
        ],
        "tried": ["nothing"],
    }
    folder = tmp_path / "definitions"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(definition))
    monkeypatch.setattr(claims, "FOLDER", folder)
    return tmp_path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(arm, seed) of every run that is started."""
    started = []
    real = claims.run_recipe

    def counted(recipe, out, **given):
        started.append((given["arm"], recipe.seed))
        return real(recipe, out, **given)

    monkeypatch.setattr(claims, "run_recipe", counted)
    return started


def measure(folder: Path, **given: Any) -> dict[str, Any]:
    values = {"seeds": range(3), "out": folder / "out", "cells": folder / "cells", **given}
    path = run_claim("tiny", echo=lambda line: None, **values)
    assert path == folder / "out/tiny.json"
    return json.loads(path.read_text())


def test_a_claim_is_measured_once_and_goes_on_where_it_stopped(tiny, runs):
    first = measure(tiny)
    check_document(first)
    assert runs == [(arm, seed) for arm in ("dfad-bn", "noise", "real") for seed in (0, 1, 2)]
    assert set(first["arms"]) == {"digits/dfad-bn", "digits/noise", "digits/real"}
    assert (first["claim"], first["verdict"]) == ("Impossible.", "does not hold")
    assert [claim["verdict"] for claim in first["further_claims"]] == ["holds", "holds"]
    assert {arm: found["measures"] for arm, found in first["arms"].items()} == {
        "digits/dfad-bn": {"teacher_passes.forward": [12, 12, 12]},
        "digits/noise": {"teacher_passes.forward": [10, 10, 10]},
        "digits/real": {"teacher_passes.forward": [10, 10, 10]},
    }
    assert (first["seeds"], first["tried"], first["data"]) == ([0, 1, 2], ["nothing"], "digits")
    # What moves the generator alone was not made for the student.
    assert first["arms"]["digits/dfad-bn"]["images"] == first["arms"]["digits/noise"]["images"]
    assert first["arms"]["digits/real"]["images"] == 0
    told = {arm: first["arms"][f"digits/{arm}"] for arm in ("dfad-bn", "noise")}
    passes = {a: (d["teacher_passes"], d["teacher_backward_passes"]) for a, d in told.items()}
    assert passes == {"dfad-bn": (12, 2), "noise": (10, 0)}

    del runs[:]
    assert measure(tiny) == first
    assert runs == []

    more = measure(tiny, seeds=range(4))
    assert {seed for _, seed in runs} == {3}
    assert [more["arms"][a]["scores"][:3] for a in more["arms"]] == [
        first["arms"][a]["scores"] for a in first["arms"]
    ]


def test_two_seeds_show_nothing(tiny):
    found = measure(tiny, seeds=range(2))
    assert (found["verdict"], found["failures"]) == ("not shown", "2 seeds ran, 3 are needed")


def test_a_cell_that_was_interrupted_is_run_to_its_end(tiny, runs):
    first = measure(tiny, seeds=range(1))
    (tiny / "cells/tiny/digits/noise/seed0/summary.json").unlink()
    del runs[:]
    again = measure(tiny, seeds=range(1))
    assert runs == [("noise", 0)]
    scores = [{a: d["arms"][a]["scores"] for a in d["arms"]} for d in (first, again)]
    assert scores[0] == scores[1]


def test_a_subset_of_arms_shows_nothing(tiny, runs):
    document = measure(tiny, seeds=range(1), arms=["noise"])
    check_document(document)
    assert document["verdict"] == "not shown"
    assert [claim["verdict"] for claim in document["further_claims"]] == ["not shown"] * 2
    assert runs == [("noise", 0)]


def test_cells_of_another_recipe_are_refused(tiny, runs):
    measure(tiny, seeds=range(1))
    path = tiny / "definitions/tiny.yaml"
    path.write_text(path.read_text().replace("shared.batch_size=2", "shared.batch_size=3"))
    del runs[:]
    with pytest.raises(RecipeError, match=r"holds a run of another recipe; move it away"):
        measure(tiny, seeds=range(1))
    assert runs == []


def test_arms_and_claims_that_do_not_exist_are_named_before_anything_runs(tiny, runs):
    with pytest.raises(RecipeError, match=r"got arms \['nois'\], case 'digits' has dfad-bn, noise"):
        measure(tiny, arms=["nois"])
    # An arm of the recipe that the claim does not run is none of its arms.
    with pytest.raises(RecipeError, match=r"got arms \['dfad'\]"):
        measure(tiny, arms=["dfad"])
    with pytest.raises(RecipeError, match="got claim 'tiy', expected one of tiny"):
        run_claim("tiy", seeds=[0], out=tiny, cells=tiny)
    (tiny / "definitions/tiny.yaml").write_text("method: dfad\ncases: {}\nclams: []\n")
    with pytest.raises(RecipeError, match=r"tiny\.clams: no such key; did you mean 'claims'"):
        measure(tiny)
    assert runs == []


# What is shipped


@pytest.mark.parametrize("name", claims.known_claims())
def test_every_shipped_definition_fits_its_recipe(name):
    definition = load_definition(name)
    assert definition.claims[0].claim.endswith(".")
    for name_of_case, case in definition.cases.items():
        recipe = load_recipe(case.recipe, preset=case.preset, overrides=case.overrides)
        arms = set(case.arms or recipe.arms)
        assert arms <= set(recipe.arms)
        for statement in definition.claims:
            assert set(statement.cases) <= set(definition.cases)
            if statement.cases and name_of_case not in statement.cases:
                continue
            assert {statement.arm, *statement.others} <= arms
            if statement.gap_closed is not None:
                assert {recipe.baseline, recipe.reference} <= arms
        runs = [recipe.arm(arm) for arm in arms]
        used = {run.method for run in runs} | {one.name for run in runs for one in run.plugins}
        assert definition.method in used


@pytest.mark.parametrize("name", claims.known_claims())
def test_arms_of_a_claim_have_the_same_number_of_student_steps(name):
    for case in load_definition(name).cases.values():
        recipe = load_recipe(case.recipe, preset=case.preset, overrides=case.overrides)
        work = set()
        for arm in case.arms or recipe.arms:
            run = recipe.arm(arm)
            cfg = run.method_config()
            if "clients" in run.sources:
                # Clients train, and arms may differ in what the server adds.
                work.add((cfg.rounds, cfg.active, cfg.steps_of(100), cfg.batch_size))
                continue
            whole = getattr(recipe.method_config(), "samples", None)
            if getattr(cfg, "samples", whole) != whole:
                # What few texts are worth is the question; they are passed over as often.
                assert cfg.epochs == recipe.method_config().epochs
                continue
            # Of images; where foreign ones stand beside the fakes it is as many of each.
            rows = cfg.batch_size * (2 if getattr(cfg, "mix_foreign", False) else 1)
            work.add((student_updates(run.method, cfg.model_dump()), rows))
        assert len(work) == 1


def put(summary: dict[str, Any], place: str, value: float | None) -> None:
    """Write a number where `measured` reads it."""
    *way, last = place.split(".")
    for key in way:
        summary = summary.setdefault(key, {})
    summary[last] = value


def test_what_is_put_somewhere_is_measured_there():
    summary = {"retention": {"then": 0.5}}
    put(summary, "retention.lost", 0.25)
    assert measured(summary, "retention.lost") == 0.25


COMMITTED = sorted((ROOT / "benchmarks/claims").glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_in_the_documented_form(path):
    document = json.loads(path.read_text())
    check_document(document)
    definition = load_definition(path.stem)
    assert document["method"] == definition.method
    assert document["claim"] == definition.claims[0].claim
    assert document["verdict"] == "not shown" or len(document["seeds"]) >= 3


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_verdicts_follow_from_the_committed_scores(path):
    document = json.loads(path.read_text())
    definition = load_definition(path.stem)
    if document["verdict"] == "not shown":
        return
    found: dict[str, dict[str, Any]] = {}
    for name, arm in document["arms"].items():
        case, _, label = name.partition("/")
        teacher = document["teachers"][case]
        runs: list[dict[str, Any]] = [
            {"student": {"score": score}, "teacher": teacher} for score in arm["scores"]
        ]
        for place, values in arm.get("measures", {}).items():
            for run, value in zip(runs, values, strict=True):
                put(run, place, value)
        found.setdefault(case, {})[label] = runs
    recipes = {
        name: load_recipe(case.recipe, overrides=case.overrides)
        for name, case in definition.cases.items()
    }
    told = [document, *document["further_claims"]]
    for statement, published in zip(definition.claims, told, strict=True):
        again = judged(statement, recipes, found, partial="")
        assert published["verdict"] == again["verdict"]


def test_a_broken_document_would_be_noticed(tmp_path):
    write_json(tmp_path / "x.json", {"schema": 1})
    with pytest.raises(KeyError):
        check_document(json.loads((tmp_path / "x.json").read_text()))


def test_what_else_is_measured_has_a_table_of_its_own():
    arm = {"scores": [0.5], "mean": 0.5, "seconds": [1.0], "teacher_passes": 3, "images": 4}
    result = {
        "machine": {"gpu": None, "processor": "p", "cores": 2},
        "versions": {"torch": "t"},
        "command": "c",
        "date": "d",
        "seeds": [0],
        "teachers": {"set": {"score": 1.0}},
        "arms": {
            "set/a": {**arm, "measures": {"pool.x": [0.12345], "pool.y": [None]}},
            "set/b": arm,
        },
    }
    lines = results_table({"one": result}).splitlines()
    assert lines[-3:] == [
        "| data | arm | `pool.x` | `pool.y` |",
        "| --- | --- | --- | --- |",
        "| set | a | 0.123 | none |",
    ]
    del result["arms"]["set/a"]["measures"]
    assert "pool.x" not in results_table({"one": result})
