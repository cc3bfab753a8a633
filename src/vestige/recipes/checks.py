"""What is wrong with a recipe, found without building anything; each problem is one line."""

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

from pydantic import BaseModel

from vestige.core.types import Access
from vestige.errors import RecipeError
from vestige.models.factory import list_generators, model_arguments
from vestige.models.prompts import load_prompts
from vestige.recipes.catalog import METHODS, PLUGINS, TASKS
from vestige.recipes.files import DEEPEST, MOST_VALUES, near, short
from vestige.recipes.mistakes import explain as explain
from vestige.recipes.mistakes import mistakes_in
from vestige.recipes.schema import Recipe
from vestige.recipes.source_checks import judging_problems, source_problems
from vestige.recipes.student import OF_TEACHER, SMP
from vestige.recipes.teacher_schema import load_teacher_recipe
from vestige.teachers.loading import KEYS as TEACHER_KEYS
from vestige.teachers.loading import KINDS as TEACHER_KINDS
from vestige.teachers.loading import SCHEMES, builtin_teachers, kinds_in


def form_problems(value: Any) -> Iterator[str]:
    """Keys and values that a recipe cannot hold wherever they stand, so that it could not be kept.

    What comes from a file was refused there with its line; this is for what comes from Python.
    """
    waiting: list[tuple[str, Any, int]] = [("", value, 1)]
    for _ in range(MOST_VALUES):
        if not waiting:
            return
        where, found, depth = waiting.pop()
        if depth > DEEPEST:
            yield f"{where}: got more than {DEEPEST} levels; nest less deeply"
            return
        if isinstance(found, Mapping):
            for key, item in found.items():
                if not isinstance(key, str):
                    yield f"{where or 'recipe'}: got the key {short(key)}, expected text"
                else:
                    waiting.append((f"{where}.{key}" if where else key, item, depth + 1))
        elif isinstance(found, list | tuple):
            waiting.extend((f"{where}.{i}", item, depth + 1) for i, item in enumerate(found))
        elif isinstance(found, int) and found.bit_length() > 64:
            yield f"{where}: got a number of {found.bit_length()} bits; write a smaller one"
        elif not isinstance(found, str | int | float | PathLike | BaseModel | None):
            yield (
                f"{where}: got {short(found)}, expected text, a number, true, false, null, a list "
                "or a mapping"
            )
    yield f"got more than {MOST_VALUES} values; repeat less"


def config_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Mistakes in settings that belong to methods and plug-ins, as far as they can be found.

    Each is told once and where it was made: in `shared`, in `config`, or in an arm's own config.
    """
    shared, config = _mapping(raw.get("shared")), _mapping(raw.get("config"))
    runs: list[tuple[str, Any, list[tuple[str, Mapping[str, Any]]]]] = [
        ("", raw.get("method"), [("shared", shared), ("config", config)])
    ]
    plugins = [("plugins", raw.get("plugins"))]
    for name, given in _mapping(raw.get("arms")).items():
        where, arm = f"arms.{name}", _mapping(given)
        method = arm.get("method") or raw.get("method")
        same = method == raw.get("method")
        own = [(f"{where}.config", _mapping(arm.get("config")))]
        inherited = [("shared", shared), *([("config", config)] if same else [])]
        runs.append((f"{where}.", method, inherited + own))
        plugins.append((f"{where}.plugins", arm.get("plugins")))
    seen: set[str] = set()
    for where, method, layers in runs:
        if not isinstance(method, str):
            continue
        try:
            found = mistakes_in(METHODS.get(method).Config, layers)
        except RecipeError as error:
            inherited_method = where and method == raw.get("method")
            found = [] if inherited_method else [f"{where}method: {error}"]
        # Of the layers that arms inherit, the same mistake is found for every arm.
        yield from (problem for problem in found if problem not in seen)
        seen.update(found)
    for where, listed in plugins:
        yield from _plugin_problems(where, listed)


def _plugin_problems(where: str, listed: Any) -> Iterator[str]:
    names = []
    for index, plugin in enumerate(listed if isinstance(listed, list | tuple) else ()):
        name = _mapping(plugin).get("name")
        if not isinstance(name, str):
            continue
        if name in names:
            yield f"{where}.{index}.name: {name!r} is named twice; name it once"
        names.append(name)
        try:
            settings = PLUGINS.get(name).Config
        except RecipeError as error:
            yield f"{where}.{index}.name: {error}"
            continue
        yield from mistakes_in(
            settings, [(f"{where}.{index}.config", _mapping(plugin.get("config")))]
        )


def network_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Networks, generators and teachers that do not exist, and arguments that they do not take."""
    yield from _model_problems("student", "name", _mapping(raw.get("student")))
    yield from _teacher_problems("teacher", raw.get("teacher"))
    more = raw.get("more_teachers")
    for index, teacher in enumerate(more if isinstance(more, list | tuple) else ()):
        yield from _teacher_problems(f"more_teachers.{index}", teacher)
    for where, sources in [
        ("sources", raw.get("sources")),
        *(
            (f"arms.{name}.sources", _mapping(arm).get("sources"))
            for name, arm in _mapping(raw.get("arms")).items()
        ),
    ]:
        for name, source in _mapping(sources).items():
            generator = _mapping(source).get("generator", "upsample")
            valid = [known for known, _ in list_generators()]
            if isinstance(generator, str) and generator not in valid:
                yield f"{where}.{name}.generator: got {short(generator)}{near(generator, valid)}"


