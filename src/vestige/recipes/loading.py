"""Recipes as they are read: presets and overrides are merged in, and every mistake is found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vestige.errors import RecipeError
from vestige.recipes.checks import (
    config_problems,
    form_problems,
    network_problems,
    requirement_problems,
)
from vestige.recipes.files import merge, near, parse_override, read_yaml
from vestige.recipes.mistakes import explain, listed
from vestige.recipes.schema import Recipe
from vestige.recipes.tasks import task_problems


def load_recipe(
    name_or_path: str | Path,
    *,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
    seed: int | None = None,
) -> Recipe:
    """A shipped recipe or a YAML file, with preset and overrides merged, validated.

    Args:
        name_or_path: name of `vestige list recipes`, or a file.
        preset: one of the recipe's presets; None takes "cpu" if there is one.
        overrides: "dotted.key=value", the value in YAML; later ones win.
        plugins: names of plug-ins, put after the recipe's own.
        seed: replaces the recipe's.

    Raises:
        RecipeError: every mistake that was found, with the nearest valid key.
    """
    return validate(
        layered(name_or_path, preset=preset, overrides=overrides, plugins=plugins, seed=seed)
    )


def layered(
    name_or_path: str | Path,
    *,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
    seed: int | None = None,
) -> dict[str, Any]:
    """The same as `load_recipe` before it is validated.

    Raises:
        RecipeError: the file, the preset or an override cannot be read.
    """
    raw = read_yaml(name_or_path)
    presets = raw.pop("presets", None) or {}
    if not isinstance(presets, Mapping):
        raise RecipeError(f"got presets of type {type(presets).__name__}, expected a mapping")
    if preset is not None and preset not in presets:
        raise RecipeError(
            f"got preset {preset!r}, expected one of {', '.join(map(str, presets)) or 'none'}"
            f"{near(preset, [*map(str, presets)], listed=False)}"
        )
    chosen = preset or ("cpu" if "cpu" in presets else None)
    if chosen is not None:
        over = presets[chosen] or {}
        if not isinstance(over, Mapping):
            raise RecipeError(
                f"got a preset {chosen!r} of type {type(over).__name__}, expected a mapping"
            )
        raw = merge(raw, over)
    for override in overrides:
        raw = merge(raw, parse_override(override))
    if plugins:
        own = raw.get("plugins") or []
        # What is no list is left as it is, for `validate` to name.
        if isinstance(own, Sequence) and not isinstance(own, str):
            raw["plugins"] = [*own, *({"name": name} for name in plugins)]
    if seed is not None:
        raw["seed"] = seed
    return raw


def validate(raw: Mapping[str, Any]) -> Recipe:
    """The recipe that `raw` describes.

    Raises:
        RecipeError: all mistakes, of the recipe and of every method's and plug-in's settings.
    """
    recipe, problems = find_problems(raw)
    if problems or recipe is None:
        raise RecipeError(listed(problems))
    return recipe


def find_problems(raw: Mapping[str, Any]) -> tuple[Recipe | None, list[str]]:
    """The recipe that `raw` describes, None where its form is wrong, and every mistake in it."""
    problems = list(form_problems(raw))
    if problems:
        return None, problems
    recipe = None
    try:
        recipe = Recipe.model_validate(dict(raw))
    except ValidationError as error:
        problems.extend(explain(error, Recipe, ""))
    problems.extend(config_problems(raw))
    problems.extend(task_problems(raw))
    problems.extend(network_problems(raw))
    if recipe is not None:
        problems.extend(requirement_problems(recipe))
    return recipe, problems
