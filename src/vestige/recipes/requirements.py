"""What methods and plug-ins need, checked before anything is drawn."""

from collections.abc import Mapping, Sequence

from torch import nn

from vestige.core.protocols import Source, Task, Teacher
from vestige.core.types import Requires
from vestige.errors import AccessError, NoBatchNormError, RecipeError, TeacherError
from vestige.models.probes import batchnorm_layers
from vestige.recipes.extras import check_extra


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
            raise NoBatchNormError(
                f"{name!r} needs BatchNorm statistics, but the teacher has 0 BatchNorm layers; "
                "take a method that needs none (vestige list methods --without batchnorm)"
            )
    missing = [source for source in requires.sources if source not in sources]
    if missing:
        raise RecipeError(f"{name!r} needs the sources {missing}; hand them in")
