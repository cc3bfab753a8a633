"""How many updates of its student a method makes, and settings with which it makes as many."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from vestige.recipes.catalog import METHODS

# What is turned first, where a method has it; then whatever else its updates are proportional to.
_FIRST = ("iterations", "student_steps")
# The number of rounds may become so many times larger or smaller to make the updates equal.
_REACH = 2.0


def student_updates(name: str, config: Mapping[str, Any]) -> float | None:
    """Updates of the student in a whole run; None where the method does not tell by its settings.

    Args:
        name: of the method.
        config: its settings.
    """
    method = METHODS.get(name)
    try:
        cfg = method.Config.model_validate(dict(config))
        # `passes` is a function of the settings; nothing has been built that could be asked.
        per_round = method.passes(object.__new__(method), cfg).get("student_step")
        # Where `rounds` are of another loop than the student's.
        rounds = int(getattr(cfg, "student_rounds", cfg.rounds))
        return None if per_round is None else float(per_round) * rounds
    except (ValidationError, AttributeError, TypeError):
        return None


def with_updates(name: str, config: Mapping[str, Any], wanted: float | None) -> dict[str, Any]:
    """`config` with as many updates of the student as wanted, as near as whole numbers come.

    Turned is `iterations`, else `student_steps`, else the first whole number that the updates are
    proportional to; and `rounds`, by at most a factor of two, only if that makes them equal, or if
    there is nothing else. What they follow from is written out, so that no other layer changes it.

    Args:
        name: of the method.
        config: its settings.
        wanted: updates; None or 0 leaves the settings as they are.
    """
    have = student_updates(name, config)
    if not have or not wanted:
        return dict(config)
    values = METHODS.get(name).Config.model_validate(dict(config)).model_dump()
    knobs = _knobs(name, config, values, have)
    fixed = {**config, **{key: values[key] for key in knobs}}
    if have == wanted or not knobs:
        return fixed
    tried = list(_turned(fixed, knobs, wanted / have))
    exact = (one for one in tried if student_updates(name, one) == wanted)
    return next(exact, tried[0])


def _knobs(
    name: str, config: Mapping[str, Any], values: Mapping[str, Any], have: float
) -> list[str]:
    """Whole numbers that the updates are proportional to, the one to turn first; rounds last."""

    def moves(key: str) -> bool:
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return False
        # One of the two may lie beyond a limit of the setting.
        told = {other: student_updates(name, {**config, key: other}) for other in (2 * value, 1)}
        known = {other: count for other, count in told.items() if count is not None}
        proportional = all(math.isclose(n, have * other / value) for other, n in known.items())
        return proportional and known.keys() != {value} and bool(known)

    order = [*(key for key in _FIRST if key in values), *(key for key in values if key != "rounds")]
    return [key for key in dict.fromkeys([*order, "rounds"]) if moves(key)]


def _turned(config: Mapping[str, Any], knobs: list[str], factor: float) -> Iterator[dict[str, Any]]:
    """Settings with `factor` times the updates, or about that; first the one to fall back on."""
    knob = knobs[0]
    now = config[knob]
    yield {**config, knob: max(1, round(now * factor))}
    if knob == "rounds" or "rounds" not in knobs:
        return
    rounds = config["rounds"]
    total = round(now * rounds * factor)
    near = range(max(1, math.ceil(rounds / _REACH)), math.floor(rounds * _REACH) + 1)
    whole = [r for r in near if total % r == 0]
    for r in sorted(whole, key=lambda r: abs(math.log(r / rounds))):
        yield {**config, "rounds": r, knob: total // r}
