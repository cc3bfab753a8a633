"""Judge a network again: a run's student, or any teacher, on real data."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from vestige.core.protocols import JudgesInDetail
from vestige.core.types import count_parameters
from vestige.errors import DataError, RecipeError, TeacherError
from vestige.recipes.examples import fit_classes, open_for_judging
from vestige.recipes.files import read_yaml
from vestige.recipes.loading import validate
from vestige.recipes.resolve import resolve_teachers
from vestige.recipes.schema import Recipe
from vestige.recipes.tasks import CLASSIFICATION, make_task
from vestige.recipes.teacher import teacher_from_recipe
from vestige.teachers.ensemble import CombinedNetwork
from vestige.teachers.loading import fingerprint, of_card, open_teacher
from vestige.teachers.opened import OpenedTeacher
from vestige.training import runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """What came out.

    Attributes:
        name: what was judged, as it was asked for.
        parameters: number of weights.
        fingerprint: digest of the weights.
        data: name and split of the set.
        data_fingerprint: digest of its contents.
        inputs: how many there were.
        classes: their names, in the order of the logits, or ().
        metric: the one that counts.
        scores: all metrics by name.
        details: what the task tells besides, see `JudgesInDetail`; {} if it tells nothing.
        teacher: what the agreement is with, or "" where there is no teacher to ask.
    """

    name: str
    parameters: int
    fingerprint: str
    data: str
    data_fingerprint: str
    inputs: int
    classes: tuple[str, ...]
    metric: str
    scores: Mapping[str, float]
    details: Mapping[str, Any]
    teacher: str


@dataclass(frozen=True)
class _Target:
    opened: OpenedTeacher
    recipe: Recipe | None = None


def evaluate(
    target: str,
    *,
    data: str | None = None,
    split: str | None = None,
    device: str = "auto",
) -> Judged:
    """Metrics of a network on real data, and for a run its agreement with the teacher.

    Args:
        target: a run folder, a student.json or a teacher's card, a .safetensors file beside one of
            them, any name that `load_teacher` takes, "recipe:NAME", or a mapping for `load_teacher`
            in YAML.
        data: name or folder of a set, an .npz file, or a folder of pictures by class; None takes
            the set that the run's recipe names.
        split: "train", "select" or "test"; None takes "test", and all of a folder of pictures by
            class that is not divided into splits.
        device: as of `TrainerConfig`.

    Raises:
        RecipeError: the target is none of these, or no data is named.
        TeacherError: the network cannot be loaded.
        DataError: the data is missing, or its classes are not those of the network.
    """
    found = _open(target)
    opened = found.opened
    if opened.spec is None or opened.num_classes is None:
        raise RecipeError(
            f"got {target}, which does not say what its inputs and classes are; name it as a "
            "mapping with 'input' and 'num_classes'"
        )
    named = data or (found.recipe.data if found.recipe else None)
    if named is None:
        raise RecipeError(f"--data: {target} names no set to judge on; name one")
    where = runtime.device(device)
    # A card says nothing of the task that most networks are made for.
    kind = opened.task or (found.recipe.task if found.recipe else CLASSIFICATION)
    task = make_task(kind, opened.spec, opened.num_classes, opened.task_config)
    # What the recipe names is judged as it was in the run.
    wanted = split if data or split else "test"
    examples = open_for_judging(named, wanted, opened.spec)
    judged, classes = fit_classes(examples, opened.spec, opened.classes, opened.num_classes)
    network = opened.module.to(where)
    scores = dict(task.evaluate(network, judged))
    teacher, name = _teacher_of(found.recipe, opened.num_classes, where)
    details: Mapping[str, Any] = {}
    if isinstance(task, JudgesInDetail):
        details = task.details(network, teacher, judged)
    return Judged(
        target,
        count_parameters(network),
        fingerprint(network),
        f"{examples.name}/{examples.split}",
        examples.fingerprint,
        len(examples),
        classes,
        task.metric,
        scores,
        details,
        name,
    )


def _open(target: str) -> _Target:
    path = Path(target).expanduser()
    if target.lstrip().startswith("{"):
        return _Target(_mapped(target))
    if path.is_dir():
        return _run(path)
    if path.suffix == ".safetensors":
        cards = (path.with_suffix(".json"), path.with_name("student.json"))
        card = next((one for one in cards if one.is_file()), None)
        if not path.is_file() or card is None:
            what = "there is no card (.json) beside it" if path.is_file() else "there is no file"
            raise RecipeError(
                f"got the weights {path}, but {what}; name the network with them: "
                "'{factory: package.module:callable, weights: FILE, input: {...}, num_classes: N}'"
            )
        return _Target(open_teacher(card))
    if path.suffix in (".pt", ".pth", ".onnx"):
        raise RecipeError(
            f"got {target}, expected a run folder, a card or a network; weights alone do not say "
            "what network they are of: '{factory: package.module:callable, weights: FILE, "
            "input: {...}, num_classes: N}'"
        )
    return _Target(open_teacher(target, openers={"recipe": _trained}))


def _mapped(text: str) -> OpenedTeacher:
    try:
        mapping = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"got {text!r}, which is no YAML mapping: {error}") from error
    if not isinstance(mapping, dict):
        raise RecipeError(f"got {text!r}, expected a mapping; see `load_teacher`")
    return open_teacher(mapping, openers={"recipe": _trained})


def _trained(name: str) -> OpenedTeacher:
    module, card = teacher_from_recipe(name)
    return of_card(card, module)


def _run(folder: Path) -> _Target:
    """The student of a run, with the recipe if the run was started from one."""
    card = folder / "student.json"
    if not card.is_file():
        raise RecipeError(
            f"got the folder {folder}, which holds no student.json, expected the folder of a "
            "finished run that trained a student; finish it with --resume"
        )
    opened = open_teacher(card)
    try:
        recipe = validate(read_yaml(folder / "recipe.yaml"))
    except RecipeError as error:
        # A run from Python leaves its settings only; its teacher is not known by name.
        logger.info("%s holds no recipe that names a teacher: %s", folder, error)
        return _Target(opened)
    return _Target(opened, recipe)


def _teacher_of(
    recipe: Recipe | None, num_classes: int, where: torch.device
) -> tuple[nn.Module | None, str]:
    """The one network that a run learned from, where it can be had again."""
    if recipe is None or recipe.more_teachers:
        return None, ""
    try:
        (loaded,) = resolve_teachers(recipe)
    except (TeacherError, DataError, RecipeError) as error:
        logger.warning("the agreement with the teacher is left out: %s", error)
        return None, ""
    if loaded.num_classes != num_classes:
        return None, ""
    name = recipe.teacher if isinstance(recipe.teacher, str) else type(loaded.module).__name__
    if isinstance(loaded.module, CombinedNetwork):
        name = f"an ensemble of {len(loaded.module.members)}"
    return loaded.module.to(where), name
