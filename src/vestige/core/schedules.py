"""Learning-rate schedules: stateless functions of how far a run is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Share = Annotated[float, Field(ge=0, le=1)]
ScheduleName = Literal["constant", "cosine", "multistep"]


@dataclass(frozen=True)
class Schedule:
    """A factor on the base learning rate as a function of the finished share of a loop.

    Attributes:
        factor: maps a share in [0, 1] to a factor.
        per: "round" sets the rate at round ends; "step" after each step of its optimizer.
        steps: with per="step", number of the optimizer's steps that make up the whole share.
    """

    factor: Callable[[float], float]
    per: Literal["round", "step"] = "round"
    steps: int = 0

    def __post_init__(self) -> None:
        if self.per == "step" and self.steps < 1:
            raise ValueError(f"got steps={self.steps}, expected the number of steps for per='step'")


def cosine(
    floor: float = 0.0, *, per: Literal["round", "step"] = "round", steps: int = 0
) -> Schedule:
    """From 1 to `floor` along half a cosine."""

    def factor(share: float) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    return Schedule(factor, per, steps)


def multistep(
    milestones: tuple[float, ...],
    gamma: float = 0.1,
    *,
    per: Literal["round", "step"] = "round",
    steps: int = 0,
) -> Schedule:
    """Multiply by `gamma` at each of the `milestones`, given as shares in [0, 1]."""

    def factor(share: float) -> float:
        # A share is a quotient of integers; the margin keeps 100 / 500 from missing 0.2.
        return gamma ** sum(share >= milestone - 1e-9 for milestone in milestones)

    return Schedule(factor, per, steps)


def named(
    name: ScheduleName, milestones: tuple[float, ...] = (), *, steps: int = 0
) -> Schedule | None:
    """The schedule that a method's setting names; None keeps the rate constant.

    Args:
        name: of the setting.
        milestones: of "multistep".
        steps: all steps of the optimizer, after each of which the rate is set; 0 sets it at round
            ends.
    """
    if name == "constant":
        return None
    per: Literal["round", "step"] = "step" if steps else "round"
    if name == "cosine":
        return cosine(per=per, steps=steps)
    return multistep(milestones, per=per, steps=steps)
