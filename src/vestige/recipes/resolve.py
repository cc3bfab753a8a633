"""The teachers that a recipe names, as far as it shows them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vestige.core import seeding
from vestige.core.protocols import Teacher
from vestige.core.types import Access, InputSpec
from vestige.errors import RecipeError
from vestige.recipes.schema import Recipe
from vestige.recipes.teacher import teacher_from_recipe
from vestige.teachers.black_box import BlackBoxTeacher
from vestige.teachers.ensemble import BlackBoxEnsemble, CombinedNetwork, Ensemble
from vestige.teachers.loading import fingerprint, of_card, open_teacher
from vestige.teachers.opened import OpenedTeacher
from vestige.teachers.white_box import WhiteBoxTeacher

_UNKNOWN = "input and num_classes: a teacher without a card needs both in the recipe; add them"


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher with what its card says, or the recipe where it has none.

    `module` is a network, or what writes texts and is none; None where a recipe has no teacher.
    """

    module: Any
    spec: InputSpec
    num_classes: int
    classes: tuple[str, ...] = ()
    trained_on: str = ""
    task_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> nn.Module | None:
        """The network; None for what only writes texts."""
        return self.module if isinstance(self.module, nn.Module) else None

    def placed(self, device: torch.device) -> Any:
        """It, on the device if it is a network."""
        return self.module if self.network is None else self.network.to(device)

    def fingerprint(self) -> str:
        """Of its weights; of what it is, where there are none to be seen; "" of none."""
        if self.module is None:
            return ""
        return str(self.module.fingerprint()) if self.network is None else fingerprint(self.network)


def resolve_teachers(recipe: Recipe) -> list[LoadedTeacher]:
    """The recipe's teachers; all of them take the same inputs.

    Where there is none, one entry without a network says what the recipe says of the inputs.
    """
    if recipe.teacher is None:
        if recipe.input is None or recipe.num_classes is None:
            raise RecipeError(
                "input and num_classes: without a teacher both must be in the recipe; add them"
            )
        return [LoadedTeacher(None, recipe.input.spec(), recipe.num_classes)]
    loaded = []
    for index, teacher in enumerate((recipe.teacher, *recipe.more_teachers)):
        # A factory may draw; a resumed run must find the same teacher.
        with seeding.seeded(recipe.seed, f"teacher {index}"):
            loaded.append(resolve_teacher(teacher, recipe))
    for index, one in enumerate(loaded[1:]):
        if one.spec != loaded[0].spec:
            raise RecipeError(
                f"more_teachers.{index}: takes {one.spec}, expected {loaded[0].spec} as the first"
            )
    return loaded


def resolve_teacher(teacher: str | Mapping[str, Any], recipe: Recipe) -> LoadedTeacher:
    """One teacher; what its card says must not contradict the recipe."""
    given = None if recipe.input is None else recipe.input.spec()
    alone = not recipe.more_teachers
    if isinstance(teacher, str) and teacher.startswith(("builtin:", "recipe:")):
        loaded = _known(open_teacher(teacher, openers=_OPENERS), recipe)
        if given is not None and given != loaded.spec:
            raise RecipeError(
                f"input: got {given}, expected {loaded.spec} as {teacher} was trained; leave "
                "'input' out"
            )
        # Several teachers may know different classes; `num_classes` is then the student's.
        if alone and recipe.num_classes not in (None, loaded.num_classes):
            raise RecipeError(
                f"num_classes: got {recipe.num_classes}, expected {loaded.num_classes} as "
                f"{teacher} has; leave it out"
            )
        return loaded
    own = teacher if isinstance(teacher, Mapping) else {}
    silent = bool({"factory", "model"} & set(own)) and "prompts" not in own
    count = own.get("num_classes")
    if count is None and (alone or silent):
        count = recipe.num_classes
    if silent and (count is None or (given is None and own.get("input") is None)):
        raise RecipeError(_UNKNOWN)
    opened = open_teacher(teacher, input_spec=given, num_classes=count, openers=_OPENERS)
    return _known(opened, recipe)


def _known(opened: OpenedTeacher, recipe: Recipe) -> LoadedTeacher:
    if opened.spec is None or opened.num_classes is None:
        raise RecipeError(_UNKNOWN)
    if opened.task not in ("", recipe.task):
        raise RecipeError(
            f"task: got {recipe.task!r}, expected {opened.task!r}, which the teacher was trained "
            f"for; set task: {opened.task}"
        )
    return LoadedTeacher(
        opened.module,
        opened.spec,
        opened.num_classes,
        opened.classes,
        opened.trained_on,
        opened.task_config,
    )


def _trained_by_recipe(name: str) -> OpenedTeacher:
    module, card = teacher_from_recipe(name)
    return of_card(card, module)


_OPENERS = {"recipe": _trained_by_recipe}


def shown(module: Any, recipe: Recipe) -> Teacher:
    """The teacher as far as the recipe's access level shows it; a budget is each member's own."""
    white = recipe.access is Access.WHITE_BOX
    if not isinstance(module, nn.Module):
        if recipe.query_budget is not None:
            raise RecipeError(
                "query_budget: got one for a teacher that writes texts, expected token_budget or "
                "money_budget among the teacher's args; move it there"
            )
        far: Teacher = module
        return far
    if isinstance(module, CombinedNetwork):
        combine, shares = module.combine, module.shares
        if white:
            return Ensemble([*module.members], combine=combine, weights=shares)
        boxes = [shown(one, recipe) for one in module.members]
        return BlackBoxEnsemble(boxes, combine=combine, weights=shares)
    if white:
        return WhiteBoxTeacher(module)
    return BlackBoxTeacher(module, access=recipe.access, budget=recipe.query_budget)
