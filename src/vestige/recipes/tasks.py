"""Tasks by name, with the settings that a recipe gives them."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from vestige.core.protocols import Task
from vestige.core.types import InputSpec
from vestige.errors import RecipeError
from vestige.recipes.catalog import TASKS
from vestige.recipes.mistakes import explain, listed, mistakes_in

CLASSIFICATION = "classification"


def make_task(
    kind: str, spec: InputSpec, num_classes: int, config: Mapping[str, Any] | None = None
) -> Task:
    """The task of the name `kind`.

    Args:
        kind: one of `TASKS`.
        spec: of one input.
        num_classes: K.
        config: arguments of the task's class besides these.

    Raises:
        RecipeError: there is no such task, or it does not take `config`.
    """
    settings = _settings(kind)
    try:
        given = settings.model_validate(dict(config or {}))
    except ValidationError as error:
        raise RecipeError(listed([*explain(error, settings, "task_config")])) from None
    chosen = {key: getattr(given, key) for key in given.model_fields_set}
    task: Task = TASKS.get(kind)(spec, num_classes, **chosen)
    return task


def task_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Mistakes in `task_config` of a recipe, of whatever sort, that has a `task`."""
    kind, config = raw.get("task", CLASSIFICATION), raw.get("task_config")
    # What is no task, and what is no mapping, is told by others.
    if kind in TASKS.names() and isinstance(config, Mapping):
        yield from mistakes_in(_settings(kind), [("task_config", config)])


def task_card(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of its network's task; nothing for what most networks are made for."""
    if kind == CLASSIFICATION and not config:
        return {}
    return {"task": kind, "task_config": dict(config)}


def _settings(kind: str) -> type[BaseModel]:
    """What the class of a task takes besides the spec and the number of classes, as a model."""
    _, _, *parameters = inspect.signature(TASKS.get(kind), eval_str=True).parameters.values()
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    fields: dict[str, Any] = {
        one.name: (
            Any if one.annotation is one.empty else one.annotation,
            ... if one.default is one.empty else one.default,
        )
        for one in named
    }
    # Any object of the task's own may be a type here, and none is an input of a recipe.
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return create_model(f"{kind} settings", __config__=config, **fields)
