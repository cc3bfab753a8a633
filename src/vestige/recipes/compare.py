"""Several methods with one teacher, one student and one budget: a recipe with generated arms."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vestige.core.types import Requires
from vestige.errors import RecipeError, VestigeError
from vestige.models.probes import batchnorm_layers
from vestige.recipes.build import build
from vestige.recipes.catalog import METHODS, shipped
from vestige.recipes.extras import lacking
from vestige.recipes.files import merge, parse_override, read_yaml
from vestige.recipes.loading import find_problems, layered
from vestige.recipes.mistakes import listed
from vestige.recipes.requirements import bn_weight, no_batchnorm
from vestige.recipes.resolve import resolve_teachers
from vestige.recipes.schema import Recipe
from vestige.recipes.teacher import trained_already
from vestige.recipes.updates import student_updates, with_updates

# What every method is given as the recipe's own has it, where it has a setting of that name. What
# the recipe says is `shared` comes on top.
BUDGET = (
    *("rounds", "batch_size", "schedule", "milestones"),
    *("student_optimizer", "student_lr", "student_weight_decay"),
)


@dataclass(frozen=True)
class Comparison:
    """A recipe whose arms are methods, and the sentences that say what they have in common."""

    recipe: Recipe
    note: str


@dataclass(frozen=True)
class _Settings:
    config: dict[str, Any]
    sources: dict[str, Any] | None
    where: str
    arm: str | None = None


def compare(
    methods: Sequence[str],
    name_or_path: str | Path,
    *,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
    seed: int | None = None,
) -> Comparison:
    """Turn a recipe into one with an arm for each of `methods`.

    Teacher, student, seed, data and trainer are the recipe's. So are `BUDGET` and whatever the
    recipe says is shared, in every method that has such a setting; then what the number of its
    student's updates follows from is turned until that is the same as in the recipe's own method,
    see `with_updates`. All else is a method's own: for the recipe's method the recipe's `config`,
    for another that of the first of the recipe's arms with it, else of its shipped recipe, else its
    defaults; also `rounds` where it has no `iterations` in them. The arms that the recipe names as
    baseline and reference come along, since the gap closed needs both.

    Args:
        methods: at least two names, in the order in which they run.
        name_or_path: as for `load_recipe`.
        preset: likewise; also of the shipped recipes of other methods, where they have it.
        overrides: likewise; "arms.METHOD.config.KEY=value" reaches one method alone.
        plugins: likewise, around every method.
        seed: likewise.

    Raises:
        RecipeError: everything that keeps one of the methods from running, all at once.
    """
    names = [name.strip() for name in methods]
    if len(names) < 2 or len(set(names)) < len(names) or not all(names):
        raise RecipeError(
            f"got --compare {','.join(names)!r}, expected two methods or more, each once, for "
            "example --compare A,B; see vestige list methods"
        )
    own = tuple(f"arms.{name}." for name in names)
    late = [text for text in overrides if text.strip().startswith(own)]
    early = [text for text in overrides if text not in late]
    raw = layered(name_or_path, preset=preset, overrides=early, plugins=plugins, seed=seed)
    base, problems = find_problems(raw)
    for name in names:
        try:
            METHODS.get(name)
        except RecipeError as error:
            problems.append(f"--compare: {error}")
    if base is None or problems:
        raise RecipeError(listed(problems))
    made = _with_arms(raw, base, names, preset)
    for text in late:
        made = merge(made, parse_override(text))
    recipe, problems = find_problems(made)
    if recipe is not None:
        problems.extend(_obstacles(recipe))
    if recipe is None or problems:
        raise RecipeError(listed(problems))
    return Comparison(recipe, _note(recipe, names))


def _with_arms(
    raw: Mapping[str, Any], base: Recipe, names: Sequence[str], preset: str | None
) -> dict[str, Any]:
    base = _settled(base)
    common = _common(base)
    wanted = student_updates(base.method, base.method_config().model_dump())
    arms: dict[str, Any] = {}
    ends = {base.baseline: base.baseline, base.reference: base.reference}
    for name in names:
        if name == base.method:
            arms[name] = {"title": f"{name} as this recipe has it"}
            continue
        found = _settings(name, base, preset)
        fields = METHODS.get(name).Config.model_fields
        given = {key: common[key] for key in common if key in fields}
        if "iterations" not in fields and "rounds" in found.config:
            # There a round is no mere unit of iterations: it decides how many images are made.
            given["rounds"] = found.config["rounds"]
        config = with_updates(name, {**found.config, **given}, wanted)
        arms[name] = {"title": f"{name} {found.where}", "method": name, "config": config}
        if found.sources is not None:
            arms[name]["sources"] = found.sources
        if found.arm is not None and found.arm in ends:
            ends[found.arm] = name
    for end, stands_for in list(ends.items()):
        if end is None or end != stands_for:
            continue
        # Not among the methods: it runs as well, under a name that none of them has.
        free = end if end not in names else f"{end}-of-the-recipe"
        arms[free] = _as_raw(raw, base, end)
        ends[end] = free
    return {
        **raw,
        "shared": {},
        "config": {**base.shared, **base.config},
        "arms": arms,
        "headline": base.method if base.method in names else names[0],
        "baseline": ends.get(base.baseline),
        "reference": ends.get(base.reference),
    }


def _settled(base: Recipe) -> Recipe:
    """The recipe with what its method suggests for these networks written out.

    Only then is it known what the others are to have in common with it.
    """
    if base.defaults == "published":
        return base
    job = build(base.model_copy(update={"data": None, "arms": {}}))
    return base.model_copy(update={"config": yaml.safe_load(job.facts.recipe_yaml)["config"]})


def _as_raw(raw: Mapping[str, Any], base: Recipe, name: str) -> dict[str, Any]:
    """One of the recipe's own arms; what was shared is written out."""
    arm = dict(raw["arms"][name])
    if base.arm(name).method != base.method:
        arm["config"] = {**base.shared, **(arm.get("config") or {})}
    return arm


