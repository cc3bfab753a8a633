"""Headline claims: every arm over several seeds, each cell cached, the verdict by fixed rules."""

import datetime
import json
import logging
import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from pydantic import Field, ValidationError

from vestige.bench.verdicts import SCORE, Statement, Strict, judge, measured
from vestige.errors import RecipeError
from vestige.recipes.checks import explain
from vestige.recipes.files import read_yaml
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import check_same, run_recipe
from vestige.recipes.schema import Recipe
from vestige.training import runtime
from vestige.training.files import write_json

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
_LEAST_SEEDS = 3


class Case(Strict):
    """One setting: a recipe with arms, overrides as for `--set`, and which arms to run."""

    recipe: str
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()


class Definition(Strict):
    """What is run and what is claimed; the first claim is the headline.

    Attributes:
        method: name.
        cases: settings by name.
        claims: what is held against the results.
        tried: what else was tried, published with the result.
        shown: places of numbers in summary.json that are published beside those of the claims.
    """

    method: str
    cases: dict[str, Case]
    claims: tuple[Statement, ...] = Field(min_length=1)
    tried: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


def known_claims() -> list[str]:
    """Names of the claims that can be run."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_definition(name: str) -> Definition:
    """The definition of a claim.

    Raises:
        RecipeError: there is none of this name, or it is not valid.
    """
    path = FOLDER / f"{name}.yaml"
    if name not in known_claims():
        raise RecipeError(f"got claim {name!r}, expected one of {', '.join(known_claims())}")
    try:
        return Definition(**yaml.safe_load(path.read_text(encoding="utf8")))
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, Definition, name))) from None


def run_claim(
    name: str,
    *,
    seeds: Sequence[int],
    arms: Sequence[str] | None = None,
    out: Path,
    cells: Path,
    echo: Callable[[str], object] = logger.info,
) -> Path:
    """Run what is missing of a claim and write its JSON.

    Args:
        name: one of `known_claims`.
        seeds: of the runs; published results have at least 3.
        arms: a subset, for a look; then nothing is judged and the verdict is "not shown".
        out: folder that gets NAME.json.
        cells: run folders, one per case, arm and seed; finished ones are not run again.
        echo: gets a line per cell.

    Returns:
        The file that was written.
    """
    definition = load_definition(name)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    recipes: dict[str, Recipe] = {}
    for case_name, case in definition.cases.items():
        recipe = load_recipe(case.recipe, preset=case.preset, overrides=case.overrides)
        recipes[case_name] = recipe
        known = case.arms or tuple(recipe.arms)
        if strange := sorted({*(arms or ())} - {*known} | {*known} - {*recipe.arms}):
            raise RecipeError(f"got arms {strange}, case {case_name!r} has {', '.join(known)}")
        wanted = [arm for arm in known if arms is None or arm in arms]
        results[case_name] = {
            arm: [
                _cell(recipe, arm, seed, cells / name / case_name / arm / f"seed{seed}", echo)
                for seed in seeds
            ]
            for arm in wanted
        }
    path = out / f"{name}.json"
    write_json(
        path, _document(name, definition, recipes, results, seeds, partial=_partial(seeds, arms))
    )
    return path


def _partial(seeds: Sequence[int], arms: Sequence[str] | None) -> str:
    """Why nothing can be judged, "" if it can."""
    if arms is not None:
        return "not all arms ran"
    return f"{len(seeds)} seeds ran, 3 are needed" if len(seeds) < _LEAST_SEEDS else ""


def _cell(
    recipe: Recipe, arm: str, seed: int, folder: Path, echo: Callable[[str], object]
) -> dict[str, Any]:
    run = recipe.arm(arm).model_copy(update={"seed": seed})
    done = folder / "summary.json"
    resume = _is_of(run, folder)
    if folder.exists() and not resume and any(folder.iterdir()):
        raise RecipeError(
            f"{folder} holds a run of another recipe; move it away or name another --cells folder"
        )
    if not (resume and done.is_file()):
        run_recipe(run, folder, resume=resume, arm=arm, report=False)
    summary: dict[str, Any] = json.loads(done.read_text(encoding="utf8"))
    score = measured(summary, SCORE)
    taught = measured(summary, "teacher.score")
    of = "" if taught is None else f" of {taught:.1%}"
    told = "no student" if score is None else f"{score:.1%}{of}"
    echo(f"{folder}: {told} in {summary['seconds']:.0f} s")
    return summary


def _is_of(run: Recipe, folder: Path) -> bool:
    """Whether the folder holds this very run; here how it is driven counts, too."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return False
    try:
        check_same(run, folder)
    except RecipeError:
        return False
    return bool(read_yaml(path).get("trainer") == run.model_dump(mode="json")["trainer"])


def _document(
    name: str,
    definition: Definition,
    recipes: Mapping[str, Recipe],
    results: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    seeds: Sequence[int],
    *,
    partial: str,
) -> dict[str, Any]:
    judged = [judge(claim, recipes, results, partial=partial) for claim in definition.claims]
    first = next(iter(next(iter(results.values())).values()))[0]
    places = (*(claim.measure for claim in definition.claims), *definition.shown)
    arms = {
        f"{case}/{arm}": _arm(summaries, places)
        for case, by_arm in results.items()
        for arm, summaries in by_arm.items()
    }
    digest = sha256("".join(recipe.fingerprint() for recipe in recipes.values()).encode())
    return {
        "schema": 1,
        "method": definition.method,
        **judged[0],
        "metric": first["metric"],
        "data": ", ".join(map(_judged_on, recipes.values())),
        "teacher": first["teacher"],
        "teachers": {
            case: next(iter(by_arm.values()))[0]["teacher"] for case, by_arm in results.items()
        },
        "student_parameters": measured(first, "student.parameters"),
        "seeds": list(seeds),
        "arms": arms,
        "further_claims": judged[1:],
        "tried": list(definition.tried),
        "machine": runtime.machine(),
        "versions": runtime.versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "recipe_sha256": digest.hexdigest(),
        "command": f"vestige bench claims {name} --seeds {len(seeds)}",
    }


def _judged_on(recipe: Recipe) -> str:
    return " ".join([str(recipe.data), *(f"({shift})" for shift in recipe.data_shift)])


def _arm(summaries: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> dict[str, Any]:
    scores = [measured(summary, SCORE) for summary in summaries]
    # A run that only makes images has no student.
    judged = [score for score in scores if score is not None]
    whole = len(judged) == len(scores)
    found = {key: [measured(s, key) for s in summaries] for key in measures if key != SCORE}
    found = {key: told for key, told in found.items() if any(one is not None for one in told)}
    return {
        "scores": scores,
        "mean": fmean(judged) if whole else None,
        "interval_95": _interval(judged) if whole else None,
        "seconds": [summary["seconds"] for summary in summaries],
        "teacher_passes": summaries[0]["teacher_queries"],
        # Cells of an earlier version know the forward ones only.
        "teacher_backward_passes": measured(summaries[0], "teacher_passes.backward"),
        "images": summaries[0]["images_made"],
        "findings": sorted({f["code"] for summary in summaries for f in summary["diagnosis"]}),
        **({"measures": found} if found else {}),
    }


def _interval(scores: Sequence[float]) -> list[float] | None:
    """Student's t interval of the mean over seeds; None for a single one."""
    if len(scores) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(scores) - 1)) * stdev(scores) / math.sqrt(len(scores))
    return [fmean(scores) - half, fmean(scores) + half]


def commit() -> str | None:
    """The checkout's commit, None outside of one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
