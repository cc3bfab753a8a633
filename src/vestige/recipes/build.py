"""From a recipe to a ready trainer; real data is opened here and nowhere else."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from vestige.core import seeding
from vestige.core.protocols import Plugin, Source, Teacher
from vestige.core.types import InputSpec, Requires, count_parameters
from vestige.data.images import ImageSet, load_images, to_inputs
from vestige.errors import AccessError, NoBatchNormError, RecipeError, TeacherError
from vestige.models.factory import build_generator, build_model
from vestige.models.probes import batchnorm_layers
from vestige.recipes.catalog import METHODS, PLUGINS
from vestige.recipes.schema import ModelConfig, Recipe, SourceConfig, explain
from vestige.recipes.teacher import teacher_from_recipe
from vestige.sources.generator import GeneratorSource
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource
from vestige.tasks.classification import Classification
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
    task: Classification
    facts: RunFacts
    classes: tuple[str, ...]
    student: nn.Module


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
    loaded = resolve_teacher(recipe)
    device = runtime.device(recipe.trainer.device)
    teacher = WhiteBoxTeacher(loaded.module.to(device))
    task = Classification(loaded.spec, loaded.num_classes)
    student = build_student(recipe.student, loaded.spec, loaded.num_classes, recipe.seed)
    student.to(device)
    read: list[RealData] = []
    sources = {
        name: build_source(config, loaded.spec, recipe.seed, device, read, arm or recipe.method)
        for name, config in recipe.sources.items()
    }
    evaluate, teacher_score = None, None
    classes = loaded.classes
    if recipe.data is not None:
        test = load_images(recipe.data, "test")
        classes = classes or test.classes
        read.append(_record(test, "real", "evaluation", "evaluation"))
        data = (to_inputs(test.images, loaded.spec), torch.from_numpy(test.labels))
        evaluate = _evaluation(task, data)
        # Not through the teacher object, which counts what the method asks of it.
        teacher_score = task.evaluate(loaded.module, data)[task.metric]
    plugins = build_plugins(
        {plugin.name: plugin.config for plugin in recipe.plugins}, METHODS.get(recipe.method)
    )
    method = build_method(
        recipe.method, recipe.method_config(), task, [teacher], student, sources, recipe.seed
    )
    weights = fingerprint(loaded.module)
    trainer = Trainer(
        method,
        task,
        teachers=[teacher],
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
        teacher_parameters=count_parameters(loaded.module),
        teacher_fingerprint=weights,
        teacher_trained_on=loaded.trained_on,
        real_data=tuple(read),
        seed=recipe.seed,
        recipe_yaml=recipe.to_yaml(),
        student_card={
            **recipe.student.model_dump(mode="json"),
            "input": {
                "channels": loaded.spec.shape[0],
                "height": loaded.spec.shape[1],
                "width": loaded.spec.shape[2],
                "mean": list(loaded.spec.mean),
                "std": list(loaded.spec.std),
            },
            "num_classes": loaded.num_classes,
            "classes": list(classes),
        },
        command=command,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return Job(trainer, task, facts, classes, student)


def resolve_teacher(recipe: Recipe) -> LoadedTeacher:
    """The recipe's teacher; what its card says must not contradict the recipe."""
    teacher = recipe.teacher
    given = None if recipe.input is None else recipe.input.spec()
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
        if recipe.num_classes not in (None, card.num_classes):
            raise RecipeError(
                f"num_classes: got {recipe.num_classes}, expected {card.num_classes} as {teacher} "
                "has; leave it out"
            )
        trained_on = f"{card.data}/train, {card.train_fingerprint[:12]}"
        return LoadedTeacher(module, spec, card.num_classes, card.classes, trained_on)
    if given is None or recipe.num_classes is None:
        raise RecipeError(
            "input and num_classes: a teacher without a card needs both in the recipe; add them"
        )
    module = load_teacher(teacher, input_spec=given, num_classes=recipe.num_classes)
    return LoadedTeacher(module, given, recipe.num_classes)


def build_student(config: ModelConfig, spec: InputSpec, num_classes: int, seed: int) -> nn.Module:
    """A fresh student; the same seed gives the same weights in every arm."""
    with seeding.seeded(seed, "student"):
        if config.name is not None:
            return build_model(config.name, spec, num_classes, **config.args)
        where, _, attribute = str(config.factory).partition(":")
        try:
            made = getattr(import_module(where), attribute)(**config.args)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise RecipeError(
                f"student.factory: got {config.factory!r}, expected 'package.module:callable' that "
                f"takes {sorted(config.args) or 'no arguments'}; {error}"
            ) from error
    if not isinstance(made, nn.Module):
        raise RecipeError(
            f"student.factory: {config.factory!r} made a {type(made).__name__}, expected a "
            "torch.nn.Module"
        )
    return made


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
    found = load_images(str(config.data), config.split)
    read.append(_record(found, config.origin, reader, "distillation"))
    inputs = to_inputs(found.images, spec).to(device)
    return TensorSource(inputs, origin=config.origin, name=found.name)


def build_plugins(
    chosen: Mapping[str, Mapping[str, object]], method: type[object]
) -> dict[str, Plugin]:
    """Plug-ins by name, outermost first."""
    requires: Requires = getattr(method, "requires", Requires())
    closed = [name for name in chosen if name in requires.closed_to]
    if closed:
        raise RecipeError(f"{method.__name__} is closed to the plug-ins {closed}; leave them out")
    made = {}
    for name, config in chosen.items():
        plugin = PLUGINS.get(name)
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
    task: Classification,
    teachers: Sequence[Teacher],
    student: nn.Module,
    sources: Mapping[str, Source],
    seed: int,
) -> Any:
    """The method, after its requirements were checked; it may not open a file meanwhile."""
    method = METHODS.get(name)
    check_requirements(name, method.requires, teachers, sources)
    allowed = tuple(path for source in sources.values() for path in source.paths)
    with seeding.seeded(seed, "generator"), guard.watching(name, allowed):
        return method(config, task, teachers, student, sources)


def check_requirements(
    name: str, requires: Requires, teachers: Sequence[Teacher], sources: Mapping[str, Source]
) -> None:
    """Refuse what cannot work before anything is drawn.

    Raises:
        TeacherError: too few or too many teachers, or not enough access to one.
        NoBatchNormError: BatchNorm statistics are needed and a teacher has none.
        RecipeError: a source is missing.
    """
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


def _evaluation(
    task: Classification, data: tuple[torch.Tensor, torch.Tensor]
) -> Callable[[nn.Module], Mapping[str, float]]:
    def evaluate(student: nn.Module) -> Mapping[str, float]:
        return task.evaluate(student, data)

    return evaluate


def _record(images: ImageSet, origin: str, by: str, purpose: str) -> RealData:
    return RealData(
        f"{images.name}/{images.split}", origin, by, purpose, len(images), images.fingerprint
    )
