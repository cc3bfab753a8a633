"""What a recipe may say, and how presets and overrides are merged into it."""

import difflib
import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vestige.core.types import Access, InputSpec
from vestige.errors import RecipeError, ShapeError
from vestige.models.factory import list_generators, model_arguments
from vestige.recipes.catalog import METHODS, PLUGINS, TASKS, shipped
from vestige.recipes.teacher import load_teacher_recipe
from vestige.teachers.loading import KEYS as TEACHER_KEYS
from vestige.teachers.loading import builtin_teachers
from vestige.training.trainer import TrainerConfig

_LARGEST, _DEEPEST = 1_000_000, 20
# PyYAML lets the ValueError of an impossible date or an empty number through.
_NOT_YAML = (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputConfig(_Strict):
    """The teacher's input: `channels`, `height` and `width` of images, or any `kind` and `shape`.

    Attributes:
        kind: of the numbers; its sets are opened by `data/<kind>.py`.
        shape: of one input; for images given by the three sizes.
        mean: per channel of values in [0, 1]; () means no normalisation.
        std: likewise.
    """

    kind: str = "image"
    shape: tuple[int, ...] | None = None
    channels: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _checked(self) -> Self:
        sizes = (self.channels, self.height, self.width)
        complete = all(sizes) if self.shape is None else not any(sizes)
        if not complete:
            raise ValueError("give either shape, or channels, height and width")
        try:
            self.spec()
        except ShapeError as error:
            raise ValueError(str(error)) from error
        return self

    def spec(self) -> InputSpec:
        """The same as the rest of the library takes it."""
        sizes = (self.channels, self.height, self.width)
        shape = self.shape or tuple(size for size in sizes if size is not None)
        return InputSpec(self.kind, shape, self.mean, self.std)


class ModelConfig(_Strict):
    """A network: a name of `vestige list models`, or a factory of the user's own."""

    name: str | None = None
    factory: str | None = None
    args: dict[str, Any] = {}


class SourceConfig(_Strict):
    """Where inputs come from that the method does not make.

    Attributes:
        kind: "noise", "untrained-generator", "images" (a set of whatever kind the inputs are), or
            "factory", a callable of the user's own.
        distribution: of noise, "normal" per value of the normalised input, or "uniform" images.
        generator: of "untrained-generator", with `generator_width` and `latent_dim`.
        data: of "images", name or folder of a set, with `split`.
        origin: of "images": "real" is the teacher's own data (reference arm), "foreign" is
            anything else.
        factory: of "factory", "package.module:callable"; called with `spec` and `args` it returns
            a Source.
        args: of `factory`.
    """

    kind: Literal["noise", "untrained-generator", "images", "factory"]
    distribution: Literal["normal", "uniform"] = "normal"
    generator: str = "upsample"
    generator_width: int = 64
    latent_dim: int = 256
    data: str | None = None
    split: Literal["train", "select", "test"] = "train"
    origin: Literal["real", "foreign", "unlabelled"] = "foreign"
    factory: str | None = None
    args: dict[str, Any] = {}


class PluginConfig(_Strict):
    """A plug-in by name with its settings."""

    name: str
    config: dict[str, Any] = {}


class ArmConfig(_Strict):
    """One arm of a comparison: what differs from the recipe's main run.

    Attributes:
        title: what is shown.
        method: another method than the recipe's; then `config` starts from `shared` alone.
        config: overrides of the method's settings.
        sources: replaces the recipe's sources; None keeps them if the method is the same.
        plugins: replaces the recipe's plug-ins; None keeps them.
    """

    title: str
    method: str | None = None
    config: dict[str, Any] = {}
    sources: dict[str, SourceConfig] | None = None
    plugins: tuple[PluginConfig, ...] | None = None


class Recipe(_Strict):
    """One run, completely described.

    Attributes:
        method: name of `vestige list methods`.
        task: kind of task.
        data: name or folder of the set whose test split judges; None judges nothing.
        input: of the teacher; None takes what a built-in or trained teacher's card says.
        num_classes: K; None takes what the teacher's card says.
        teacher: "builtin:NAME", "recipe:NAME", a mapping with `model` or `factory` and `weights`.
        more_teachers: for methods with several; `num_classes` in a mapping is that teacher's own.
        access: how much of the teachers is shown; less than "white_box" hides their weights.
        query_budget: rows that each teacher answers, where `access` is less than "white_box".
        student: a fresh network; None where the method trains none.
        sources: by the names that the method asks for.
        plugins: outermost first.
        config: settings of the method.
        shared: settings that every arm has in common with the main run, whatever its method.
        trainer: how the run is driven.
        seed: of every stream of randomness.
        arms: runs of a comparison, each told by what differs from the main run.
        headline: the arm that is the main run, whose student the user keeps; chosen here, never by
            a score.
        baseline: arm whose score counts as 0 % of the gap.
        reference: arm whose score counts as 100 % of the gap.
    """

    method: str
    task: str = "classification"
    data: str | None = None
    input: InputConfig | None = None
    num_classes: int | None = Field(None, ge=2)
    teacher: str | dict[str, Any]
    more_teachers: tuple[str | dict[str, Any], ...] = ()
    access: Access = Access.WHITE_BOX
    query_budget: int | None = Field(None, ge=1)
    student: ModelConfig | None = None
    sources: dict[str, SourceConfig] = {}
    plugins: tuple[PluginConfig, ...] = ()
    config: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    trainer: TrainerConfig = TrainerConfig()
    seed: int = Field(0, ge=0)
    arms: dict[str, ArmConfig] = {}
    headline: str | None = None
    baseline: str | None = None
    reference: str | None = None

    def method_config(self) -> Any:
        """The method's own settings, validated."""
        return METHODS.get(self.method).Config(**{**self.shared, **self.config})

    def arm(self, name: str) -> "Recipe":
        """The recipe of one arm, without arms of its own."""
        arm = self.arms[name]
        same = arm.method is None or arm.method == self.method
        sources = self.sources if same and arm.sources is None else arm.sources or {}
        return self.model_copy(
            update={
                "method": arm.method or self.method,
                "config": {**self.config, **arm.config} if same else dict(arm.config),
                "sources": sources,
                "plugins": self.plugins if arm.plugins is None else arm.plugins,
                "arms": {},
                "headline": None,
                "baseline": None,
                "reference": None,
            }
        )

    def to_yaml(self) -> str:
        """The resolved recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def fingerprint(self) -> str:
        """Digest of everything that decides the result."""
        return sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


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
    raw = read_yaml(name_or_path)
    presets = raw.pop("presets", None) or {}
    if not isinstance(presets, Mapping):
        raise RecipeError(f"got presets of type {type(presets).__name__}, expected a mapping")
    if preset is not None and preset not in presets:
        raise RecipeError(
            f"got preset {preset!r}, expected one of {', '.join(map(str, presets)) or 'none'}"
            f"{_near(preset, [*map(str, presets)])}"
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
    return validate(raw)


def read_yaml(name_or_path: str | Path) -> dict[str, Any]:
    """The mapping in a shipped recipe or a file."""
    known = shipped()
    path = known.get(str(name_or_path), Path(name_or_path))
    # Not Path.is_file, which raises for a name that is too long for the file system.
    if not os.path.isfile(path):
        raise RecipeError(
            f"got recipe {_short(str(name_or_path))}, expected a file or one of {', '.join(known)}"
            f"{_near(str(name_or_path), list(known), listed=False)}"
        )
    if path.stat().st_size > _LARGEST:
        raise RecipeError(
            f"{path} has {path.stat().st_size} bytes; a recipe has at most {_LARGEST}"
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf8"))
    except _NOT_YAML as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds {type(raw).__name__}, expected a mapping with 'method' …")
    return raw


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; mappings are merged, everything else is replaced.

    A key with the value "!drop" is taken away.
    """
    merged = dict(base)
    for key, value in over.items():
        if value == "!drop":
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """Read "a.b=value" as a nested mapping; the value is YAML."""
    key, sign, value = text.partition("=")
    names = key.strip().split(".")
    if not sign or not all(names):
        raise RecipeError(f"got --set {text!r}, expected key=value, for example config.rounds=10")
    if len(names) > _DEEPEST:
        raise RecipeError(
            f"got --set with a key of {len(names)} parts, expected at most {_DEEPEST}"
        )
    try:
        parsed = yaml.safe_load(value)
    except _NOT_YAML as error:
        raise RecipeError(f"got --set {text!r}; its value is not YAML: {error}") from error
    if isinstance(parsed, str) and _is_number(parsed):
        # YAML 1.1 reads 1e-3 as text; nobody means that.
        parsed = float(parsed)
    for name in reversed(names):
        parsed = {name: parsed}
    return dict(parsed)


def validate(raw: Mapping[str, Any]) -> Recipe:
    """The recipe that `raw` describes.

    Raises:
        RecipeError: all mistakes, of the recipe and of every method's and plug-in's settings.
    """
    problems: list[str] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(dict(raw))
    except ValidationError as error:
        problems.extend(explain(error, Recipe, ""))
    problems.extend(_config_problems(raw))
    problems.extend(_network_problems(raw))
    if recipe is not None:
        problems.extend(_requirement_problems(recipe))
    if problems or recipe is None:
        raise RecipeError(_listed(problems))
    return recipe


def explain(error: ValidationError, model: type[BaseModel], where: str) -> Iterator[str]:
    """One line per mistake that pydantic found, with the nearest valid key."""
    for problem in error.errors():
        yield _line(problem, model, where)


def _line(problem: Any, model: type[BaseModel], where: str) -> str:
    path = ".".join([*([where] if where else []), *map(str, problem["loc"])])
    if problem["type"] == "extra_forbidden":
        owner = _model_at(model, problem["loc"][:-1])
        valid = list(owner.model_fields) if owner else []
        return f"{path}: no such key{_near(str(problem['loc'][-1]), valid)}"
    if problem["type"] == "missing":
        return f"{path}: is missing"
    return f"{path}: got {_short(problem['input'])}; {problem['msg']}"


def _config_problems(raw: Mapping[str, Any]) -> Iterator[str]:
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
            found = _try(METHODS.get(method).Config, layers)
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
        yield from _try(settings, [(f"{where}.{index}.config", _mapping(plugin.get("config")))])


def _network_problems(raw: Mapping[str, Any]) -> Iterator[str]:
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
                yield f"{where}.{name}.generator: got {_short(generator)}{_near(generator, valid)}"


def _teacher_problems(where: str, teacher: Any) -> Iterator[str]:
    if isinstance(teacher, Mapping):
        valid = (*TEACHER_KEYS, "num_classes")
        for key in teacher:
            if key not in valid:
                yield f"{where}.{key}: no such key{_near(str(key), valid)}"
        if ("factory" in teacher) == ("model" in teacher):
            yield f"{where}: give exactly one of 'model' and 'factory'"
        yield from _model_problems(where, "model", teacher)
    elif isinstance(teacher, str):
        scheme, _, name = teacher.partition(":")
        if scheme == "recipe":
            try:
                load_teacher_recipe(name)
            except RecipeError as error:
                yield f"{where}: {error}"
        elif scheme != "builtin" or name not in builtin_teachers():
            known = [f"builtin:{known}" for known in builtin_teachers()]
            yield (
                f"{where}: got {_short(teacher)}, expected 'recipe:NAME', a mapping or one of "
                f"{', '.join(known)}{_near(teacher, known, listed=False)}"
            )


def _model_problems(where: str, key: str, network: Mapping[str, Any]) -> Iterator[str]:
    name = network.get(key)
    if not isinstance(name, str):
        return
    try:
        valid = model_arguments(name)
    except RecipeError as error:
        yield f"{where}.{key}: {error}"
        return
    for argument in _mapping(network.get("args")):
        if argument not in valid:
            yield f"{where}.args.{argument}: no such key{_near(str(argument), valid)}"


def _requirement_problems(recipe: Recipe) -> Iterator[str]:
    for key in ("headline", "baseline", "reference"):
        arm = getattr(recipe, key)
        if arm is not None and arm not in recipe.arms:
            yield f"{key}: got {arm!r}, expected one of the arms {', '.join(recipe.arms) or 'none'}"
    for where, run in [("", recipe), *((f"arms.{n}.", recipe.arm(n)) for n in recipe.arms)]:
        if run.method not in METHODS.names():
            continue  # told by _config_problems
        requires = METHODS.get(run.method).requires
        allowed = {*requires.sources, *requires.optional_sources}
        for name in requires.sources:
            if name not in run.sources:
                yield f"{where}sources: {run.method!r} needs the source {name!r}; describe it"
        for name in run.sources:
            if name not in allowed:
                yield (
                    f"{where}sources.{name}: {run.method!r} takes "
                    f"{', '.join(sorted(allowed)) or 'no sources'}{_near(name, sorted(allowed))}"
                )
        for name, source in run.sources.items():
            if source.kind == "images" and source.data is None:
                yield f"{where}sources.{name}.data: images need the name or folder of a set"
            if source.kind == "factory" and source.factory is None:
                yield f"{where}sources.{name}.factory: is missing; 'package.module:callable'"
        low, high = requires.teachers
        if not low <= 1 + len(run.more_teachers) <= high:
            yield (
                f"{where}more_teachers: {run.method!r} takes {low} to {high} teachers, "
                f"got {1 + len(run.more_teachers)}"
            )
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
        yield f"task: got {recipe.task!r}{_near(recipe.task, TASKS.names())}"
    if recipe.query_budget is not None and recipe.access is Access.WHITE_BOX:
        yield "query_budget: counts for a black box only; set access: scores or labels"


def _try(settings: type[BaseModel], layers: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Mistakes in the merged layers, each under the name of the layer that it came from."""
    values = {key: value for _, layer in layers for key, value in layer.items()}
    try:
        settings.model_validate(values)
    except ValidationError as error:
        return [
            _line(
                problem,
                settings,
                next(
                    (where for where, layer in reversed(layers) if problem["loc"][0] in layer),
                    layers[-1][0],
                )
                if problem["loc"]
                else layers[-1][0],
            )
            for problem in error.errors()
        ]
    return []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _model_at(model: type[BaseModel], path: Sequence[Any]) -> type[BaseModel] | None:
    """The model that a path of keys leads to, through optional, list and mapping types."""
    found: type[BaseModel] | None = model
    for key in path:
        if found is None:
            return None
        if key in found.model_fields:
            found = _first_model(found.model_fields[str(key)].annotation)
    return found


def _first_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if (found := _first_model(inner)) is not None:
            return found
    return None


def _near(name: str, valid: Sequence[str], *, listed: bool = True) -> str:
    close = difflib.get_close_matches(name[:100], valid, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(valid)}" if valid and listed else ""


def _short(value: Any) -> str:
    # Bounded in depth and breadth: a small file can stand for a value of any size.
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _listed(problems: Sequence[str]) -> str:
    head = f"{len(problems)} mistakes" if len(problems) > 1 else "one mistake"
    return "\n".join([f"the recipe has {head}:", *(f"  - {problem}" for problem in problems)])
