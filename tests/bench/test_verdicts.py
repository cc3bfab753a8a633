"""Verdicts by fixed rules: each rule on every seed or on the means, in whatever is measured."""

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from vestige.bench.verdicts import Statement, measured
from vestige.bench.verdicts import judge as judged


def results(**arms: list[float]) -> dict[str, Any]:
    """One case; the teacher scores 0.9."""
    return {
        "case": {
            name: [{"student": {"score": s}, "teacher": {"score": 0.9}} for s in scores]
            for name, scores in arms.items()
        }
    }


RECIPES = {"case": SimpleNamespace(baseline="noise", reference="real")}


def judge(statement: Statement, found: dict[str, Any], *, partial: str = "") -> tuple[str, str]:
    told = judged(statement, RECIPES, found, partial=partial)
    assert told["claim"] == statement.claim
    return told["verdict"], told["failures"]


def test_a_claim_holds_if_every_rule_holds_on_every_seed():
    statement = Statement(
        claim="c", arm="a", share_of_teacher=0.5, points_above={"noise": 0.1}, gap_closed=0.5
    )
    found = results(a=[0.6, 0.7], noise=[0.4, 0.5], real=[0.7, 0.7])
    assert judge(statement, found) == ("holds", "")
    assert judge(statement, found, partial="not all arms ran") == ("not shown", "not all arms ran")


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"share_of_teacher": 0.75}, "case, seed number 1: 66.7% of the teacher"),
        ({"points_above": {"noise": 0.25}}, "case, seed number 1: 20.0 points above noise"),
        ({"points_above": {"real": 0.0}}, "case, seed number 1: -10.0 points above real"),
        ({"gap_closed": 0.8}, "case, seed number 1: gap closed 67%"),
    ],
)
def test_one_seed_that_fails_one_rule_is_enough_and_is_told(rules, told):
    found = results(a=[0.8, 0.6], noise=[0.2, 0.4], real=[0.7, 0.7])
    assert judge(Statement(claim="c", arm="a", **rules), found) == ("does not hold", told)


def test_every_failure_is_told():
    statement = Statement(claim="c", arm="a", share_of_teacher=1.0, points_above={"noise": 0.5})
    verdict, failures = judge(statement, results(a=[0.5, 0.5], noise=[0.1, 0.4]))
    assert verdict == "does not hold"
    assert failures.split("; ") == [
        "case, seed number 0: 55.6% of the teacher",
        "case, seed number 1: 55.6% of the teacher",
        "case, seed number 0: 40.0 points above noise",
        "case, seed number 1: 10.0 points above noise",
    ]


def test_a_gap_that_is_not_there_is_not_closed():
    statement = Statement(claim="c", arm="a", gap_closed=0.1)
    found = results(a=[0.9], noise=[0.8], real=[0.8])
    assert judge(statement, found) == ("does not hold", "case, seed number 0: no gap to close")
    found = results(a=[0.2], noise=[0.2], real=[0.8])
    assert judge(statement, found) == ("does not hold", "case, seed number 0: gap closed 0%")


def test_a_threshold_that_is_met_exactly_holds_in_spite_of_rounding():
    # 0.7 - 0.5 is a little less than 0.2 in floating point.
    assert 0.7 - 0.5 < 0.2
    statement = Statement(claim="c", arm="a", points_above={"noise": 0.2})
    assert judge(statement, results(a=[0.7], noise=[0.5]))[0] == "holds"
    assert judge(statement, results(a=[0.698], noise=[0.5]))[0] == "does not hold"


def test_every_case_must_hold():
    found = results(a=[0.9], noise=[0.1])
    found["other"] = results(a=[0.2], noise=[0.1])["case"]
    recipes = {**RECIPES, "other": RECIPES["case"]}
    told = judged(
        Statement(claim="c", arm="a", points_above={"noise": 0.5}), recipes, found, partial=""
    )
    assert told["verdict"] == "does not hold"
    assert told["failures"] == "other, seed number 0: 10.0 points above noise"


# Means and other measures


def test_means_are_compared_where_single_seeds_may_lose():
    found = results(a=[0.5, 0.9], b=[0.6, 0.6], noise=[0.2, 0.2], real=[0.9, 0.9])
    assert judge(Statement(claim="c", arm="a", mean_above={"b": 0.1}), found)[0] == "holds"
    verdict = judge(Statement(claim="c", arm="a", mean_above={"b": 0.11}), found)
    assert verdict == ("does not hold", "case, mean: 10.0 points above b")
    # On every seed it is not so.
    assert judge(Statement(claim="c", arm="a", points_above={"b": 0}), found)[0] == "does not hold"


