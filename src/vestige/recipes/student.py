"""The student that a recipe names, and the card from which it can be loaded again."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from vestige.core import seeding
from vestige.core.protocols import MakesStudents
from vestige.core.types import InputSpec
from vestige.errors import RecipeError
from vestige.models.factory import build_model
from vestige.recipes.factories import call
from vestige.recipes.schema import ModelConfig
from vestige.teachers.smp import fresh_smp

SMP = "smp:"
# Made of the teacher's own layers, so that it is not among the networks that a name describes.
OF_TEACHER = "layers-of-teacher"


def build_student(
    config: ModelConfig, spec: InputSpec, num_classes: int, seed: int, teacher: nn.Module
) -> nn.Module:
    """A fresh student; the same seed gives the same weights in every arm.

    Args:
        config: which.
        spec: of its inputs.
        num_classes: K.
        seed: of the recipe.
        teacher: the first one, for a student that is made of its layers.

    Raises:
        RecipeError: it cannot be built.
    """
    with seeding.seeded(seed, "student"):
        if config.name == OF_TEACHER:
            return _of_teacher(teacher, config.args)
        if config.name is not None and config.name.startswith(SMP):
            return fresh_smp(config.name.removeprefix(SMP), spec, num_classes, config.args)
        if config.name is not None:
            return build_model(config.name, spec, num_classes, **config.args)
        made = call("student.factory", str(config.factory), config.args)
    if not isinstance(made, nn.Module):
        raise RecipeError(
            f"student.factory: {config.factory!r} made a {type(made).__name__}, expected a "
            "torch.nn.Module"
        )
    if any(map(is_lazy, made.state_dict().values())):
        raise RecipeError(
            f"student.factory: {config.factory!r} made a {type(made).__name__} whose layers do not "
            "know their sizes yet, expected a whole network; call it once on an input of shape "
            f"{(1, *spec.shape)} before you return it"
        )
    return made


def _of_teacher(teacher: nn.Module, args: Mapping[str, Any]) -> nn.Module:
    if not isinstance(teacher, MakesStudents):
        raise RecipeError(
            f"student.name: got '{OF_TEACHER}' with a {type(teacher).__name__} as teacher, of "
            "whose layers no student can be made; name a network of `vestige list models`"
        )
    try:
        inspect.signature(teacher.with_layers).bind(**args)
    except TypeError as error:
        taken = ", ".join(inspect.signature(teacher.with_layers).parameters)
        raise RecipeError(f"student.args: {error}; expected some of {taken}") from error
    return teacher.with_layers(**args)


def network_card(config: ModelConfig | None, student: nn.Module | None = None) -> dict[str, Any]:
    """What `load_teacher` reads again, so that a student can teach."""
    if config is None:
        return {}
    if config.name == OF_TEACHER:
        described: dict[str, Any] = getattr(student, "network_card", dict)()
        return described
    if config.name is None:
        kind = {"factory": config.factory}
    elif config.name.startswith(SMP):
        kind = {"smp": config.name.removeprefix(SMP)}
    else:
        kind = {"model": config.name}
    return {**kind, "args": config.args}


def input_card(spec: InputSpec) -> dict[str, Any]:
    """What `InputConfig` reads again."""
    sizes = dict(zip(("channels", "height", "width"), spec.shape, strict=False))
    shape = sizes if spec.kind == "image" else {"kind": spec.kind, "shape": list(spec.shape)}
    rate = {"sample_rate_hz": spec.sample_rate_hz} if spec.sample_rate_hz else {}
    return {**shape, "mean": list(spec.mean), "std": list(spec.std), **rate}
