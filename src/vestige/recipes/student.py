"""The student that a recipe names, and the card from which it can be loaded again."""

from typing import Any

from torch import nn

from vestige.core import seeding
from vestige.core.types import InputSpec
from vestige.errors import RecipeError
from vestige.models.factory import build_model
from vestige.recipes.factories import call
from vestige.recipes.schema import ModelConfig
from vestige.teachers.smp import fresh_smp

SMP = "smp:"


def build_student(config: ModelConfig, spec: InputSpec, num_classes: int, seed: int) -> nn.Module:
    """A fresh student; the same seed gives the same weights in every arm."""
    with seeding.seeded(seed, "student"):
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
    return made


def network_card(config: ModelConfig | None) -> dict[str, Any]:
    """What `load_teacher` reads again, so that a student can teach."""
    if config is None:
        return {}
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
    return {**shape, "mean": list(spec.mean), "std": list(spec.std)}