def test_not_below_allows_a_margin_and_no_more():
    found = results(a=[0.60, 0.62], b=[0.63, 0.63])
    assert judge(Statement(claim="c", arm="a", not_below={"b": 0.02}), found)[0] == "holds"
    verdict = judge(Statement(claim="c", arm="a", not_below={"b": 0.019}), found)
    assert verdict == ("does not hold", "case, mean: -2.0 points above b")
    # Being above is not being below.
    assert judge(Statement(claim="c", arm="b", not_below={"a": 0}), found)[0] == "holds"


def forgetful(**arms: list[float | None]) -> dict[str, Any]:
    """What each run lost; None for one that was too short to tell."""
    found = results(**{name: [0.5] * len(lost) for name, lost in arms.items()})
    for name, lost in arms.items():
        for summary, value in zip(found["case"][name], lost, strict=True):
            summary["retention"] = None if value is None else {"lost": value}
    return found


def test_another_number_of_the_summary_is_measured_and_less_may_be_better():
    found = forgetful(retain=[0.1, 0.2], plain=[0.4, 0.5])
    lost = {"claim": "c", "measure": "retention.lost", "smaller": True}
    assert judge(Statement(arm="retain", points_above={"plain": 0.3}, **lost), found)[0] == "holds"
    assert judge(Statement(arm="retain", not_below={"plain": 0}, **lost), found)[0] == "holds"
    verdict = judge(Statement(arm="plain", mean_above={"retain": 0}, **lost), found)
    assert verdict == ("does not hold", "case, mean: retention.lost -0.3 below retain")
    # The other way round more would be better.
    more = {**lost, "smaller": False}
    assert judge(Statement(arm="plain", mean_above={"retain": 0.3}, **more), found)[0] == "holds"


@pytest.mark.parametrize(
    ("smaller", "bound", "told"),
    [
        (True, 0.2, ""),
        (True, 0.15, "case, seed number 1: retention.lost 0.2"),
        (False, 0.1, ""),
        (False, 0.15, "case, seed number 0: retention.lost 0.1"),
    ],
)
def test_a_bound_is_the_least_or_the_most_on_every_seed(smaller, bound, told):
    statement = Statement(
        claim="c", arm="a", measure="retention.lost", smaller=smaller, bound=bound
    )
    verdict = "does not hold" if told else "holds"
    assert judge(statement, forgetful(a=[0.1, 0.2])) == (verdict, told)


def test_a_run_that_does_not_tell_the_number_shows_nothing_in_favour():
    found = forgetful(retain=[0.1, None], plain=[0.4, 0.5])
    statement = Statement(
        claim="c",
        arm="retain",
        measure="retention.lost",
        smaller=True,
        points_above={"plain": 0},
        mean_above={"plain": 0},
    )
    told = "case: retain has no retention.lost on seed number 1"
    assert judge(statement, found) == ("does not hold", told)


def test_arms_without_a_student_are_held_against_each_other_all_the_same():
    runs = {"a": [{"student": None, "diversity": {"distance": 2.0}}], "b": [{"student": None}]}
    runs["b"][0]["diversity"] = {"distance": 1.5}
    statement = Statement(claim="c", arm="a", measure="diversity.distance", points_above={"b": 0.5})
    assert judge(statement, {"case": runs}) == ("holds", "")
    of_score = Statement(claim="c", arm="a", points_above={"b": 0.5})
    assert judge(of_score, {"case": runs})[0] == "does not hold"


@pytest.mark.parametrize(
    ("summary", "value"),
    [
        ({"a": {"b": 2}}, 2),
        ({"a": {"b": 0.0}}, 0.0),
        ({"a": {"b": True}}, None),
        ({"a": {"b": "2"}}, None),
        ({"a": {"b": float("nan")}}, None),
        ({"a": {"b": {"c": 1}}}, None),
        ({"a": None}, None),
        ({"a": 3}, None),
        ({}, None),
    ],
)
def test_only_a_number_at_its_place_is_one(summary, value):
    assert measured(summary, "a.b") == value


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({}, "got a claim without a rule"),
        ({"share_of_teacher": 0.5, "measure": "retention.lost"}, "the score alone"),
        ({"gap_closed": 0.5, "smaller": True}, "the score alone"),
        ({"points_over": {"b": 1}}, "Extra inputs"),
    ],
)
def test_a_claim_that_would_hold_by_itself_is_refused(rules, told):
    with pytest.raises(ValidationError, match=told):
        Statement(claim="c", arm="a", **rules)


def test_several_times_another_arm():
    found = results(a=[0.5, 0.2], b=[0.1, 0.05])
    assert judge(Statement(claim="c", arm="a", times={"b": 4}), found) == ("holds", "")
    told = "case, seed number 1: 0.2 is 4.0 times b"
    assert judge(Statement(claim="c", arm="a", times={"b": 5}), found) == ("does not hold", told)
    with pytest.raises(ValueError, match="got times with smaller"):
        Statement(claim="c", arm="a", times={"b": 5}, smaller=True)
