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
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vestige.errors import RecipeError
from vestige.recipes.checks import explain
from vestige.recipes.files import read_yaml
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import check_same, gap_closed, run_recipe
from vestige.recipes.schema import Recipe
from vestige.training import runtime
from vestige.training.files import write_json

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
_LEAST_SEEDS = 3


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Case(_Strict):
    """One setting: a recipe with arms, overrides as for `--set`, and which arms to run."""

    recipe: str
    overrides: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()


class Statement(_Strict):
    """One claim and when it holds; every rule must hold on every seed of every case.

    Attributes:
        claim: the sentence.
        arm: the arm it speaks of.
        cases: the ones it speaks of; none means all.
        share_of_teacher: least share of the teacher's score.
        points_above: least distance to other arms, in units of the score.
        gap_closed: least share of the way from the baseline to the reference arm.
    """

    claim: str
    arm: str
    cases: tuple[str, ...] = ()
    share_of_teacher: float | None = None
    points_above: dict[str, float] = {}
    gap_closed: float | None = None


class Definition(_Strict):
    """What is run and what is claimed; the first claim is the headline.

    Attributes:
        method: name.
        cases: settings by name.
        claims: what is held against the results.
        tried: what else was tried, published with the result.
    """

    method: str
    cases: dict[str, Case]
    claims: tuple[Statement, ...] = Field(min_length=1)
    tried: tuple[str, ...] = ()


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
        recipe = load_recipe(case.recipe, overrides=case.overrides)
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
    echo(
        f"{folder}: {summary['student']['score']:.1%} of {summary['teacher']['score']:.1%} in "
        f"{summary['seconds']:.0f} s"
    )
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
    judged = [_judge(claim, recipes, results, partial=partial) for claim in definition.claims]
    first = next(iter(next(iter(results.values())).values()))[0]
    arms = {
        f"{case}/{arm}": _arm(summaries)
        for case, by_arm in results.items()
        for arm, summaries in by_arm.items()
    }
    digest = sha256("".join(recipe.fingerprint() for recipe in recipes.values()).encode())
    return {
        "schema": 1,
        "method": definition.method,
        **judged[0],
        "metric": first["metric"],
        "data": ", ".join(str(recipe.data) for recipe in recipes.values()),
        "teacher": first["teacher"],
        "teachers": {
            case: next(iter(by_arm.values()))[0]["teacher"] for case, by_arm in results.items()
        },
        "student_parameters": first["student"]["parameters"],
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


def _arm(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [summary["student"]["score"] for summary in summaries]
    return {
        "scores": scores,
        "mean": fmean(scores),
        "interval_95": _interval(scores),
        "seconds": [summary["seconds"] for summary in summaries],
        "teacher_passes": summaries[0]["teacher_queries"],
        "images": summaries[0]["images_made"],
        "findings": sorted({f["code"] for summary in summaries for f in summary["diagnosis"]}),
    }


def _interval(scores: Sequence[float]) -> list[float] | None:
    """Student's t interval of the mean over seeds; None for a single one."""
    if len(scores) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(scores) - 1)) * stdev(scores) / math.sqrt(len(scores))
    return [fmean(scores) - half, fmean(scores) + half]


def _judge(
    statement: Statement,
    recipes: Mapping[str, Recipe],
    results: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    *,
    partial: str,
) -> dict[str, str]:
    """The verdict, and which rules fail where."""
    if partial:
        return {"claim": statement.claim, "verdict": "not shown", "failures": partial}
    failures = []
    for case, by_arm in results.items():
        if statement.cases and case not in statement.cases:
            continue
        scores = {arm: [s["student"]["score"] for s in runs] for arm, runs in by_arm.items()}
        teachers = [s["teacher"]["score"] for s in by_arm[statement.arm]]
        recipe = recipes[case]
        for index, score in enumerate(scores[statement.arm]):
            where = f"{case}, seed number {index}"
            share = statement.share_of_teacher
            if share is not None and score < share * teachers[index]:
                failures.append(f"{where}: {score / teachers[index]:.1%} of the teacher")
            for other, points in statement.points_above.items():
                above = score - scores[other][index]
                # A difference of two accuracies on 500 images carries rounding in its last digit.
                if above < points - 1e-9:
                    failures.append(f"{where}: {100 * above:.1f} points above {other}")
            if statement.gap_closed is not None:
                low = scores[str(recipe.baseline)][index]
                closed = gap_closed(score, low, scores[str(recipe.reference)][index])
                if closed is None or closed < statement.gap_closed:
                    told = "no gap to close" if closed is None else f"gap closed {closed:.0%}"
                    failures.append(f"{where}: {told}")
    return {
        "claim": statement.claim,
        "verdict": "does not hold" if failures else "holds",
        "failures": "; ".join(failures),
    }


def commit() -> str | None:
    """The checkout's commit, None outside of one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
