"""Run a recipe and leave a run folder."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vestige.core import parallel
from vestige.errors import CheckpointError, Interrupted, RecipeError
from vestige.federated.federation import Federation
from vestige.recipes.build import Job, build
from vestige.recipes.correctness import add_correctness
from vestige.recipes.federation import PERSONAL, opened
from vestige.recipes.federation import brief as brief_federation
from vestige.recipes.files import read_yaml
from vestige.recipes.schema import Recipe
from vestige.recipes.sources import MADE_UP
from vestige.teachers.language_model import driven_apart
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.federation import write_federation
from vestige.training.files import (
    LOCK,
    locked,
    read_json,
    tensors_to_bytes,
    write_bytes,
    write_json,
)
from vestige.training.outcome import Outcome
from vestige.training.pools import pool_facts, pool_of, write_pool
from vestige.training.provenance import write_provenance
from vestige.training.readings import write_readings
from vestige.training.records import brief_records, record_facts, write_records
from vestige.training.report import write_report
from vestige.training.selection import brief, selection_facts, write_selection
from vestige.training.summary import (
    RunFacts,
    summarize,
    write_answers,
    write_details,
    write_samples,
    write_samples_over_time,
    write_start,
    write_student,
)
from vestige.training.tracking import Callback, Event
from vestige.training.trainer import Trainer

logger = logging.getLogger(__name__)


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    command: str = "",
    arm: str = "",
    report: bool = True,
    built: Callable[[Job], None] = lambda job: None,
    federation: Federation | None = None,
) -> dict[str, Any]:
    """The recipe's main run.

    A run that was finished is not repeated: `resume` then writes its report again.

    Args:
        recipe: validated.
        out: run folder; must be new or empty unless `resume`.
        resume: go on where an earlier run in `out` stopped.
        callbacks: called with the run's events.
        command: for the run record.
        arm: name of the arm, for the run record.
        report: whether to write report.html.
        built: called with what was built before it runs.
        federation: real clients in place of those that the recipe simulates.

    Returns:
        The contents of summary.json.
    """
    parallel.first(partial(check_folder, out, resume=resume))
    check_same(recipe, out)
    job = build(
        recipe, out=out, callbacks=callbacks, command=command, arm=arm, federation=federation
    )
    whole = parallel.first(partial(_whole, job, out)) if resume else None
    if whole is not None:
        if report:
            with _locked(out):
                parallel.first(partial(write_page, out))
        return whole
    if resume and (out / "run.json").is_file() and not has_checkpoint(out):
        logger.warning("%s holds no checkpoint to go on from; the run starts anew", out)
    built(job)
    return run_job(job, out, resume=resume, report=report)[1]


def run_job(
    job: Job, out: Path | None, *, resume: bool = False, report: bool = True
) -> tuple[Outcome, dict[str, Any]]:
    """Run what was built and leave its folder; None leaves nothing."""
    with _locked(out), job.trainer.trackers:
        if out is not None:
            # Again: another run may have begun here since the job was built.
            parallel.first(partial(check_folder, out, resume=resume))
            record_start(job.trainer, out, job.facts)
        with opened(job.trainer.method, job.trainer.sources):
            outcome = job.trainer.run(resume=resume)
        try:
            summary = parallel.first(partial(finish, job, outcome, out))
        except KeyboardInterrupt as error:
            raise Interrupted(
                "stopped while the result was written; --resume goes on from the last checkpoint"
            ) from error
        job.trainer.trackers.summary(summary)
        if out is not None and report:
            parallel.first(partial(write_page, out))
    return outcome, summary


@contextmanager
def _locked(out: Path | None) -> Iterator[None]:
    """`locked` by the first of several processes for all of them."""
    with ExitStack() as stack:

        def take() -> None:
            stack.enter_context(locked(out))

        parallel.first(take)
        yield


def has_checkpoint(out: Path) -> bool:
    """Whether a run in `out` left anything to go on from."""
    return any((out / "checkpoints").glob("*.safetensors"))


def _whole(job: Job, out: Path) -> dict[str, Any] | None:
    """The summary of the run in `out` if it was finished; a budget may have stopped it before.

    Raises:
        CheckpointError: it was a run with another teacher.
    """
    summary, record = read_json(out / "summary.json"), read_json(out / "run.json")
    if summary is None or record is None or not is_whole(summary):
        return None
    if not isinstance(record.get("teacher_fingerprint"), str):
        return None
    if record.get("teacher_fingerprint") != job.facts.teacher_fingerprint:
        raise CheckpointError(
            f"the run in {out} was started with other settings (teacher_fingerprint); resume with "
            "the teacher that it was started with, or start in a new folder"
        )
    return dict(summary)


def is_whole(summary: Mapping[str, Any]) -> bool:
    """Whether a summary is one of ours, and of a run that came to its end."""
    kinds = {"student": dict | None, "real_data": list, "diagnosis": list, "seconds": int | float}
    fits = all(isinstance(summary.get(key, ...), kind) for key, kind in kinds.items())
    return fits and summary.get("complete") is True and "images_made" in summary


def write_page(out: Path) -> None:
    """Write the page; whatever stops it now, the run is whole.

    Raises:
        Interrupted: Ctrl-C.
    """
    try:
        write_report([out], out / "report.html")
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"stopped while the report was written; the run in {out} is whole, and --resume writes "
            "its report"
        ) from error


def finish(job: Job, outcome: Outcome, out: Path | None) -> dict[str, Any]:
    """Write what a finished run leaves; the summary last, as the mark that the run is whole."""
    trained = None if outcome.result.kind in ("pool", "texts") else outcome.network or job.student
    summary = summarize(job.facts, outcome, job.task, trained, job.trainer.device)
    summary["images_made"] = _images_made(job, outcome)
    method, sources = job.trainer.method, job.trainer.sources
    selected = selection_facts(method, sources)
    if selected:
        summary["selection"] = brief(selected)
    written = record_facts(method, job.facts)
    if written:
        add_correctness(written, summary, method, job.judged_by)
        summary["records"] = brief_records(written)
    pool = pool_of(method.parts())
    if pool is not None:
        judge = next(iter(job.trainer.teachers), None)
        network = judge if isinstance(judge, nn.Module) else None
        summary["pool"] = pool_facts(pool, network, job.facts.seed)
    federated = None
    if job.judging is not None and job.recipe is not None:
        federated = job.judging.facts(outcome.scores, job.recipe.federation)
        summary["federated"] = brief_federation(federated, job.task.metric)
    if out is None:
        return summary
    if federated is not None:
        write_federation(out, federated)
    kind = outcome.result.kind
    if trained is not None and kind == "ensemble":
        write_bytes(out / "ensemble.safetensors", tensors_to_bytes(trained.state_dict()))
    # What clients keep for themselves lies with them, and the network beside it is only a part.
    elif trained is not None and kind != PERSONAL:
        write_student(out, trained, job.facts.student_card)
        if job.details is not None:
            write_details(out, job.details(trained), outcome, job.task, job.classes)
        if job.answers is not None:
            write_answers(out, job.answers(trained))
    shown = write_samples(out, outcome, job.task, job.classes)
    if pool is not None:
        write_pool(out, pool, summary["pool"], job.facts, job.classes)
        # A run that only makes images has no student to show them to.
        if not shown and (out / "pool" / "samples.png").is_file():
            write_bytes(out / "samples.png", (out / "pool" / "samples.png").read_bytes())
    write_samples_over_time(out, outcome, job.classes)
    write_readings(out, outcome, job.task, _asked(job), job.classes)
    write_selection(out, method, sources, job.task.spec, selected)
    write_records(out, method, written)
    filtered = write_provenance(out, method, sources, job.task)
    if filtered:
        summary["filtered"] = filtered
    write_json(out / "summary.json", summary)
    return summary


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

    How a run is driven may change, for example to give it more time or more queries.

    Raises:
        RecipeError: `out` holds a recipe with other settings; they are named.
    """
    path = out / "recipe.yaml"
    if not path.is_file():
        return
    asked, found = recipe.model_dump(mode="json"), read_yaml(path)
    # The folder holds every setting, what was suggested included; compared is what is given now.
    # That the others are the same is checked against the checkpoint.
    given = {**recipe.shared, **recipe.config}
    settings = recipe.method_config().model_dump(mode="json")
    asked["config"] = {key: settings[key] for key in given}
    # How a far teacher is asked may change, as how the run is driven.
    asked["teacher"], found["teacher"] = map(driven_apart, (asked["teacher"], found.get("teacher")))
    kept = found.get("config")
    if not isinstance(kept, Mapping):
        kept = {}
    found["config"] = {key: kept[key] for key in kept if key in given}
    now, then = _flat(asked), _flat(found)
    changed = sorted(
        key
        for key in {*now, *then}
        if now.get(key) != then.get(key)
        and key.partition(".")[0] not in ("trainer", "federation", "query_budget")
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else None
        flat.update(inner or {f"{prefix}{key}": value})
    return flat


def _asked(job: Job) -> Any:
    """The first teacher, as the network it is where it shows itself."""
    first = next(iter(job.trainer.teachers), None)
    return first.module if isinstance(first, WhiteBoxTeacher) else first


def _images_made(job: Job, outcome: Outcome) -> int | None:
    """Inputs made for the student, what is replayed counted once; None where nobody can tell.

    Where a source is real or a store the student's inputs were there before; a pool of the method's
    own is still made.
    """
    sources = job.trainer.sources.values()
    given = any(isinstance(one, Sized) or one.origin not in MADE_UP for one in sources)
    return 0 if given and "pool" not in job.trainer.method.parts() else outcome.images_made
