"""From a recipe to a ready trainer; real data is opened here and nowhere else."""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.metadata import requires as requires_of
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from vestige.core import seeding
from vestige.core.protocols import DataSet, Plugin, Source, Task, Teacher
from vestige.core.types import Access, InputSpec, Requires, count_parameters
from vestige.errors import (
    AccessError,
    DataError,
    MissingExtraError,
    NoBatchNormError,
    RecipeError,
    TeacherError,
)
from vestige.models.factory import build_generator, build_model
from vestige.models.probes import batchnorm_layers
from vestige.recipes.catalog import DATA, METHODS, PLUGINS, TASKS
from vestige.recipes.schema import ModelConfig, Recipe, SourceConfig, explain
from vestige.recipes.teacher import teacher_from_recipe
from vestige.sources.generator import GeneratorSource
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource
from vestige.teachers.black_box import BlackBoxTeacher
from vestige.teachers.loading import (
    WEIGHTS_FOLDER,
    builtin_card,
    fingerprint,
    load_from_card,
    load_teacher,
)
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training import guard, runtime
from vestige.training.summary import RealData, RunFacts
from vestige.training.tracking import Callback
from vestige.training.trainer import Trainer

MADE_UP = ("noise", "generator", "synthetic")


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher with what its card says, or the recipe where it has none."""

    module: nn.Module
    spec: InputSpec
    num_classes: int
    classes: tuple[str, ...] = ()
    trained_on: str = ""


@dataclass(frozen=True)
class Job:
    """A run that is ready to start."""

    trainer: Trainer
    task: Task
    facts: RunFacts
    classes: tuple[str, ...]
    student: nn.Module | None


def build(
    recipe: Recipe,
    *,
    out: Path | None = None,
    callbacks: Sequence[Callback] = (),
    command: str = "",
    arm: str = "",
) -> Job:
    """Load the teacher, build student, sources, method and plug-ins, and open the test data.

    Args:
        recipe: validated.
        out: run folder, or None to keep nothing.
        callbacks: called with the run's events.
        command: for the run record.
        arm: name of the arm, for the run record.

    Raises:
        RecipeError: what the recipe says does not fit together.
        TeacherError: the teacher cannot be loaded or lacks what the method needs.
        DataError: a data set is missing.
    """
    device = runtime.device(recipe.trainer.device)
    loaded = resolve_teachers(recipe)
    first = loaded[0]
    spec = first.spec
    teachers = [_shown(one.module.to(device), recipe) for one in loaded]
    task = TASKS.get(recipe.task)(spec, recipe.num_classes or first.num_classes)
    student = None
    if recipe.student is not None:
        student = build_student(recipe.student, spec, task.num_classes, recipe.seed).to(device)
    read: list[RealData] = []
    sources = {
        name: build_source(config, spec, recipe.seed, device, read, arm or recipe.method)
        for name, config in recipe.sources.items()
    }
    evaluate, teacher_score = None, None
    classes = first.classes
    if recipe.data is not None:
        test = DATA.get(spec.kind).open(recipe.data, "test")
        if test.classes and len(test.classes) != task.num_classes:
            raise DataError(
                f"got {len(test.classes)} classes in {test.name}, expected {task.num_classes} as "
                "the student has; judge it on data of its own classes"
            )
        classes = classes or test.classes
        read.append(_record(test, "real", "evaluation", "evaluation"))
        evaluate = _evaluation(task, test.examples(spec))
        # Not through the teacher object, which counts what the method asks of it.
        teacher_score = evaluate(first.module)[task.metric]
    plugins = build_plugins(
        {plugin.name: plugin.config for plugin in recipe.plugins},
        METHODS.get(recipe.method),
        task,
        teachers,
    )
    method = build_method(
        recipe.method, recipe.method_config(), task, teachers, student, sources, recipe.seed
    )
    weights = ", ".join(fingerprint(one.module) for one in loaded)
    trainer = Trainer(
        method,
        task,
        teachers=teachers,
        student=student,
        plugins=plugins,
        sources=sources,
        evaluate=evaluate,
        out=out,
        seed=recipe.seed,
        config=recipe.trainer,
        identity={
            **recipe.model_dump(mode="json", exclude={"trainer", "arms", "shared", "config"}),
            "config": recipe.method_config().model_dump(mode="json"),
            "teacher_fingerprint": weights,
        },
        callbacks=callbacks,
    )
    facts = RunFacts(
        method=recipe.method,
        plugins=tuple(plugins),
        teacher_score=teacher_score,
        teacher_parameters=sum(count_parameters(one.module) for one in loaded),
        teacher_fingerprint=weights,
        teacher_trained_on="; ".join(one.trained_on for one in loaded if one.trained_on),
        real_data=tuple(read),
        seed=recipe.seed,
        recipe_yaml=recipe.to_yaml(),
        student_card={
            **_network_card(recipe.student),
            "input": input_card(spec),
            "num_classes": task.num_classes,
            "classes": list(classes),
        },
        command=command,
        variant=variant_of(method),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return Job(trainer, task, facts, classes, student)


def resolve_teachers(recipe: Recipe) -> list[LoadedTeacher]:
    """The recipe's teachers; all of them take the same inputs."""
    loaded = []
    for index, teacher in enumerate((recipe.teacher, *recipe.more_teachers)):
        # A factory may draw; a resumed run must find the same teacher.
        with seeding.seeded(recipe.seed, f"teacher {index}"):
            loaded.append(resolve_teacher(teacher, recipe))
    for index, one in enumerate(loaded[1:]):
        if one.spec != loaded[0].spec:
            raise RecipeError(
                f"more_teachers.{index}: takes {one.spec}, expected {loaded[0].spec} as the first"
            )
    return loaded