def _common(base: Recipe) -> dict[str, Any]:
    """The settings that every method is given."""
    main = base.method_config().model_dump(mode="json")
    return {**{key: main[key] for key in BUDGET if key in main}, **base.shared}


def _settings(name: str, base: Recipe, preset: str | None) -> _Settings:
    """What a method has as its own."""
    for key, arm in base.arms.items():
        if arm.method == name:
            sources = base.arm(key).sources
            return _Settings(
                dict(arm.config),
                {source: given.model_dump(mode="json") for source, given in sources.items()},
                f"as arm {key!r} of this recipe ({arm.title})",
                key,
            )
    # The recipe of the method's own name first.
    for known in sorted(shipped(), key=lambda known: known != name):
        raw = read_yaml(known)
        if raw.get("method") != name:
            continue
        presets = raw.get("presets") or {}
        own = layered(known, preset=preset if preset in presets else None)
        config = {**(own.get("shared") or {}), **(own.get("config") or {})}
        return _Settings(config, own.get("sources"), f"as in the recipe {known!r}")
    return _Settings({}, None, "with its defaults")


def _obstacles(recipe: Recipe) -> Iterator[str]:
    """What keeps an arm from running and can only be seen on this machine or in the teacher."""
    methods = {name: recipe.arm(name).method for name in recipe.arms}
    requires: dict[str, Requires] = {one: METHODS.get(one).requires for one in methods.values()}
    for method, needs in requires.items():
        yield from lacking(method, needs.extras)
    # By the arm, since one method may be there twice with other settings.
    settings = {
        arm: None if requires[method].batchnorm else recipe.arm(arm).method_config()
        for arm, method in methods.items()
    }
    needing = [arm for arm, one in settings.items() if one is None or bn_weight(one)]
    # A teacher that a run would have to train first is looked at when it is there.
    named = (one for one in (recipe.teacher, *recipe.more_teachers) if isinstance(one, str))
    trained_by = [one.removeprefix("recipe:") for one in named if one.startswith("recipe:")]
    if not needing or not all(map(trained_already, trained_by)):
        return
    try:
        layers = [len(batchnorm_layers(one.module)) for one in resolve_teachers(recipe)]
    except VestigeError as error:
        yield f"teacher: {error}"
        return
    if not all(layers):
        for arm in needing:
            told = no_batchnorm(methods[arm], settings[arm], recipe.task)
            yield f"--compare: arm {arm!r}: {told}"


def _note(recipe: Recipe, names: Sequence[str]) -> str:
    """What the methods have in common and what not, as it stands on the page."""
    counts = {}
    for name in names:
        arm = recipe.arm(name)
        counts[name] = student_updates(arm.method, arm.method_config().model_dump())
    told = [f"{count:,.0f}" for count in counts.values() if count is not None]
    if len(told) == len(names) and len(set(told)) == 1:
        updates = f"Each makes {told[0]} updates of the student."
    else:
        updates = "Updates of the student: " + "; ".join(
            f"{name} {'not told by its settings' if count is None else f'{count:,.0f}'}"
            for name, count in counts.items()
        )
        updates += "."
    minutes = recipe.trainer.minutes
    stops = "" if minutes is None else f" Each stops after {minutes:g} minutes."
    return (
        f"{len(names)} methods with the same teacher, student network, first weights, seed "
        f"({recipe.seed}), test data and optimizer of the student. {updates}{stops} What belongs "
        "to one method alone is as its title says; nothing was tuned for this comparison."
    )
