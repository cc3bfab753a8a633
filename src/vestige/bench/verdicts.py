"""When a claim holds: its rules, and the verdict on the summaries of all arms and seeds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from vestige.recipes.arms import gap_closed
from vestige.recipes.schema import Recipe

SCORE = "student.score"
# A difference of two accuracies on 500 images carries rounding in its last digit.
_ROUNDING = 1e-9


class Strict(BaseModel):
    """Keys that nobody knows are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Statement(Strict):
    """One claim and when it holds: every rule, in every case; there is at least one.

    A run without the number that is measured fails the rules that ask for it.

    Attributes:
        claim: the sentence.
        arm: the arm it speaks of.
        cases: the ones it speaks of; none means all.
        measure: what the arms are compared in: the place of a number in summary.json, for example
            "retention.lost". Without one it is the student's score.
        smaller: whether less of it is better; "above" and "below" then mean better and worse.
        bound: the least that is measured on every seed; with `smaller` the most.
        share_of_teacher: least share of the teacher's score, on every seed.
        points_above: least distance to other arms, in units of what is measured, on every seed.
        times: least multiple of what other arms have, on every seed; not with `smaller`.
        mean_above: like `points_above`, of the means over the seeds.
        not_below: how far the mean may stay behind that of other arms.
        gap_closed: least share of the way from the baseline to the reference arm, on every seed.
    """

    claim: str
    arm: str
    cases: tuple[str, ...] = ()
    measure: str = SCORE
    smaller: bool = False
    bound: float | None = None
    share_of_teacher: float | None = None
    points_above: dict[str, float] = {}
    times: dict[str, float] = {}
    mean_above: dict[str, float] = {}
    not_below: dict[str, float] = {}
    gap_closed: float | None = None

    @property
    def others(self) -> set[str]:
        """The arms that it is compared with by name."""
        return {*self.points_above, *self.times, *self.mean_above, *self.not_below}

    @model_validator(mode="after")
    def _is_a_rule(self) -> Self:
        of_score = self.share_of_teacher is not None or self.gap_closed is not None
        if not of_score and not self.others and self.bound is None:
            raise ValueError(
                "got a claim without a rule, expected one; add points_above or another"
            )
        if of_score and (self.measure != SCORE or self.smaller):
            raise ValueError(
                "got share_of_teacher or gap_closed with another measure or smaller: true, "
                "expected them with the score alone; make two claims"
            )
        if self.times and self.smaller:
            raise ValueError("got times with smaller: true, expected points_above; correct one")
        return self


def measured(summary: Mapping[str, Any], place: str) -> float | None:
    """The number at a dotted place of a summary; None where there is none."""
    found: Any = summary
    for key in place.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    known = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return found if known else None


def judge(
    statement: Statement,
    recipes: Mapping[str, Recipe],
    results: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    *,
    partial: str,
) -> dict[str, str]:
    """The verdict, and which rules fail where.

    Args:
        statement: the claim.
        recipes: of the cases, which name the baseline and the reference arm.
        results: by case and arm the summaries, one per seed.
        partial: why nothing can be judged; "" if it can.

    Returns:
        "claim", "verdict" ("holds", "does not hold", "not shown") and "failures".
    """
    if partial:
        return {"claim": statement.claim, "verdict": "not shown", "failures": partial}
    failures: list[str] = []
    for case, by_arm in results.items():
        if statement.cases and case not in statement.cases:
            continue
        failures += _against_the_ends(statement, case, recipes[case], by_arm)
        failures += _in_the_measure(statement, case, by_arm)
    return {
        "claim": statement.claim,
        "verdict": "does not hold" if failures else "holds",
        "failures": "; ".join(failures),
    }


def _against_the_ends(
    statement: Statement,
    case: str,
    recipe: Recipe,
    by_arm: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Iterator[str]:
    """Which rules fail that hold the score against teacher, baseline and reference."""
    if statement.share_of_teacher is None and statement.gap_closed is None:
        return
    scores = {arm: [s["student"]["score"] for s in runs] for arm, runs in by_arm.items()}
    for index, score in enumerate(scores[statement.arm]):
        where = f"{case}, seed number {index}"
        share = statement.share_of_teacher
        teacher = by_arm[statement.arm][index]["teacher"]["score"]
        if share is not None and score < share * teacher:
            yield f"{where}: {score / teacher:.1%} of the teacher"
        if statement.gap_closed is not None:
            low = scores[str(recipe.baseline)][index]
            closed = gap_closed(score, low, scores[str(recipe.reference)][index])
            if closed is None or closed < statement.gap_closed:
                told = "no gap to close" if closed is None else f"gap closed {closed:.0%}"
                yield f"{where}: {told}"


def _in_the_measure(
    statement: Statement, case: str, by_arm: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[str]:
    """Which rules fail that hold what is measured against a bound or other arms."""
    sign = -1 if statement.smaller else 1
    values: dict[str, list[float]] = {}
    for arm in sorted({statement.arm, *statement.others}):
        found = [measured(summary, statement.measure) for summary in by_arm[arm]]
        if None in found:
            yield f"{case}: {arm} has no {statement.measure} on seed number {found.index(None)}"
        values[arm] = [sign * value for value in found if value is not None]
    if any(len(values[arm]) < len(by_arm[arm]) for arm in values):
        return
    own = values[statement.arm]
    for index, value in enumerate(own):
        if statement.bound is not None and value < sign * statement.bound - _ROUNDING:
            yield f"{case}, seed number {index}: {statement.measure} {sign * value:.3g}"
    for other, least in statement.points_above.items():
        for index, (value, beside) in enumerate(zip(own, values[other], strict=True)):
            if value - beside < least - _ROUNDING:
                told = _distance(value - beside, statement)
                yield f"{case}, seed number {index}: {told} {other}"
    for other, least in statement.times.items():
        for index, (value, beside) in enumerate(zip(own, values[other], strict=True)):
            if value < least * beside - _ROUNDING:
                told = f"{value:.3g} is {value / beside:.1f} times {other}"
                yield f"{case}, seed number {index}: {told}"
    for other, least in [
        *statement.mean_above.items(),
        *((other, -margin) for other, margin in statement.not_below.items()),
    ]:
        distance = fmean(own) - fmean(values[other])
        if distance < least - _ROUNDING:
            yield f"{case}, mean: {_distance(distance, statement)} {other}"


def _distance(better: float, statement: Statement) -> str:
    """How much better, or worse if below 0, in words that an arm's name follows."""
    if statement.measure == SCORE and not statement.smaller:
        return f"{100 * better:.1f} points above"
    return f"{statement.measure} {better:.3g} {'below' if statement.smaller else 'above'}"
