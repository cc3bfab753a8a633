"""What methods and plug-ins need, checked before anything is drawn."""

from collections.abc import Mapping, Sequence

from torch import nn

from vestige.core.protocols import Source, Task, Teacher
from vestige.core.types import Requires
from vestige.errors import (
    AccessError,
    NoBatchNormError,
    RecipeError,
    TeacherError,
    VestigeError,
)
from vestige.models.probes import batchnorm_layers
from vestige.recipes.catalog import METHODS
from vestige.recipes.extras import check_extra

# The weight of the term that reads BatchNorm statistics, in every method that has it.
BN_WEIGHT = "bn_weight"


def check_requirements(
    name: str,
    requires: Requires,
    task: Task,
    teachers: Sequence[Teacher],
    sources: Mapping[str, Source],
) -> None:
    """Refuse what cannot work before anything is drawn.

    Raises:
        TeacherError: too few or too many teachers, or not enough access to one.
        NoBatchNormError: BatchNorm statistics are needed and a teacher has none.
        RecipeError: a source is missing, or the task is of another kind.
        MissingExtraError: an optional package is not installed.
    """
    if task.kind not in requires.tasks:
        raise RecipeError(
            f"{name!r} serves {', '.join(requires.tasks)}, got the task {task.kind!r}; take another"
        )
    for extra in requires.extras:
        check_extra(name, extra)
    low, high = requires.teachers
    if not low <= len(teachers) <= high:
        raise TeacherError(f"{name!r} takes {low} to {high} teachers, got {len(teachers)}")
    for teacher in teachers:
        if not teacher.access.covers(requires.access):
            raise AccessError(
                f"{name!r} needs {requires.access} access, the teacher offers {teacher.access}; "
                "take a method that needs less (vestige list methods)"
            )
        layers = batchnorm_layers(teacher) if isinstance(teacher, nn.Module) else {}
        if requires.batchnorm and not layers:
            raise NoBatchNormError(no_batchnorm(name, None, task.kind))
    missing = [source for source in requires.sources if source not in sources]
    if missing:
        raise RecipeError(f"{name!r} needs the sources {missing}; hand them in")


def no_batchnorm(name: str, settings: object, task: str) -> str:
    """Why a method cannot learn from a teacher without BatchNorm, and what can.

    Args:
        name: of the method.
        settings: its own, whose `bn_weight` may be what asks for the statistics; None if it needs
            them whatever is set.
        task: kind of the task that another method must serve.
    """
    weight = bn_weight(settings)
    asks = f"{name!r} with {BN_WEIGHT}: {weight:g}" if weight else repr(name)
    off = f"set {BN_WEIGHT}: 0, or " if weight else ""
    return (
        f"{asks} needs BatchNorm statistics, but the teacher has 0 BatchNorm layers that store "
        f"them; {off}{_others(name, task)}"
    )


def bn_weight(settings: object) -> float:
    """What a method's settings give the term that reads BatchNorm statistics; 0 without one."""
    return float(getattr(settings, BN_WEIGHT, None) or 0.0)


def _others(name: str, task: str) -> str:
    """Which methods to take instead of `name`."""
    as_they_are: list[str] = []
    switched_off: list[str] = []
    for known in METHODS.names():
        try:
            method = METHODS.get(known)
        except VestigeError:
            # One that another distribution offers and that is broken helps nobody.
            continue
        if known == name or method.requires.batchnorm or task not in method.requires.tasks:
            continue
        field = method.Config.model_fields.get(BN_WEIGHT)
        (switched_off if field is not None and field.default else as_they_are).append(known)
    told = [", ".join(as_they_are)] if as_they_are else []
    told += [f"with {BN_WEIGHT}: 0 {', '.join(switched_off)}"] if switched_off else []
    return f"take another method ({'; '.join(told)})" if told else "take a teacher with BatchNorm"
