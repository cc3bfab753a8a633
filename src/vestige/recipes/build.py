"""From a recipe to a ready trainer; the test data is opened here."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from vestige.core import seeding
from vestige.core.protocols import (
    JudgesInDetail,
    NamesClasses,
    Plugin,
    ShowsAnswers,
    Source,
    Task,
    Teacher,
)
from vestige.core.types import Requires, count_parameters
from vestige.errors import NoBatchNormError, RecipeError
from vestige.federated.federation import Federation
from vestige.recipes.catalog import DATA, METHODS, PLUGINS
from vestige.recipes.examples import distorted, fit_classes
from vestige.recipes.federation import Judging, federation_of, open_clients
from vestige.recipes.leaks import hashes_of_set, leaks
from vestige.recipes.mistakes import explain
from vestige.recipes.requirements import check_requirements, no_batchnorm
from vestige.recipes.resolve import resolve_teachers, shown
from vestige.recipes.schema import Recipe
from vestige.recipes.settle import settled
from vestige.recipes.sources import Ledger, build_source, record_of
from vestige.recipes.student import build_student, input_card, network_card
from vestige.recipes.tasks import make_task, task_card
from vestige.recipes.unlabelled import few_rows
from vestige.teachers.language_model import driven_apart
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training import guard, runtime
from vestige.training.diagnosis import Finding
from vestige.training.inspection import notices
from vestige.training.pools import foreign_pools
from vestige.training.summary import RunFacts
from vestige.training.tracking import Callback
from vestige.training.trainer import Trainer

# What a resumed run may have otherwise, beside what stands in its identity in another form.
_CHANGEABLE = {"trainer", "federation", "query_budget", "arms", "shared", "config"}


@dataclass(frozen=True)
class Job:
    """A run that is ready to start.

    Its result is shown to `details` for `evaluation.json`, and to `answers` for `answers.png`;
    `judged_by` names the set that judges.
    """

    trainer: Trainer
    task: Task
    facts: RunFacts
    classes: tuple[str, ...]
    student: nn.Module | None
    details: Callable[[nn.Module], Mapping[str, Any]] | None = None
    answers: Callable[[nn.Module], Mapping[str, Tensor]] | None = None
    judged_by: str | None = None
    judging: Judging | None = None
    recipe: Recipe | None = None


def build(
    recipe: Recipe,
    *,
    out: Path | None = None,
    callbacks: Sequence[Callback] = (),
    command: str = "",
    arm: str = "",
    federation: Federation | None = None,
) -> Job:
    """Load the teacher, build student, sources, method and plug-ins, and open the test data.

    Args:
        recipe: validated.
        out: run folder, or None to keep nothing.
        callbacks: called with the run's events.
        command: for the run record.
        arm: name of the arm, for the run record.
        federation: real clients in place of those that the recipe simulates.

    Raises:
        RecipeError: what the recipe says does not fit together.
        TeacherError: the teacher cannot be loaded or lacks what the method needs.
        DataError: a data set is missing.
    """
    device = runtime.device(recipe.trainer.device)
    loaded = resolve_teachers(recipe)
    first = loaded[0]
    spec = first.spec
    teachers = [shown(one.placed(device), recipe) for one in loaded if one.module is not None]
    networks = [one.network for one in loaded if one.network is not None]
    task_config = {**first.task_config, **recipe.task_config}
    task = make_task(recipe.task, spec, recipe.num_classes or first.num_classes, task_config)
    student = None
    if recipe.student is not None:
        made = build_student(recipe.student, spec, task.num_classes, recipe.seed, loaded[0].module)
        student = made.to(device)
    ledger = Ledger(arm or recipe.method)
    sources = {
        name: federation or open_clients(config, recipe, spec, task.num_classes, out, ledger)
        if config.kind == "clients"
        else build_source(name, config, spec, recipe.seed, device, ledger)
        for name, config in recipe.sources.items()
    }
    federation = federation_of(sources)
    evaluate, teacher_score, details, answers = None, None, None, None
    leaked: list[Finding] = []
    classes = first.classes
    if recipe.data is not None:
        test = DATA.get(spec.kind).open(recipe.data, "test")
        if isinstance(first.module, NamesClasses) and test.classes:
            first.module.name_classes(test.classes)
            classes = tuple(test.classes)
        # Several teachers may know different classes.
        known = classes if len(classes) == task.num_classes else ()
        examples, classes = fit_classes(test, spec, known, task.num_classes)
        examples = distorted(examples, spec, recipe.data_shift)
        ledger.records.append(record_of(test, "real", "evaluation", "evaluation"))
        leaked, overlaps = leaks(ledger.hashed, partial(hashes_of_set, test, spec))
        for name, told in overlaps.items():
            ledger.about[name] = {**ledger.about.get(name, {}), **told}
        evaluate = _evaluation(task, examples)
        alone = first.network if len(loaded) == 1 else None
        details = in_detail(task, alone, examples)
        answers = in_pictures(task, alone, examples)
        # Not through the teacher object, which counts what the method asks of it.
        # What only writes texts has no score of its own.
        teacher_score = None if first.network is None else evaluate(first.network)[task.metric]
    judging = None
    if federation is not None:
        judging = Judging(evaluate, federation, recipe.federation.judges, task)
    recipe = settled(recipe, task, teachers, student)
    plugins = build_plugins(
        {plugin.name: plugin.config for plugin in recipe.plugins},
        METHODS.get(recipe.method),
        task,
        teachers,
    )
    method = build_method(
        recipe.method, recipe.method_config(), task, teachers, student, sources, recipe.seed
    )
    weights = ", ".join(one.fingerprint() for one in loaded)
    trainer = Trainer(
        method,
        task,
        teachers=teachers,
        student=student,
        plugins=plugins,
        sources=sources,
        evaluate=evaluate if judging is None else judging,
        out=out,
        seed=recipe.seed,
        config=recipe.trainer,
        identity={
            **recipe.model_dump(mode="json", exclude=_CHANGEABLE),
            "teacher": driven_apart(recipe.model_dump(mode="json")["teacher"]),
            "config": recipe.method_config().model_dump(mode="json"),
            "teacher_fingerprint": weights,
        },
        callbacks=callbacks,
        # Evaluation inputs are not looked at: they were made from images by this very spec.
        noticed=[
            *notices(networks, task, score=teacher_score),
            *foreign_pools(sources, weights),
            *leaked,
            *few_rows(sources, recipe.method_config()),
        ],
    )
    if judging is not None:
        judging.method = method
    facts = RunFacts(
        method=recipe.method,
        plugins=tuple(plugins),
        teacher_score=teacher_score,
        teacher_parameters=sum(map(count_parameters, networks)),
        teacher_fingerprint=weights,
        teacher_trained_on="; ".join(one.trained_on for one in loaded if one.trained_on),
        real_data=tuple(ledger.records),
        sources=ledger.about,
        seed=recipe.seed,
        recipe_yaml=recipe.to_yaml(),
        student_card={
            **network_card(recipe.student, student),
            "input": input_card(spec),
            "num_classes": task.num_classes,
            "classes": list(classes),
            **task_card(recipe.task, task_config),
        },
        command=command,
        variant=variant_of(method),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return Job(
        trainer, task, facts, classes, student, details, answers, recipe.data, judging, recipe
    )


def build_plugins(
    chosen: Mapping[str | type, Mapping[str, object]],
    method: type[object],
    task: Task,
    teachers: Sequence[Teacher],
) -> dict[str, Plugin]:
    """Plug-ins by name, outermost first, after their requirements were checked."""
    requires: Requires = getattr(method, "requires", Requires())
    names = {plugin: PLUGINS.name_of(plugin) for plugin in chosen}
    closed = [name for name in names.values() if {name, "*"} & set(requires.closed_to)]
    if closed:
        raise RecipeError(f"{method.__name__} is closed to the plug-ins {closed}; leave them out")
    made: dict[str, Plugin] = {}
    for named, config in chosen.items():
        plugin, name = PLUGINS.get(named), names[named]
        check_requirements(name, plugin.requires, task, teachers, {})
        try:
            settings = plugin.Config.model_validate(dict(config))
        except ValidationError as error:
            problems = "; ".join(explain(error, plugin.Config, f"plugins.{name}"))
            raise RecipeError(problems) from None
        made[name] = plugin(settings)
    return made


def build_method(
    chosen: str | type,
    config: object,
    task: Task,
    teachers: Sequence[Teacher],
    student: nn.Module | None,
    sources: Mapping[str, Source],
    seed: int,
) -> Any:
    """The method, after its requirements were checked; it may not open a file meanwhile.

    Raises:
        NoBatchNormError: its settings ask for BatchNorm statistics and the teacher has none.
    """
    method, name = METHODS.get(chosen), METHODS.name_of(chosen)
    check_requirements(name, method.requires, task, teachers, sources)
    allowed = tuple(path for source in sources.values() for path in source.paths)
    white = [teacher for teacher in teachers if isinstance(teacher, WhiteBoxTeacher)]
    asked = [(teacher.queries, teacher.gradients) for teacher in white]
    try:
        with seeding.seeded(seed, "generator"), guard.watching(name, allowed):
            return method(config, task, teachers, student, sources)
    except NoBatchNormError as error:
        raise NoBatchNormError(no_batchnorm(name, config, task.kind)) from error
    finally:
        # An empty image that shows where a network's layers are is no question to a teacher.
        for teacher, counts in zip(white, asked, strict=True):
            teacher.queries, teacher.gradients = counts


def variant_of(method: Any) -> str:
    """Which options of a method are on, in words; "" where it does not say or is as published."""
    said = getattr(method, "variant", None)
    return str(said()) if callable(said) else ""


def _evaluation(task: Task, examples: Any) -> Callable[[nn.Module], Mapping[str, float]]:
    def evaluate(model: nn.Module) -> Mapping[str, float]:
        return task.evaluate(model, examples)

    return evaluate


def in_detail(
    task: Task, teacher: nn.Module | None, examples: Any
) -> Callable[[nn.Module], Mapping[str, Any]] | None:
    """What asks `task` for details about a student beside `teacher`; None if it offers none."""
    if not isinstance(task, JudgesInDetail):
        return None
    judge = task
    return lambda student: judge.details(student, teacher, examples)


def in_pictures(
    task: Task, teacher: nn.Module | None, examples: Any
) -> Callable[[nn.Module], Mapping[str, Tensor]] | None:
    """What asks `task` to draw the answers of a student beside `teacher`; None if it cannot."""
    if not isinstance(task, ShowsAnswers):
        return None
    drawing = task
    return lambda student: drawing.answers(student, teacher, examples)
