"""Mistakes that pydantic found, in words: each is one line, with the nearest valid key."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from vestige.recipes.files import near, short


def explain(error: ValidationError, model: type[BaseModel], where: str) -> Iterator[str]:
    """One line per mistake that pydantic found, with the nearest valid key."""
    for problem in error.errors():
        yield _line(problem, model, where)


def _line(problem: Any, model: type[BaseModel], where: str) -> str:
    path = ".".join([*([where] if where else []), *map(str, problem["loc"])])
    if problem["type"] == "extra_forbidden":
        owner = _model_at(model, problem["loc"][:-1])
        valid = list(owner.model_fields) if owner else []
        return f"{path}: no such key{near(str(problem['loc'][-1]), valid)}"
    if problem["type"] == "missing":
        return f"{path}: is missing"
    return f"{path}: got {short(problem['input'])}; {problem['msg']}"


def mistakes_in(
    settings: type[BaseModel], layers: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[str]:
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


def listed(problems: Sequence[str]) -> str:
    """One message about all problems."""
    head = f"{len(problems)} mistakes" if len(problems) > 1 else "one mistake"
    return "\n".join([f"the recipe has {head}:", *(f"  - {problem}" for problem in problems)])


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
