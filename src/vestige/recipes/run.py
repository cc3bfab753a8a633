"""Run a recipe, alone or with all of its arms, and leave a run folder."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vestige.errors import RecipeError
from vestige.recipes.build import Job, build
from vestige.recipes.schema import Recipe, read_yaml
from vestige.training.files import LOCK, locked, write_json, write_text
from vestige.training.report import write_report
from vestige.training.summary import (
    RunFacts,
    summarize,
    write_samples,
    write_start,
    write_student,
)
from vestige.training.tracking import Callback, Event
from vestige.training.trainer import Outcome, Trainer

CallbackFor = Callable[[str], Sequence[Callback]]


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    command: str = "",
    arm: str = "",
    report: bool = True,
) -> dict[str, Any]:
    """The recipe's main run.

    Args:
        recipe: validated.
        out: run folder; must be new or empty unless `resume`.
        resume: go on where an earlier run in `out` stopped.
        callbacks: called with the run's events.
        command: for the run record.
        arm: name of the arm, for the run record.
        report: whether to write report.html.

    Returns:
        The contents of summary.json.
    """
    check_folder(out, resume=resume)
    check_same(recipe, out)
    job = build(recipe, out=out, callbacks=callbacks, command=command, arm=arm)
    return run_job(job, out, resume=resume, report=report)[1]


def run_job(
    job: Job, out: Path | None, *, resume: bool = False, report: bool = True
) -> tuple[Outcome, dict[str, Any]]:
    """Run what was built and leave its folder; None leaves nothing."""
    with locked(out):
        if out is not None:
            # Again: another process may have run here since the job was built.
            check_folder(out, resume=resume)
            record_start(job.trainer, out, job.facts)
        outcome = job.trainer.run(resume=resume)
        summary = finish(job, outcome, out)
        if out is not None and report:
            write_report([out], out / "report.html")
    return outcome, summary


def finish(job: Job, outcome: Outcome, out: Path | None) -> dict[str, Any]:
    """Write what a finished run leaves; the summary last, as the mark that the run is whole."""
    trained = outcome.network or job.student
    summary = summarize(job.facts, outcome, job.task, trained, job.trainer.device)
    summary["images_made"] = _images_made(job, outcome)
    if out is None:
        return summary
    if trained is not None:
        write_student(out, trained, job.facts.student_card)
    write_samples(out, outcome, job.task, job.classes)
    write_json(out / "summary.json", summary)
    return summary


def run_arms(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    callbacks: CallbackFor = lambda arm: (),
    command: str = "",
) -> dict[str, Any]:
    """All arms of a recipe, each in a folder of its own, and one summary and report about them.

    The headline arm's student, samples and figures are the ones of the whole.
    """
    if not recipe.arms or recipe.headline is None:
        raise RecipeError("the recipe has no arms or names no headline arm; run it without arms")
    check_folder(out, resume=resume)
    for name in recipe.arms:
        check_same(recipe.arm(name), out / "arms" / name)
    write_text(out / "recipe.yaml", recipe.to_yaml())
    summaries = {}
    for name in recipe.arms:
        folder = out / "arms" / name
        done = folder / "summary.json"
        if resume and done.is_file():
            summaries[name] = json.loads(done.read_text(encoding="utf8"))
            # One that a budget stopped goes on.
            if summaries[name]["complete"]:
                continue
        summaries[name] = run_recipe(
            recipe.arm(name),
            folder,
            resume=resume,
            callbacks=callbacks(name),
            command=command,
            arm=name,
            report=False,
        )
    _check_teachers(out, list(recipe.arms))
    return _gather(recipe, out, summaries)


def check_folder(out: Path, *, resume: bool) -> None:
    """Refuse to write into a folder that holds something else.

    Raises:
        RecipeError: it is not empty and `resume` is not set.
    """
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out: {out} is a file, expected a folder; name another")
    if not resume and out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise RecipeError(
            f"--out: {out} is not empty; add --resume to go on with the run in it, or name another"
        )


def check_same(recipe: Recipe, out: Path) -> None:
    """Refuse to go on with the run of another recipe.

    How a run is driven may change, for example to give it more time.

    Raises:
        RecipeError: `out` holds a recipe with other settings; they are named.
    """
    path = out / "recipe.yaml"
    if not path.is_file():
        return
    now, then = _flat(recipe.model_dump(mode="json")), _flat(read_yaml(path))
    changed = sorted(
        key
        for key in {*now, *then}
        if now.get(key) != then.get(key) and key.partition(".")[0] != "trainer"
    )
    if changed:
        raise RecipeError(
            f"--resume: the run in {out} was started with other settings ({', '.join(changed)}); "
            "resume it with the recipe that it was started with, or start in a new folder"
        )


def record_start(trainer: Trainer, out: Path, facts: RunFacts) -> None:
    """Write recipe.yaml and run.json once the trainer has accepted what it is to resume."""

    def write(event: Event) -> None:
        if event.kind == "start":
            write_start(out, facts)

    trainer.callbacks.insert(0, write)


def gap_closed(score: float, baseline: float, reference: float) -> float | None:
    """Share of the way from the baseline arm to the reference arm; None where there is no gap."""
    return None if reference <= baseline else (score - baseline) / (reference - baseline)


def arm_details(recipe: Recipe, summaries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm: score, gap closed, seconds, images made, real images read to train."""
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
    records = {
        arm: json.loads((out / "arms" / arm / "run.json").read_text(encoding="utf8"))
        for arm in arms
    }
    found = {arm: record["teacher_fingerprint"] for arm, record in records.items()}
    if len(set(found.values())) > 1:
        raise RecipeError(
            f"the arms in {out} had different teachers ({found}); run all of them in a new folder"
        )


def _gather(recipe: Recipe, out: Path, summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    chosen = out / "arms" / str(recipe.headline)
    rows = arm_details(recipe, summaries)
    summary = {
        **summaries[str(recipe.headline)],
        "arms": {row["name"]: row["score"] for row in rows},
        "arm_details": rows,
        "headline": recipe.headline,
        "seconds_all_arms": round(sum(row["seconds"] for row in rows), 2),
        "complete": all(summary["complete"] for summary in summaries.values()),
    }
    for file in ("student.safetensors", "student.json", "samples.png", "metrics.jsonl"):
        if (chosen / file).is_file():
            shutil.copyfile(chosen / file, out / file)
    record = json.loads((chosen / "run.json").read_text(encoding="utf8"))
    seen = {
        json.dumps(item, sort_keys=True): item
        for s in summaries.values()
        for item in s["real_data"]
    }
    write_json(out / "run.json", {**record, "real_data": list(seen.values())})
    write_json(out / "summary.json", summary)
    write_report([out], out / "report.html")
    return summary


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else None
        flat.update(inner or {f"{prefix}{key}": value})
    return flat


def _images_made(job: Job, outcome: Outcome) -> int:
    """Rows that the teacher was asked about, if none of them is real; replayed ones count again."""
    real = any(
        source.origin not in ("noise", "generator") for source in job.trainer.sources.values()
    )
    return 0 if real else outcome.teacher_queries