def _teacher_problems(where: str, teacher: Any) -> Iterator[str]:
    if isinstance(teacher, Mapping):
        for key in teacher:
            if key not in TEACHER_KEYS:
                yield f"{where}.{key}: no such key{near(str(key), TEACHER_KEYS)}"
        if len(kinds_in(teacher)) != 1:
            yield f"{where}: give exactly one of {', '.join(map(repr, TEACHER_KINDS))}"
        if "endpoint" not in teacher:
            yield from _model_problems(where, "model", teacher)
        yield from _prompt_problems(where, teacher)
        members = teacher.get("ensemble")
        for index, member in enumerate(members if isinstance(members, list | tuple) else ()):
            yield from _teacher_problems(f"{where}.ensemble.{index}", member)
    elif isinstance(teacher, str):
        scheme, _, name = teacher.partition(":")
        if scheme == "recipe":
            try:
                load_teacher_recipe(name)
            except RecipeError as error:
                yield f"{where}: {error}"
        elif scheme in SCHEMES[1:] or teacher.endswith(".json"):
            return
        elif scheme != "builtin" or name not in builtin_teachers():
            known = [f"builtin:{known}" for known in builtin_teachers()]
            yield (
                f"{where}: got {short(teacher)}, expected 'recipe:NAME', 'timm:NAME', 'smp:NAME', "
                f"'hf:NAME', a student.json, a mapping or one of "
                f"{', '.join(known)}{near(teacher, known, listed=False)}"
            )


def _prompt_problems(where: str, teacher: Mapping[str, Any]) -> Iterator[str]:
    """Prompts of a teacher that writes texts: all mistakes in a file of the user's own, too."""
    if {"lm", "endpoint"} & set(teacher) and "prompts" not in teacher:
        yield f"{where}: needs 'prompts', the name of a task or a .yaml file; add it"
    elif isinstance(teacher.get("prompts"), str):
        try:
            load_prompts(teacher["prompts"])
        except RecipeError as error:
            yield f"{where}.prompts: {error}"


def _model_problems(where: str, key: str, network: Mapping[str, Any]) -> Iterator[str]:
    name = network.get(key)
    # What another package calls its networks it checks itself.
    elsewhere = key == "name" and isinstance(name, str) and name.startswith((SMP, OF_TEACHER))
    if not isinstance(name, str) or elsewhere:
        return
    try:
        valid = model_arguments(name)
    except RecipeError as error:
        yield f"{where}.{key}: {error}"
        return
    for argument in _mapping(network.get("args")):
        if argument not in valid:
            yield f"{where}.args.{argument}: no such key{near(str(argument), valid)}"


def requirement_problems(recipe: Recipe) -> Iterator[str]:
    """What the parts of a recipe ask of one another, for the main run and for every arm."""
    for name in recipe.arms:
        # An arm's name is that of its folder.
        if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\"):
            yield f"arms.{name}: cannot be the name of a folder; use letters, digits and hyphens"
    for key in ("headline", "baseline", "reference"):
        arm = getattr(recipe, key)
        if arm is not None and arm not in recipe.arms:
            yield f"{key}: got {arm!r}, expected one of the arms {', '.join(recipe.arms) or 'none'}"
    yield from judging_problems(recipe)
    for where, run in [("", recipe), *((f"arms.{n}.", recipe.arm(n)) for n in recipe.arms)]:
        try:
            requires = METHODS.get(run.method).requires
        except RecipeError:
            continue  # told by config_problems
        allowed = {*requires.sources, *requires.optional_sources}
        for name in requires.sources:
            if name not in run.sources:
                yield f"{where}sources: {run.method!r} needs the source {name!r}; describe it"
        for name in run.sources:
            if name not in allowed:
                yield (
                    f"{where}sources.{name}: {run.method!r} takes "
                    f"{', '.join(sorted(allowed)) or 'no sources'}{near(name, sorted(allowed))}"
                )
        for name, source in run.sources.items():
            yield from source_problems(f"{where}sources.{name}", source)
        low, high = requires.teachers
        count = (run.teacher is not None) + len(run.more_teachers)
        if not low <= count <= high:
            key = "teacher" if not run.more_teachers else "more_teachers"
            told = f"{low} to {high} teachers, got {count}"
            if high == 0:
                told = f"no teacher, got {count}; set teacher: null"
            yield f"{where}{key}: {run.method!r} takes {told}"
        if requires.student and run.student is None:
            yield f"{where}student: {run.method!r} trains one; give its 'name' or 'factory'"
        if not run.access.covers(requires.access):
            yield f"{where}access: {run.method!r} needs {requires.access}, got {run.access}"
        if run.task not in requires.tasks:
            yield f"{where}task: {run.method!r} serves {', '.join(requires.tasks)}, not {run.task}"
        for plugin in run.plugins:
            if {plugin.name, "*"} & set(requires.closed_to):
                yield f"{where}plugins: {run.method!r} is closed to {plugin.name!r}"
    student = recipe.student
    if student is not None and (student.name is None) == (student.factory is None):
        yield "student: give exactly one of 'name' and 'factory'"
    if recipe.task not in TASKS.names():
        yield f"task: got {recipe.task!r}{near(recipe.task, TASKS.names())}"
    if recipe.query_budget is not None and recipe.access is Access.WHITE_BOX:
        yield "query_budget: counts for a black box only; set access: scores or labels"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
