"""What a recipe may say, and how presets and overrides are merged into it."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vestige.errors import RecipeError
from vestige.recipes.catalog import METHODS, PLUGINS, shipped
from vestige.teachers.loading import ImageInput
from vestige.training.trainer import TrainerConfig

_LARGEST = 1_000_000


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Strict):
    """A network: a name of `vestige list models`, or a factory of the user's own."""

    name: str | None = None
    factory: str | None = None
    args: dict[str, Any] = {}


class SourceConfig(_Strict):
    """Where inputs come from that the method does not make.

    Attributes:
        kind: "noise", "untrained-generator" or "images".
        distribution: of noise, "normal" per value of the normalised input, or "uniform" images.
        generator: of "untrained-generator", with `generator_width` and `latent_dim`.
        data: of "images", name or folder of a set, with `split`.
        origin: of "images": "real" is the teacher's own data (reference arm), "foreign" is
            anything else.
    """

    kind: Literal["noise", "untrained-generator", "images"]
    distribution: Literal["normal", "uniform"] = "normal"
    generator: str = "upsample"
    generator_width: int = 64
    latent_dim: int = 256
    data: str | None = None
    split: Literal["train", "select", "test"] = "train"
    origin: Literal["real", "foreign", "unlabelled"] = "foreign"


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
        student: a fresh network.
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
    task: Literal["classification"] = "classification"
    data: str | None = None
    input: ImageInput | None = None
    num_classes: int | None = Field(None, ge=2)
    teacher: str | dict[str, Any]
    student: ModelConfig
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
            f"got preset {preset!r}, expected one of {', '.join(presets) or 'none'}"
            f"{_near(preset, list(presets))}"
        )
    chosen = preset or ("cpu" if "cpu" in presets else None)
    if chosen is not None:
        raw = merge(raw, presets[chosen] or {})
    for override in overrides:
        raw = merge(raw, parse_override(override))
    if plugins:
        raw["plugins"] = [*(raw.get("plugins") or []), *({"name": name} for name in plugins)]
    if seed is not None:
        raw["seed"] = seed
    return validate(raw)


def read_yaml(name_or_path: str | Path) -> dict[str, Any]:
    """The mapping in a shipped recipe or a file."""
    known = shipped()
    path = known.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        raise RecipeError(
            f"got recipe {str(name_or_path)!r}, expected a file or one of {', '.join(known)}"
            f"{_near(str(name_or_path), list(known))}"
        )
    if path.stat().st_size > _LARGEST:
        raise RecipeError(
            f"{path} has {path.stat().st_size} bytes; a recipe has at most {_LARGEST}"
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf8"))
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
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
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError) as error:
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
    try:
        recipe = Recipe(**raw)
    except ValidationError as error:
        problems.extend(explain(error, Recipe, ""))
        problems.extend(_config_problems(raw))
        raise RecipeError(_listed(problems)) from None
    problems.extend(_config_problems(raw))
    problems.extend(_requirement_problems(recipe))
    if problems:
        raise RecipeError(_listed(problems))
    return recipe


def explain(error: ValidationError, model: type[BaseModel], where: str) -> Iterator[str]:
    """One line per mistake that pydantic found, with the nearest valid key."""
    for problem in error.errors():
        path = ".".join([*([where] if where else []), *map(str, problem["loc"])])
        if problem["type"] == "extra_forbidden":
            owner = _model_at(model, problem["loc"][:-1])
            valid = list(owner.model_fields) if owner else []
            yield f"{path}: no such key{_near(str(problem['loc'][-1]), valid)}"
        elif problem["type"] == "missing":
            yield f"{path}: is missing"
        else:
            yield f"{path}: got {_short(problem['input'])}; {problem['msg']}"


def _config_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Mistakes in settings that belong to methods and plug-ins, as far as they can be found."""
    shared = raw.get("shared") or {}
    runs = [("config", raw.get("method"), raw.get("config") or {})]
    arms = raw.get("arms") or {}
    for name, arm in arms.items() if isinstance(arms, Mapping) else ():
        if isinstance(arm, Mapping):
            method = arm.get("method") or raw.get("method")
            same = method == raw.get("method")
            config = arm.get("config") or {}
            if same and isinstance(config, Mapping) and isinstance(raw.get("config"), Mapping):
                config = {**raw["config"], **config}
            runs.append((f"arms.{name}.config", method, config))
    seen = set()
    for where, method, config in runs:
        if not isinstance(method, str) or not isinstance(config, Mapping):
            continue
        try:
            settings = METHODS.get(method).Config
        except RecipeError as error:
            yield f"{where.removesuffix('config')}method: {error}"
            continue
        values = {**shared, **config} if isinstance(shared, Mapping) else config
        for problem in _try(settings, values, where):
            if problem not in seen:
                seen.add(problem)
                yield problem
    for index, plugin in enumerate(raw.get("plugins") or []):
        if not isinstance(plugin, Mapping) or not isinstance(plugin.get("name"), str):
            continue
        try:
            settings = PLUGINS.get(plugin["name"]).Config
        except RecipeError as error:
            yield f"plugins.{index}.name: {error}"
            continue
        yield from _try(settings, plugin.get("config") or {}, f"plugins.{index}.config")


def _requirement_problems(recipe: Recipe) -> Iterator[str]:
    for key in ("headline", "baseline", "reference"):
        arm = getattr(recipe, key)
        if arm is not None and arm not in recipe.arms:
            yield f"{key}: got {arm!r}, expected one of the arms {', '.join(recipe.arms) or 'none'}"
    for where, run in [("", recipe), *((f"arms.{n}.", recipe.arm(n)) for n in recipe.arms)]:
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
        if run.task not in requires.tasks:
            yield f"{where}task: {run.method!r} serves {', '.join(requires.tasks)}, not {run.task}"
        for plugin in run.plugins:
            if plugin.name in requires.closed_to:
                yield f"{where}plugins: {run.method!r} is closed to {plugin.name!r}"
    if (recipe.student.name is None) == (recipe.student.factory is None):
        yield "student: give exactly one of 'name' and 'factory'"


def _try(settings: type[BaseModel], values: Mapping[str, Any], where: str) -> list[str]:
    try:
        settings(**values)
    except ValidationError as error:
        return list(explain(error, settings, where))
    except TypeError as error:
        return [f"{where}: {error}"]
    return []


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


def _near(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(valid)}" if valid else ""


def _short(value: Any) -> str:
    text = repr(value)
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
