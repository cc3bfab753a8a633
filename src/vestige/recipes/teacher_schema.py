"""Recipes for teachers: what one may say, and how it is read."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vestige.errors import RecipeError
from vestige.recipes.catalog import DATA, TASKS
from vestige.recipes.files import near
from vestige.recipes.tasks import CLASSIFICATION, task_problems
from vestige.teachers.cards import INPUTS, AnyInput
from vestige.training.files import sha256

RECIPES_FOLDER = Path(__file__).parent / "teachers"

_LATER_KEYS = (
    "flip",
    "label_smoothing",
    "optimizer",
    "momentum",
    "nesterov",
    "precision",
    "channels_last",
    "focal_gamma",
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelChoice(_Part):
    """A network of `models.factory`: its name and arguments."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)


class TrainingConfig(_Part):
    """Arguments of `training.supervised.train_classifier`, where each is explained."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(default=64, ge=2)
    lr: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    shift: int = Field(default=0, ge=0)
    flip: bool = False
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    focal_gamma: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.optimizer == "adamw" and {"momentum", "nesterov"} & self.model_fields_set:
            raise ValueError("momentum and nesterov belong to optimizer: sgd; leave them out")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0")
        if self.focal_gamma and self.label_smoothing:
            raise ValueError("focal_gamma and label_smoothing: give one of the two")
        return self


class TeacherRecipe(_Part):
    """How a teacher is made.

    Attributes:
        name: of the teacher and its files; the name of the recipe file unless given.
        data: name or folder of a set of images, texts or audio, whichever the input is; trained on
            its split "train".
        input: what one input looks like; images are resized to it.
        num_classes: K; must be the number of classes of the data.
        model: which network.
        training: how it is trained.
        seed: of the first weights and of everything random in training.
        device: "cpu", on which a recipe gives the same weights again, "auto", which takes a GPU if
            there is one, "cuda" or "cuda:1".
        with_select: whether to train on the split "select", too. Only for settings that are not
            chosen on it.
        task: kind of task; what a network is trained for and judged by.
        task_config: settings of the task, such as ignore_index of "segmentation".
        threads: CPU threads while training and measuring. They fix the order in which sums are
            formed: with a number here, machines that differ only in their cores make the same
            file. None leaves torch's setting; more are faster for large networks and slower for
            small ones.
    """

    name: str
    data: str
    input: AnyInput
    num_classes: int = Field(ge=2)
    model: ModelChoice
    training: TrainingConfig
    seed: int = Field(default=0, ge=0)
    device: str = "cpu"
    with_select: bool = False
    threads: int | None = Field(default=None, ge=1)
    task: str = CLASSIFICATION
    task_config: dict[str, Any] = Field(default_factory=dict)

    def sha256(self) -> str:
        """Digest of the values; comments and the order of keys do not matter."""
        values = self.model_dump(mode="json")
        # Keys that came later count where they are used, so that earlier cards stay valid.
        for part, model, keys in (
            (values, type(self), ("device", "with_select", "task", "task_config")),
            (values["training"], TrainingConfig, _LATER_KEYS),
        ):
            for key in keys:
                field = model.model_fields[key]
                if part[key] == field.get_default(call_default_factory=True):
                    del part[key]
        return sha256(json.dumps(values, sort_keys=True).encode())


def teacher_recipes() -> list[str]:
    """Names of the shipped teacher recipes."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def load_teacher_recipe(name_or_path: str | Path) -> TeacherRecipe:
    """Read a teacher recipe.

    Args:
        name_or_path: one of `teacher_recipes`, or the path of a .yaml file.

    Raises:
        RecipeError: there is no such recipe, or it has mistakes; all of them are listed.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES_FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, teacher_recipes(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "write one and give its path"
        raise RecipeError(
            f"got teacher recipe '{name_or_path}', expected one of {', '.join(teacher_recipes())} "
            f"or a .yaml file; {hint}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"got {path}, expected YAML: {error}; correct the file") from error
    if not isinstance(values, dict):
        raise RecipeError(f"got {path} without keys, expected {', '.join(_keys(TeacherRecipe))}")
    mistakes = [*_task_mistakes(values)]
    try:
        recipe = TeacherRecipe.model_validate({"name": path.stem, **values})
    except ValidationError as error:
        mistakes = [*map(_mistake, error.errors()), *mistakes]
    if mistakes:
        listed = "\n".join(f"  {mistake}" for mistake in mistakes)
        raise RecipeError(
            f"got {len(mistakes)} mistakes in {path}, expected a teacher recipe; correct:\n{listed}"
        )
    return recipe


def on_other_data(recipe: TeacherRecipe, data: str) -> TeacherRecipe:
    """The same recipe for another set, whose classes count; it is named after both.

    Raises:
        DataError: there is no such set.
    """
    if data == recipe.data:
        return recipe
    found = DATA.get(recipe.input.spec().kind).open(data, "train")
    named = re.sub(r"[^A-Za-z0-9]+", "-", data).strip("-").lower()
    changes = {"data": data, "name": f"{recipe.name}-{named}"}
    classes = {"num_classes": len(found.classes)} if found.classes else {}
    return recipe.model_copy(update={**changes, **classes})


def _task_mistakes(values: Mapping[str, Any]) -> Iterator[str]:
    kind = values.get("task", CLASSIFICATION)
    if isinstance(kind, str) and kind not in TASKS.names():
        yield f"task: got {kind!r}{near(kind, TASKS.names())}"
    yield from task_problems(values)


def _keys(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


def _mistake(error: Any) -> str:
    """One line for one of pydantic's errors, with the nearest valid key for an unknown one."""
    *loc, last = (part for part in error["loc"] if part not in INPUTS)
    where = ".".join(map(str, (*loc, last)))
    if error["type"] != "extra_forbidden":
        return f"{where}: got {error['input']!r}, {error['msg']}"
    model: type[BaseModel] = TeacherRecipe
    for part in error["loc"][:-1]:
        # Where there are several forms, pydantic puts the name of the one that it took.
        inner = INPUTS[part] if part in INPUTS else model.model_fields[part].annotation
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
    near = difflib.get_close_matches(str(last), _keys(model), n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"expected {', '.join(_keys(model))}"
    return f"{where}: unknown key; {hint}"
