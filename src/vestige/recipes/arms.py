"""Run all arms of a recipe, each in a folder of its own, and tell them apart on one page."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vestige.core import parallel
from vestige.errors import RecipeError
from vestige.recipes.build import Job
from vestige.recipes.compared import write_comparison
from vestige.recipes.run import check_folder, check_same, is_whole, run_recipe, write_page
from vestige.recipes.schema import Recipe
from vestige.training.files import read_json, write_bytes, write_json, write_text
from vestige.training.tracking import Callback

_OF_THE_HEADLINE = (
    *("student.safetensors", "student.json", "samples.png", "samples-over-time.png"),
    *("evaluation.json", "answers.png", "metrics.jsonl", "selection.json", "selection.png"),
    *("federated.json", "clients.png"),
)
CallbackFor = Callable[[str], Sequence[Callback]]


def run_arms(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    callbacks: CallbackFor = lambda arm: (),
    command: str = "",
    note: str = "",
    built: Callable[[Job], None] = lambda job: None,
) -> dict[str, Any]:
    """All arms of a recipe, each in a folder of its own, and one summary and report about them.

    The headline arm's student, samples and figures are the ones of the whole.

    Args:
        recipe: with arms and a headline.
        out: folder of the whole; each arm's is `arms/NAME` in it.
        resume: go on where an earlier run in `out` stopped.
        callbacks: by the name of an arm, what is called with its events.
        command: for the run record.
        note: what the arms have in common, for the page.
        built: called with what was built of each arm before it runs.

    Returns:
        The contents of summary.json.

    Raises:
        RecipeError: there are no arms, or the folder holds something else.
    """
    if not recipe.arms or recipe.headline is None:
        raise RecipeError("the recipe has no arms or names no headline arm; run it without arms")
    parallel.first(partial(check_folder, out, resume=resume))
    for name in recipe.arms:
        check_same(recipe.arm(name), out / "arms" / name)
    parallel.first(partial(write_text, out / "recipe.yaml", recipe.to_yaml()))
    summaries = {}
    for name in recipe.arms:
        folder = out / "arms" / name
        done = read_json(folder / "summary.json") if resume else None
        # One that a budget stopped goes on; one whose record is damaged gets it again.
        if done is not None and is_whole(done) and read_json(folder / "run.json") is not None:
            summaries[name] = done
            continue
        summaries[name] = run_recipe(
            recipe.arm(name),
            folder,
            resume=resume,
            callbacks=callbacks(name),
            command=command,
            arm=name,
            report=False,
            built=built,
        )
    _check_teachers(out, list(recipe.arms))
    return parallel.first(partial(_gather, recipe, out, summaries, note))


def gap_closed(score: float, baseline: float, reference: float) -> float | None:
    """Share of the way from the baseline arm to the reference arm; None where there is no gap."""
    return None if reference <= baseline else (score - baseline) / (reference - baseline)


def arm_details(recipe: Recipe, summaries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm: score, gap closed, seconds, teacher passes, images made, real images read.

    Teacher passes are rows, forward and backward to the inputs; an earlier version told none.
    """
    scores: dict[str, float | None] = {
        name: (summary["student"] or {}).get("score") for name, summary in summaries.items()
    }
    low, high = scores.get(str(recipe.baseline)), scores.get(str(recipe.reference))
    rows = []
    for name, summary in summaries.items():
        real = sum(
            item["images"] for item in summary["real_data"] if item["purpose"] == "distillation"
        )
        score = scores[name]
        rows.append(
            {
                "name": name,
                "title": recipe.arms[name].title,
                "score": score,
                "gap_closed": None
                if score is None or low is None or high is None
                else gap_closed(score, low, high),
                "seconds": summary["seconds"],
                "teacher_passes": summary.get("teacher_passes"),
                "images_made": summary["images_made"],
                "real_images_read": real,
                "data_free": real == 0,
                "headline": name == recipe.headline,
                "diagnosis": [finding["code"] for finding in summary["diagnosis"]],
            }
        )
    return rows


def _check_teachers(out: Path, arms: Sequence[str]) -> None:
    """Refuse to compare arms whose teachers differ, for example after weights were replaced."""
    records = {arm: read_json(out / "arms" / arm / "run.json") or {} for arm in arms}
    found = {arm: str(record.get("teacher_fingerprint")) for arm, record in records.items()}
    if len(set(found.values())) > 1:
        raise RecipeError(
            f"the arms in {out} had different teachers ({found}); run all of them in a new folder"
        )


def _gather(
    recipe: Recipe, out: Path, summaries: dict[str, dict[str, Any]], note: str
) -> dict[str, Any]:
    chosen = out / "arms" / str(recipe.headline)
    rows = arm_details(recipe, summaries)
    summary = {
        **summaries[str(recipe.headline)],
        "arms": {row["name"]: row["score"] for row in rows},
        "arm_details": rows,
        "headline": recipe.headline,
        "seconds_all_arms": round(sum(row["seconds"] for row in rows), 2),
        "complete": all(summary["complete"] for summary in summaries.values()),
        **({"note": note} if note else {}),
    }
    for file in _OF_THE_HEADLINE:
        if (chosen / file).is_file():
            write_bytes(out / file, (chosen / file).read_bytes())
    record = read_json(chosen / "run.json") or {}
    seen = {
        json.dumps(item, sort_keys=True): item
        for s in summaries.values()
        for item in s["real_data"]
    }
    write_json(out / "run.json", {**record, "real_data": list(seen.values())})
    if note:
        write_comparison(out, recipe, summary, rows)
    write_json(out / "summary.json", summary)
    write_page(out)
    return summary
