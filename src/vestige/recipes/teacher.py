"""Recipes for teachers: trained once on real data, with a card that says how."""

import difflib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from vestige.core.seeding import seeded
from vestige.core.types import InputSpec, count_parameters
from vestige.data.image import ImageSet, load_images, to_inputs
from vestige.errors import RecipeError, TeacherError
from vestige.models.factory import build_model
from vestige.tasks.classification import Classification
from vestige.teachers.loading import (
    WEIGHTS_FOLDER,
    BuiltinCard,
    ImageInput,
    builtin_teachers,
    fingerprint,
    load_from_card,
    read_card,
)
from vestige.training import runtime
from vestige.training.files import sha256, tensors_to_bytes, write_bytes, write_text
from vestige.training.supervised import train_classifier

logger = logging.getLogger(__name__)

RECIPES_FOLDER = Path(__file__).parent / "teachers"
KEEP_DIGITS = 6

Trained = tuple[nn.Module, BuiltinCard]


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


class TeacherRecipe(_Part):
    """How a teacher is made.

    Attributes:
        name: of the teacher and its files; the name of the recipe file unless given.
        data: set of images for `data.image.load_images`; trained on its split "train".
        input: what one input looks like; images are resized to it.
        num_classes: K; must be the number of classes of the data.
        model: which network.
        training: how it is trained.
        seed: of the first weights and of everything random in training.
        threads: CPU threads while training and measuring. They fix the order in which sums are
            formed: with a number here, machines that differ only in their cores make the same
            file. None leaves torch's setting; more are faster for large networks and slower for
            small ones.
    """

    name: str
    data: str
    input: ImageInput
    num_classes: int = Field(ge=2)
    model: ModelChoice
    training: TrainingConfig
    seed: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)

    def sha256(self) -> str:
        """Digest of the values; comments and the order of keys do not matter."""
        return sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode())


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
    try:
        return TeacherRecipe.model_validate({"name": path.stem, **values})
    except ValidationError as error:
        mistakes = "\n".join(f"  {_mistake(found)}" for found in error.errors())
        raise RecipeError(
            f"got {error.error_count()} mistakes in {path}, expected a teacher recipe; correct:\n"
            f"{mistakes}"
        ) from error


def train_teacher(
    recipe: TeacherRecipe,
    out_dir: Path | None,
    *,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train a teacher on the split "train" and measure it on "test", after the last epoch.

    Same recipe, same machine, same versions and, unless the recipe fixes it, same number of
    threads: the same files, byte for byte.

    Args:
        recipe: how.
        out_dir: where NAME.safetensors and NAME.json go, each written whole or not at all, the
            card last; None writes nothing.
        on_epoch: called after each epoch with its number from 1 and its mean loss.

    Returns:
        The trained network in eval mode, and its card.

    Raises:
        DataError: the data set is missing or not in the documented layout.
        RecipeError: `num_classes` is not the data's number of classes.
    """
    spec = recipe.input.spec()
    train, test = (load_images(recipe.data, split) for split in ("train", "test"))
    if len(train.classes) != recipe.num_classes:
        raise RecipeError(
            f"got num_classes={recipe.num_classes} in teacher recipe '{recipe.name}', expected "
            f"{len(train.classes)} as in data set '{recipe.data}'; correct the recipe"
        )
    with seeded(recipe.seed, "teacher"):
        module = build_model(recipe.model.name, spec, recipe.num_classes, **recipe.model.args)
    with runtime.threads(recipe.threads):
        train_classifier(
            module,
            *_tensors(train, spec),
            **recipe.training.model_dump(),
            seed=recipe.seed,
            on_epoch=on_epoch,
        )
        scores = Classification(spec, recipe.num_classes).evaluate(module, _tensors(test, spec))
    card = BuiltinCard(
        name=recipe.name,
        model=recipe.model.name,
        args=recipe.model.args,
        input=recipe.input,
        num_classes=recipe.num_classes,
        classes=train.classes,
        data=recipe.data,
        train_fingerprint=train.fingerprint,
        test_fingerprint=test.fingerprint,
        recipe_sha256=recipe.sha256(),
        weights_fingerprint=fingerprint(module),
        parameters=count_parameters(module),
        accuracy=round(scores["accuracy"], KEEP_DIGITS),
        torch=torch.__version__,
    )
    if out_dir is not None:
        _save(module, card, out_dir / f"{recipe.name}.safetensors")
    return module, card


def teacher_from_recipe(name_or_path: str | Path) -> Trained:
    """The teacher of a recipe: shipped, from the cache, or trained now and cached.

    The cache is $VESTIGE_CACHE/teachers, else vestige/teachers in the user's cache folder. A cached
    teacher counts only if its card names this recipe's digest and its weights fit the card.

    Returns:
        The network in eval mode, and its card.

    Raises:
        RecipeError: the recipe is not valid.
        DataError: the teacher must be trained and its data set is missing.
    """
    recipe = load_teacher_recipe(name_or_path)
    digest = recipe.sha256()
    cached = _cache_folder() / f"{recipe.name}-{digest[:12]}.safetensors"
    shipped = WEIGHTS_FOLDER / f"{recipe.name}.safetensors"
    for weights in (shipped, cached) if recipe.name in builtin_teachers() else (cached,):
        if not weights.exists():
            continue
        try:
            card = read_card(weights.with_suffix(".json"))
            if card.recipe_sha256 == digest:
                return load_from_card(card, weights), card
        except TeacherError as error:
            logger.warning("teacher '%s' is trained again: %s", recipe.name, error)
    logger.info("training teacher '%s' on '%s'; kept in %s", recipe.name, recipe.data, cached)
    module, card = train_teacher(recipe, None)
    _save(module, card, cached)
    return module, card


def _tensors(images: ImageSet, spec: InputSpec) -> tuple[Tensor, Tensor]:
    return to_inputs(images.images, spec), torch.from_numpy(images.labels)


def _save(module: nn.Module, card: BuiltinCard, weights: Path) -> None:
    write_bytes(weights, tensors_to_bytes(module.state_dict()))
    text = json.dumps(card.model_dump(mode="json"), indent=2, sort_keys=True)
    write_text(weights.with_suffix(".json"), text + "\n")


def _cache_folder() -> Path:
    chosen = os.environ.get("VESTIGE_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "teachers"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vestige" / "teachers"


def _keys(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


def _mistake(error: Any) -> str:
    """One line for one of pydantic's errors, with the nearest valid key for an unknown one."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where}: got {error['input']!r}, {error['msg']}"
    model: type[BaseModel] = TeacherRecipe
    for part in error["loc"][:-1]:
        inner = model.model_fields[part].annotation
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
    near = difflib.get_close_matches(str(error["loc"][-1]), _keys(model), n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"expected {', '.join(_keys(model))}"
    return f"{where}: unknown key; {hint}"