def resolve_teacher(teacher: str | Mapping[str, Any], recipe: Recipe) -> LoadedTeacher:
    """One teacher; what its card says must not contradict the recipe."""
    given = None if recipe.input is None else recipe.input.spec()
    alone = not recipe.more_teachers
    if isinstance(teacher, str) and teacher.startswith(("builtin:", "recipe:")):
        scheme, _, name = teacher.partition(":")
        if scheme == "builtin":
            card = builtin_card(name)
            module = load_from_card(card, WEIGHTS_FOLDER / f"{name}.safetensors")
        else:
            module, card = teacher_from_recipe(name)
        spec = card.input.spec()
        if given is not None and given != spec:
            raise RecipeError(
                f"input: got {given}, expected {spec} as {teacher} was trained; leave 'input' out"
            )
        # Several teachers may know different classes; `num_classes` is then the student's.
        if alone and recipe.num_classes not in (None, card.num_classes):
            raise RecipeError(
                f"num_classes: got {recipe.num_classes}, expected {card.num_classes} as {teacher} "
                "has; leave it out"
            )
        trained_on = f"{card.data}/train, {card.train_fingerprint[:12]}"
        return LoadedTeacher(module, spec, card.num_classes, card.classes, trained_on)
    own = dict(teacher) if isinstance(teacher, Mapping) else {}
    count = own.pop("num_classes", recipe.num_classes)
    if given is None or count is None:
        raise RecipeError(
            "input and num_classes: a teacher without a card needs both in the recipe; add them"
        )
    module = load_teacher(own or teacher, input_spec=given, num_classes=count)
    return LoadedTeacher(module, given, count)


def _shown(module: nn.Module, recipe: Recipe) -> Teacher:
    """The teacher as far as the recipe's access level shows it."""
    if recipe.access is Access.WHITE_BOX:
        return WhiteBoxTeacher(module)
    return BlackBoxTeacher(module, access=recipe.access, budget=recipe.query_budget)


def _network_card(config: ModelConfig | None) -> dict[str, Any]:
    """What `load_teacher` reads again, so that a student can teach."""
    if config is None:
        return {}
    kind = {"factory": config.factory} if config.name is None else {"model": config.name}
    return {**kind, "args": config.args}


def input_card(spec: InputSpec) -> dict[str, Any]:
    """What `InputConfig` reads again."""
    sizes = dict(zip(("channels", "height", "width"), spec.shape, strict=False))
    shape = sizes if spec.kind == "image" else {"kind": spec.kind, "shape": list(spec.shape)}
    return {**shape, "mean": list(spec.mean), "std": list(spec.std)}


def build_student(config: ModelConfig, spec: InputSpec, num_classes: int, seed: int) -> nn.Module:
    """A fresh student; the same seed gives the same weights in every arm."""
    with seeding.seeded(seed, "student"):
        if config.name is not None:
            return build_model(config.name, spec, num_classes, **config.args)
        made = _call("student.factory", str(config.factory), config.args)
    if not isinstance(made, nn.Module):
        raise RecipeError(
            f"student.factory: {config.factory!r} made a {type(made).__name__}, expected a "
            "torch.nn.Module"
        )
    return made


def _call(key: str, factory: str, args: Mapping[str, Any]) -> Any:
    """What the user's own "package.module:callable" makes."""
    where, _, attribute = factory.partition(":")
    try:
        return getattr(import_module(where), attribute)(**args)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{key}: got {factory!r}, expected 'package.module:callable' that takes "
            f"{sorted(args) or 'no arguments'}; {error}"
        ) from error


def build_source(
    config: SourceConfig,
    spec: InputSpec,
    seed: int,
    device: torch.device,
    read: list[RealData],
    reader: str,
) -> Source:
    """A source; what it reads is added to `read`."""
    if config.kind == "noise":
        return NoiseSource(spec, distribution=config.distribution)
    if config.kind == "untrained-generator":
        with seeding.seeded(seed, "generator"):
            generator = build_generator(
                config.generator, spec, latent_dim=config.latent_dim, width=config.generator_width
            )
        return GeneratorSource(generator.to(device))
    if config.kind == "factory":
        made: Source = _call("sources", str(config.factory), {"spec": spec, **config.args})
        if made.origin not in MADE_UP:
            count = len(made) if isinstance(made, Sized) else 0
            read.append(RealData(made.name, made.origin, reader, "distillation", count, ""))
        return made
    found = DATA.get(spec.kind).open(str(config.data), config.split)
    read.append(_record(found, config.origin, reader, "distillation"))
    inputs = found.inputs(spec).to(device)
    return TensorSource(inputs, origin=config.origin, name=found.name)


