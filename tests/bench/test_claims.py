"""Verdicts by fixed rules, cells that are run once, and files in the documented form."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import yaml

from vestige.bench import claims
from vestige.bench.claims import Statement, load_definition, run_claim
from vestige.errors import RecipeError
from vestige.recipes.loading import load_recipe
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
    "teacher": dict,
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
    assert set(document["teacher"]) >= {"score", "parameters"}
    assert len(document["recipe_sha256"]) == 64
    assert document["arms"]
    for arm in document["arms"].values():
        assert set(arm) >= ARM
        assert len(arm["scores"]) == len(arm["seconds"]) == len(document["seeds"])
        assert arm["mean"] == pytest.approx(sum(arm["scores"]) / len(arm["scores"]))
        if len(arm["scores"]) > 1:
            low, high = arm["interval_95"]
            assert low <= arm["mean"] <= high
        else:
            assert arm["interval_95"] is None
    for claim in document["further_claims"]:
        assert set(claim) >= {"claim", "verdict"}
        assert claim["verdict"] in VERDICTS


# Verdicts


def results(**arms: list[float]) -> dict[str, Any]:
    """One case; the teacher scores 0.9."""
    return {
        "case": {
            name: [{"student": {"score": s}, "teacher": {"score": 0.9}} for s in scores]
            for name, scores in arms.items()
        }
    }


RECIPES = {"case": SimpleNamespace(baseline="noise", reference="real")}


def judge(statement: Statement, found: dict[str, Any], *, partial: str = "") -> tuple[str, str]:
    told = claims._judge(statement, RECIPES, found, partial=partial)
    assert told["claim"] == statement.claim
    return told["verdict"], told["failures"]


def test_a_claim_holds_if_every_rule_holds_on_every_seed():
    statement = Statement(
        claim="c", arm="a", share_of_teacher=0.5, points_above={"noise": 0.1}, gap_closed=0.5
    )
    found = results(a=[0.6, 0.7], noise=[0.4, 0.5], real=[0.7, 0.7])
    assert judge(statement, found) == ("holds", "")
    assert judge(statement, found, partial="not all arms ran") == ("not shown", "not all arms ran")


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"share_of_teacher": 0.75}, "case, seed number 1: 66.7% of the teacher"),
        ({"points_above": {"noise": 0.25}}, "case, seed number 1: 20.0 points above noise"),
        ({"points_above": {"real": 0.0}}, "case, seed number 1: -10.0 points above real"),
        ({"gap_closed": 0.8}, "case, seed number 1: gap closed 67%"),
    ],
)
def test_one_seed_that_fails_one_rule_is_enough_and_is_told(rules, told):
    found = results(a=[0.8, 0.6], noise=[0.2, 0.4], real=[0.7, 0.7])
    assert judge(Statement(claim="c", arm="a", **rules), found) == ("does not hold", told)


def test_every_failure_is_told():
    statement = Statement(claim="c", arm="a", share_of_teacher=1.0, points_above={"noise": 0.5})
    verdict, failures = judge(statement, results(a=[0.5, 0.5], noise=[0.1, 0.4]))
    assert verdict == "does not hold"
    assert failures.split("; ") == [
        "case, seed number 0: 55.6% of the teacher",
        "case, seed number 0: 40.0 points above noise",
        "case, seed number 1: 55.6% of the teacher",
        "case, seed number 1: 10.0 points above noise",
    ]


def test_a_gap_that_is_not_there_is_not_closed():
    statement = Statement(claim="c", arm="a", gap_closed=0.1)
    found = results(a=[0.9], noise=[0.8], real=[0.8])
    assert judge(statement, found) == ("does not hold", "case, seed number 0: no gap to close")
    found = results(a=[0.2], noise=[0.2], real=[0.8])
    assert judge(statement, found) == ("does not hold", "case, seed number 0: gap closed 0%")


def test_a_threshold_that_is_met_exactly_holds_in_spite_of_rounding():
    # 0.7 - 0.5 is a little less than 0.2 in floating point.
    assert 0.7 - 0.5 < 0.2
    statement = Statement(claim="c", arm="a", points_above={"noise": 0.2})
    assert judge(statement, results(a=[0.7], noise=[0.5]))[0] == "holds"
    assert judge(statement, results(a=[0.698], noise=[0.5]))[0] == "does not hold"


def test_every_case_must_hold():
    found = results(a=[0.9], noise=[0.1])
    found["other"] = results(a=[0.2], noise=[0.1])["case"]
    recipes = {**RECIPES, "other": RECIPES["case"]}
    told = claims._judge(
        Statement(claim="c", arm="a", points_above={"noise": 0.5}), recipes, found, partial=""
    )
    assert told["verdict"] == "does not hold"
    assert told["failures"] == "other, seed number 0: 10.0 points above noise"


@pytest.mark.parametrize("scores", [[0.1, 0.2], [0.968, 0.964, 0.958], [0.5, 0.5, 0.5, 0.6]])
def test_the_interval_is_students_t(scores):
    mean, error = sum(scores) / len(scores), scipy.stats.sem(scores)
    low, high = scipy.stats.t.interval(0.95, len(scores) - 1, loc=mean, scale=error)
    assert claims._interval(scores) == pytest.approx([low, high])


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
    assert first["further_claims"][0]["verdict"] == "holds"
    assert (first["seeds"], first["tried"], first["data"]) == ([0, 1, 2], ["nothing"], "digits")
    assert first["arms"]["digits/dfad-bn"]["images"] == first["arms"]["digits/noise"]["images"] + 2
    assert first["arms"]["digits/real"]["images"] == 0

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
    assert [claim["verdict"] for claim in document["further_claims"]] == ["not shown"]
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
    for case in definition.cases.values():
        recipe = load_recipe(case.recipe, overrides=case.overrides)
        arms = set(case.arms or recipe.arms)
        assert arms <= set(recipe.arms)
        for statement in definition.claims:
            assert {statement.arm, *statement.points_above} <= arms
            if statement.gap_closed is not None:
                assert {recipe.baseline, recipe.reference} <= arms
        used = {recipe.arm(arm).method for arm in arms}
        assert definition.method in used


@pytest.mark.parametrize("name", claims.known_claims())
def test_arms_of_a_claim_have_the_same_number_of_student_steps(name):
    for case in load_definition(name).cases.values():
        recipe = load_recipe(case.recipe, overrides=case.overrides)
        work = set()
        for arm in case.arms or recipe.arms:
            cfg = recipe.arm(arm).method_config()
            steps = cfg.rounds * cfg.iterations * getattr(cfg, "student_steps", 1)
            work.add((steps, cfg.batch_size))
        assert len(work) == 1


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
        found.setdefault(case, {})[label] = [
            {"student": {"score": score}, "teacher": teacher} for score in arm["scores"]
        ]
    recipes = {
        name: load_recipe(case.recipe, overrides=case.overrides)
        for name, case in definition.cases.items()
    }
    told = [document, *document["further_claims"]]
    for statement, published in zip(definition.claims, told, strict=True):
        again = claims._judge(statement, recipes, found, partial="")
        assert published["verdict"] == again["verdict"]


def test_a_broken_document_would_be_noticed(tmp_path):
    write_json(tmp_path / "x.json", {"schema": 1})
    with pytest.raises(KeyError):
        check_document(json.loads((tmp_path / "x.json").read_text()))
