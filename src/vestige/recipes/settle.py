"""Settings that nobody gave: what a method suggests for these networks and inputs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from vestige.core.protocols import Task, Teacher
from vestige.recipes.catalog import METHODS

if TYPE_CHECKING:
    from vestige.recipes.schema import Recipe


def suggested(
    method: str | type, task: Task, teachers: Sequence[Teacher], student: nn.Module | None
) -> Mapping[str, Any]:
    """What the method's `suggest` says; {} where it has none, or none for such networks.

    Raises:
        ShapeError: the student, or the only teacher, does not fit the inputs or the classes.
    """
    suggest = getattr(METHODS.get(method), "suggest", None)
    if suggest is None or student is None:
        return {}
    # First: what does not fit is told here in plain words, and lazy layers get their weights. A
    # black box is not asked, since that may cost; several teachers may know other classes.
    task.check(student)
    if len(teachers) == 1 and isinstance(teachers[0], nn.Module):
        task.check(getattr(teachers[0], "module", teachers[0]))
    asked = [getattr(teacher, "queries", None) for teacher in teachers]
    settings = dict(suggest(task, teachers, student))
    # To count what a network costs is no query.
    for teacher, queries in zip(teachers, asked, strict=True):
        if queries is not None:
            teacher.queries = queries  # type: ignore[attr-defined]
    return settings


def settled(
    recipe: "Recipe", task: Task, teachers: Sequence[Teacher], student: nn.Module | None
) -> "Recipe":
    """The recipe with every setting of its method written out: suggested < shared < config.

    With `defaults: published` nothing is suggested, and what is not given has the method's own
    default.
    """
    known: Mapping[str, Any] = {}
    if recipe.defaults == "suggested":
        known = suggested(recipe.method, task, teachers, student)
    config = recipe.method_config(known).model_dump(mode="json")
    return recipe.model_copy(update={"config": config})