def build_plugins(
    chosen: Mapping[str, Mapping[str, object]],
    method: type[object],
    task: Task,
    teachers: Sequence[Teacher],
) -> dict[str, Plugin]:
    """Plug-ins by name, outermost first, after their requirements were checked."""
    requires: Requires = getattr(method, "requires", Requires())
    closed = [name for name in chosen if {name, "*"} & set(requires.closed_to)]
    if closed:
        raise RecipeError(f"{method.__name__} is closed to the plug-ins {closed}; leave them out")
    made = {}
    for name, config in chosen.items():
        plugin = PLUGINS.get(name)
        check_requirements(name, plugin.requires, task, teachers, {})
        try:
            settings = plugin.Config.model_validate(dict(config))
        except ValidationError as error:
            problems = "; ".join(explain(error, plugin.Config, f"plugins.{name}"))
            raise RecipeError(problems) from None
        made[name] = plugin(settings)
    return made


def build_method(
    name: str,
    config: object,
    task: Task,
    teachers: Sequence[Teacher],
    student: nn.Module | None,
    sources: Mapping[str, Source],
    seed: int,
) -> Any:
    """The method, after its requirements were checked; it may not open a file meanwhile."""
    method = METHODS.get(name)
    check_requirements(name, method.requires, task, teachers, sources)
    allowed = tuple(path for source in sources.values() for path in source.paths)
    with seeding.seeded(seed, "generator"), guard.watching(name, allowed):
        return method(config, task, teachers, student, sources)


def variant_of(method: Any) -> str:
    """Which options of a method are on, in words; "" where it does not say or is as published."""
    said = getattr(method, "variant", None)
    return str(said()) if callable(said) else ""


def check_requirements(
    name: str,
    requires: Requires,
    task: Task,
    teachers: Sequence[Teacher],
    sources: Mapping[str, Source],
) -> None:
    """Refuse what cannot work before anything is drawn.

    Raises:
        TeacherError: too few or too many teachers, or not enough access to one.
        NoBatchNormError: BatchNorm statistics are needed and a teacher has none.
        RecipeError: a source is missing, or the task is of another kind.
        MissingExtraError: an optional package is not installed.
    """
    if task.kind not in requires.tasks:
        raise RecipeError(
            f"{name!r} serves {', '.join(requires.tasks)}, got the task {task.kind!r}; take another"
        )
    for extra in requires.extras:
        _check_extra(name, extra)
    low, high = requires.teachers
    if not low <= len(teachers) <= high:
        raise TeacherError(f"{name!r} takes {low} to {high} teachers, got {len(teachers)}")
    for teacher in teachers:
        if not teacher.access.covers(requires.access):
            raise AccessError(
                f"{name!r} needs {requires.access} access, the teacher offers {teacher.access}; "
                "take a method that needs less (vestige list methods)"
            )
        layers = batchnorm_layers(teacher) if isinstance(teacher, nn.Module) else {}
        if requires.batchnorm and not layers:
            raise NoBatchNormError(
                f"{name!r} needs BatchNorm statistics, but the teacher has 0 BatchNorm layers; "
                "take a method that needs none (vestige list methods --without batchnorm)"
            )
    missing = [source for source in requires.sources if source not in sources]
    if missing:
        raise RecipeError(f"{name!r} needs the sources {missing}; hand them in")


def _check_extra(name: str, extra: str) -> None:
    """Whether every package of one of the project's extras is installed."""
    mark = re.compile(f"""extra == ['"]{re.escape(extra)}['"]""")
    needed = [line for line in requires_of("vestige") or [] if mark.search(line)]
    packages = [re.split(r"[\s\[<>=!~;(]", line, maxsplit=1)[0] for line in needed]
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError as error:
            raise MissingExtraError(
                f"{name!r} needs {package}, which is not installed; pip install 'vestige[{extra}]'"
            ) from error
    if not packages:
        raise RecipeError(f"{name!r} asks for the extra {extra!r}, which vestige does not have")


def _evaluation(task: Task, examples: Any) -> Callable[[nn.Module], Mapping[str, float]]:
    def evaluate(model: nn.Module) -> Mapping[str, float]:
        return task.evaluate(model, examples)

    return evaluate


def _record(found: DataSet, origin: str, by: str, purpose: str) -> RealData:
    return RealData(
        f"{found.name}/{found.split}", origin, by, purpose, len(found), found.fingerprint
    )
