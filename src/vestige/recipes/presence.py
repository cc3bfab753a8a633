"""What a recipe names and this machine does not have: files, data sets, callables, extras.

Nothing is loaded, built or trained; a user's own module is imported.
"""

import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vestige.data.audio import AudioSet
from vestige.data.unlabelled.made_up import MADE_UP
from vestige.data.unlabelled.opening import find_unlabelled
from vestige.errors import DataError, RecipeError
from vestige.recipes.catalog import DATA, METHODS, PLUGINS
from vestige.recipes.extras import lacking
from vestige.recipes.files import short
from vestige.recipes.schema import Recipe
from vestige.recipes.student import SMP
from vestige.recipes.teacher import trained_already
from vestige.recipes.teacher_schema import load_teacher_recipe
from vestige.sources.pool_files import read_card

# Importing a module runs it, and these are the ways in which that usually ends.
_IMPORT_FAILS = (
    ImportError,
    AttributeError,
    ValueError,
    TypeError,
    SyntaxError,
    NameError,
    OSError,
)


def absent(recipe: Recipe) -> list[str]:
    """One line for each thing that a run of `recipe`, or of one of its arms, would not find."""
    runs = [("", recipe), *((f"arms.{name}.", recipe.arm(name)) for name in recipe.arms)]
    found = [*_networks(recipe), *_judging(recipe)]
    for where, run in runs:
        found.extend(_sources(where, run))
        found.extend(_extras(run))
    # Arms share most of what they need.
    return list(dict.fromkeys(found))


def _networks(recipe: Recipe) -> Iterator[str]:
    if recipe.student is not None and recipe.student.factory is not None:
        yield from _callable("student.factory", recipe.student.factory)
    if recipe.student is not None and (recipe.student.name or "").startswith(SMP):
        yield from lacking(str(recipe.student.name), ("vision",))
    for index, teacher in enumerate((recipe.teacher, *recipe.more_teachers)):
        where = "teacher" if index == 0 else f"more_teachers.{index - 1}"
        if isinstance(teacher, str):
            yield from _named_teacher(where, teacher)
        elif teacher is not None:
            yield from _own_teacher(where, teacher)


def _named_teacher(where: str, teacher: str) -> Iterator[str]:
    if teacher.endswith(".json"):
        yield from _file(where, teacher)
    if not teacher.startswith("recipe:"):
        return
    try:
        needed = load_teacher_recipe(teacher.removeprefix("recipe:"))
    except RecipeError:
        return  # There is none; `checks` says so.
    if not trained_already(teacher.removeprefix("recipe:")):
        kind = needed.input.spec().kind
        yield from _data(f"{where}: is to be trained first", needed.data, "train", kind)


def _file(where: str, name: str) -> Iterator[str]:
    # Not Path's, which raise for a user that does not exist.
    if not os.path.isfile(os.path.expanduser(name)):
        yield f"{where}: got {short(name)}, which is no file here; correct the path"


def _own_teacher(where: str, teacher: Mapping[str, Any]) -> Iterator[str]:
    members = teacher.get("ensemble")
    for index, member in enumerate(members if isinstance(members, list | tuple) else ()):
        if isinstance(member, str):
            yield from _named_teacher(f"{where}.ensemble.{index}", member)
        elif isinstance(member, Mapping):
            yield from _own_teacher(f"{where}.ensemble.{index}", member)
    if isinstance(factory := teacher.get("factory"), str):
        yield from _callable(f"{where}.factory", factory)
    lm = teacher.get("lm")
    # What it must hold is told when it is opened; here is only whether it is there.
    if isinstance(lm, str) and not os.path.isdir(os.path.expanduser(lm)):
        yield f"{where}.lm: got {short(lm)}, which is no folder here; correct the path"
    if isinstance(weights := teacher.get("weights"), str):
        yield from _file(f"{where}.weights", weights)


def _judging(recipe: Recipe) -> Iterator[str]:
    if recipe.data is not None:
        yield from _data("data", recipe.data, "test", _kind(recipe))


def _sources(where: str, run: Recipe) -> Iterator[str]:
    for name, source in run.sources.items():
        key = f"{where}sources.{name}"
        if source.kind == "images" and source.data is not None:
            yield from _data(f"{key}.data", source.data, source.split or "train", _kind(run))
        if source.kind == "clients" and source.data is not None:
            for split in ("train", "test"):
                yield from _data(f"{key}.data", source.data, split, _kind(run))
        if source.kind == "folder" and source.data is not None:
            yield from _unlabelled(f"{key}.data", source.data, source.split, _kind(run))
        for part_name, part in source.parts.items() if source.kind == "heap" else ():
            if part.data not in MADE_UP:
                part_key = f"{key}.parts.{part_name}.data"
                yield from _unlabelled(part_key, part.data, part.split, _kind(run))
        if source.kind == "pool" and source.data is not None:
            yield from _pool(f"{key}.data", Path(source.data))
        if source.kind == "factory" and source.factory is not None:
            yield from _callable(f"{key}.factory", source.factory)


def _unlabelled(key: str, data: str, split: str | None, kind: str) -> Iterator[str]:
    if kind == "audio":
        undivided = split is None and AudioSet.undivided(data)
        yield from _data(key, data, split or ("all" if undivided else "train"), kind)
        return
    try:
        found = find_unlabelled(data, split)
    except DataError as error:
        yield f"{key}: {error}"
        return
    if found.kind == "arrow" and find_spec("pyarrow") is None:
        yield f"{key}: got a saved data set, which needs pyarrow; pip install 'vestige[arrow]'"


def _pool(key: str, folder: Path) -> Iterator[str]:
    try:
        read_card(folder)
    except DataError as error:
        yield f"{key}: {error}"


def _extras(run: Recipe) -> Iterator[str]:
    needing = [(run.method, METHODS), *((plugin.name, PLUGINS) for plugin in run.plugins)]
    for name, registry in needing:
        try:
            extras = registry.get(name).requires.extras
        except RecipeError:
            continue  # There is none; `checks` says so.
        yield from lacking(name, extras)


def _kind(recipe: Recipe) -> str:
    """The kind of the inputs; what nothing tells is taken to be images."""
    if recipe.input is not None:
        return recipe.input.kind
    if isinstance(recipe.teacher, str) and recipe.teacher.startswith("recipe:"):
        try:
            return load_teacher_recipe(recipe.teacher.removeprefix("recipe:")).input.spec().kind
        except RecipeError:
            return "image"  # There is none; `checks` says so.
    return {"speech": "audio", "text": "text"}.get(recipe.task, "image")


def _data(where: str, name: str, split: str, kind: str) -> Iterator[str]:
    try:
        # Sets of other distributions need not offer it; theirs are then found when they are opened.
        find = getattr(DATA.get(kind), "find", None)
        if find is not None:
            find(name, split)
    except (DataError, RecipeError) as error:
        yield f"{where}: {error}"


def _callable(where: str, target: str) -> Iterator[str]:
    module, _, attribute = target.partition(":")
    try:
        made = getattr(import_module(module), attribute)
    except _IMPORT_FAILS as error:
        yield (
            f"{where}: got {short(target)}, expected 'package.module:callable' that can be "
            f"imported ({type(error).__name__}: {error}); start where the module lies, or install "
            "it"
        )
        return
    if not callable(made):
        yield f"{where}: got {short(target)}, a {type(made).__name__}, expected a callable"
