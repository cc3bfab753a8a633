"""Teachers of recipes: trained once on real data, with a card that says how."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from vestige.core import parallel
from vestige.core.protocols import LearnsVocabulary
from vestige.core.seeding import seeded
from vestige.core.types import count_parameters
from vestige.errors import CheckpointError, Interrupted, RecipeError, TeacherError
from vestige.models.factory import build_model
from vestige.recipes.catalog import DATA
from vestige.recipes.examples import fit_classes
from vestige.recipes.tasks import make_task
from vestige.recipes.teacher_schema import TeacherRecipe, load_teacher_recipe
from vestige.teachers.cards import BuiltinCard
from vestige.teachers.loading import (
    WEIGHTS_FOLDER,
    builtin_teachers,
    fingerprint,
    load_from_card,
    read_card,
)
from vestige.training import runtime
from vestige.training.checkpoint import CheckpointStore
from vestige.training.files import locked, sha256, tensors_to_bytes, write_bytes, write_text
from vestige.training.interrupts import interruptible
from vestige.training.supervised import train_classifier

logger = logging.getLogger(__name__)

KEEP_DIGITS = 6

Trained = tuple[nn.Module, BuiltinCard]


def train_teacher(
    recipe: TeacherRecipe,
    out_dir: Path | None,
    *,
    on_epoch: Callable[[int, float], None] | None = None,
    resume: bool = False,
    minutes: float | None = None,
) -> Trained:
    """Train a teacher and measure it on the split "test", after the last epoch.

    Same recipe, same machine, same versions and, unless the recipe fixes it, same number of
    threads: on a CPU the same files, byte for byte, also if it was stopped and went on.

    Args:
        recipe: how.
        out_dir: where NAME.safetensors and NAME.json go, each written whole or not at all, the
            card last; until then checkpoints are in NAME.training. None writes nothing.
        on_epoch: called after each epoch with its number from 1 and its mean loss.
        resume: go on after the last epoch of an earlier call with the same `out_dir`; a teacher
            that is finished is returned as it is.
        minutes: stop before an epoch that would not end in this time; at least one is trained.

    Returns:
        The trained network in eval mode, on the CPU, and its card.

    Raises:
        DataError: the data set is missing or not in the documented layout.
        RecipeError: `num_classes` is not the data's number of classes, or the device is missing.
        CheckpointError: what is to be resumed was made by another recipe.
        Interrupted: Ctrl-C, SIGTERM or `minutes`; can be resumed if there is an `out_dir`.
    """
    weights = None if out_dir is None else out_dir / f"{recipe.name}.safetensors"
    with locked(None if weights is None else weights.with_suffix(".training")):
        if resume and weights is not None and weights.with_suffix(".json").is_file():
            return _finished(recipe, weights)
        store = None if weights is None else _store(recipe, weights, resume=resume)
        module, card = _train(recipe, store, on_epoch, minutes)
        if weights is not None:
            _save(module, card, weights)
    if weights is not None:
        shutil.rmtree(weights.with_suffix(".training"), ignore_errors=True)
    return module, card


def _train(
    recipe: TeacherRecipe,
    store: CheckpointStore | None,
    on_epoch: Callable[[int, float], None] | None,
    minutes: float | None,
) -> Trained:
    spec = recipe.input.spec()
    splits = ("train", "select") if recipe.with_select else ("train",)
    kind = DATA.get(spec.kind)
    parts = [kind.open(recipe.data, split) for split in splits]
    train, test = parts[0], kind.open(recipe.data, "test")
    # Sets of other distributions need not offer it.
    named, least = len(train.classes), getattr(train, "least_classes", lambda: 2)()
    if recipe.num_classes < least or recipe.num_classes > named > 0:
        raise RecipeError(
            f"got num_classes={recipe.num_classes} in teacher recipe '{recipe.name}', expected "
            f"{least} as in data set '{recipe.data}'; correct the recipe"
        )
    device = runtime.device(recipe.device)
    with seeded(recipe.seed, "teacher"):
        module = build_model(recipe.model.name, spec, recipe.num_classes, **recipe.model.args)
    module.to(device)
    pace = _Pace(recipe.training.epochs, minutes, on_epoch, kept=store is not None)
    task = make_task(recipe.task, spec, recipe.num_classes, recipe.task_config)
    fitted = partial(fit_classes, spec=spec, classes=train.classes, num_classes=recipe.num_classes)
    examples = [fitted(part)[0] for part in parts]
    # Before an hour of training, not after it; tasks of other distributions need not offer it.
    look = getattr(task, "check_examples", lambda found: found)
    for found in examples:
        look(found)
    inputs, labels = (torch.cat(found) for found in zip(*examples, strict=True))
    if isinstance(module, LearnsVocabulary):
        # Of pairs of audio and transcripts it is the transcripts that have words.
        module.learn_vocabulary(inputs if labels.dim() == 1 else labels)
    with interruptible(pace.interrupted, lambda: False), runtime.threads(recipe.threads):
        done = train_classifier(
            module,
            inputs.to(device),
            labels.to(device),
            **recipe.training.model_dump(),
            ignore_index=getattr(task, "ignore_index", -100),
            seed=recipe.seed,
            on_epoch=pace,
            store=store,
            go_on=pace.go_on,
        )
        if not done:
            raise pace.interrupted(f"the {minutes:g} minutes are spent, ")
        # Scored where it is used and compared: other devices round differently.
        module.cpu()
        judged, classes = fitted(test)
        score = round(task.evaluate(module, judged)[task.metric], KEEP_DIGITS)
    fingerprints = [part.fingerprint for part in parts]
    joined = fingerprints[0] if len(parts) == 1 else sha256("".join(fingerprints).encode())
    card = BuiltinCard(
        name=recipe.name,
        model=recipe.model.name,
        args=recipe.model.args,
        input=recipe.input,
        num_classes=recipe.num_classes,
        classes=classes,
        data=recipe.data,
        train_fingerprint=joined,
        test_fingerprint=test.fingerprint,
        recipe_sha256=recipe.sha256(),
        weights_fingerprint=fingerprint(module),
        parameters=count_parameters(module),
        torch=torch.__version__,
        task=recipe.task,
        task_config=recipe.task_config,
        accuracy=score if task.metric == "accuracy" else None,
        metric=None if task.metric == "accuracy" else task.metric,
        score=None if task.metric == "accuracy" else score,
    )
    return module, card


class _Pace:
    """Follows the epochs of one call, and ends it in time."""

    def __init__(
        self,
        epochs: int,
        minutes: float | None,
        on_epoch: Callable[[int, float], None] | None,
        *,
        kept: bool,
    ) -> None:
        self.epochs = epochs
        self.done = 0
        self._kept = kept
        self._on_epoch = on_epoch
        self._started = self._last = time.monotonic()
        self._longest = 0.0
        self._seconds = math.inf if minutes is None else 60 * minutes

    def __call__(self, epoch: int, loss: float) -> None:
        now = time.monotonic()
        self._longest, self._last, self.done = max(self._longest, now - self._last), now, epoch
        if self._on_epoch is not None:
            self._on_epoch(epoch, loss)

    def go_on(self) -> bool:
        """Whether an epoch as long as the longest would still end in time."""
        return time.monotonic() - self._started + self._longest <= self._seconds

    def interrupted(self, why: str = "") -> Interrupted:
        """What is raised when training stops before its end."""
        if not self._kept:
            return Interrupted(f"{why}stopped; nothing was kept, because there is no folder")
        return Interrupted(
            f"{why}stopped after epoch {self.done} of {self.epochs}; --resume goes on from there"
            if self.done
            else f"{why}stopped before an epoch was done; --resume goes on"
        )


def _store(recipe: TeacherRecipe, weights: Path, *, resume: bool) -> CheckpointStore:
    """The checkpoints of a teacher that is being trained; those of another recipe are refused."""
    folder = weights.with_suffix(".training")
    store, mark = CheckpointStore(folder / "checkpoints"), folder / "recipe.json"
    if not resume:
        store.clear()
    elif mark.is_file() and json.loads(mark.read_text(encoding="utf8")) != recipe.sha256():
        raise CheckpointError(
            f"the training in {folder} was started with another recipe; resume with that one, or "
            "start again without --resume"
        )
    write_text(mark, json.dumps(recipe.sha256()) + "\n")
    return store


def _finished(recipe: TeacherRecipe, weights: Path) -> Trained:
    card = read_card(weights.with_suffix(".json"))
    if card.recipe_sha256 != recipe.sha256():
        raise CheckpointError(
            f"{weights} was made by another recipe; name another folder, or train it again without "
            "--resume"
        )
    return load_from_card(card, weights), card


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
    if parallel.world() > 1:
        # One process trains it, and the others read what it kept.
        parallel.first(partial(_keep, name_or_path))
    return _find_or_train(name_or_path)


def _keep(name_or_path: str | Path) -> None:
    _find_or_train(name_or_path)


def _find_or_train(name_or_path: str | Path) -> Trained:
    recipe = load_teacher_recipe(name_or_path)
    digest = recipe.sha256()
    cached = _cached(recipe)
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


def trained_already(name_or_path: str | Path) -> bool:
    """Whether `teacher_from_recipe` would find the teacher's files and need not train it."""
    recipe = load_teacher_recipe(name_or_path)
    return recipe.name in builtin_teachers() or _cached(recipe).is_file()


def _cached(recipe: TeacherRecipe) -> Path:
    return cache_folder() / f"{recipe.name}-{recipe.sha256()[:12]}.safetensors"


def _save(module: nn.Module, card: BuiltinCard, weights: Path) -> None:
    write_bytes(weights, tensors_to_bytes(module.state_dict()))
    write_text(weights.with_suffix(".json"), card.text())


def cache_folder() -> Path:
    """Where teachers that were trained on demand are kept."""
    chosen = os.environ.get("VESTIGE_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "teachers"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vestige" / "teachers"
