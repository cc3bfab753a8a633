import math

import numpy as np
import pytest
import torch

from vestige.core.filtering import Filtered, FiltersItems, Item, Rule, area_under_curve
from vestige.core.filtering import check_any_kept as check
from vestige.errors import DataError

NAN = math.nan


def test_a_threshold_keeps_what_reaches_it_or_stays_below():
    scores = torch.tensor([0.2, 0.5, 0.7, NAN, math.inf, -math.inf])
    high = [False, True, True, False, True, False]
    assert Rule("high", threshold=0.5).kept(scores).tolist() == high
    low = [True, False, False, False, False, True]
    assert Rule("low", threshold=0.5).kept(scores).tolist() == low


def test_a_share_keeps_the_best_rounded_up():
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    assert Rule("high", keep_fraction=0.5).kept(scores).tolist() == [True, False, False, True, True]
    assert Rule("low", keep_fraction=0.21).kept(scores).tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(("share", "count", "kept"), [(0.1, 30, 3), (0.7, 10, 7), (0.3, 10, 3)])
def test_a_share_is_not_rounded_up_by_what_floats_cannot_hold(share, count, kept):
    assert math.ceil(share * count) >= kept
    assert int(Rule("high", keep_fraction=share).kept(torch.rand(count)).sum()) == kept


def test_a_smaller_share_keeps_a_part_of_what_a_larger_one_keeps():
    scores = torch.randint(4, (50,)).float()
    scores[::9] = NAN
    for better in ("high", "low"):
        before = torch.zeros(50, dtype=torch.bool)
        for share in np.linspace(0.02, 1, 40):
            kept = Rule(better, keep_fraction=float(share)).kept(scores)
            assert not (before & ~kept).any()
            before = kept
        assert torch.equal(before, ~scores.isnan())


def test_of_equal_scores_the_first_are_kept():
    rule = Rule("high", keep_fraction=0.5)
    assert rule.kept(torch.ones(4)).tolist() == [True, True, False, False]


def test_infinite_scores_are_told_from_none():
    scores = torch.tensor([NAN, math.inf, NAN, -math.inf])
    assert Rule("low", keep_fraction=1).kept(scores).tolist() == [False, True, False, True]
    # What has no score counts in N and takes no place of what has one.
    assert Rule("low", keep_fraction=0.5).kept(scores).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"threshold": 1.0, "keep_fraction": 0.5},
        {"keep_fraction": 0.0},
        {"keep_fraction": 1.1},
        {"keep_fraction": NAN},
    ],
)
def test_rules_that_mean_nothing_are_refused(args):
    with pytest.raises(DataError, match="expected"):
        Rule("high", **args)


def slow_area(scores, good, better):
    """The chance over all pairs, counted."""
    sign = 1 if better == "high" else -1
    value = [-math.inf if math.isnan(one) else sign * one for one in scores]
    pairs = [
        1.0 if value[i] > value[j] else 0.5 if value[i] == value[j] else 0.0
        for i in range(len(good))
        for j in range(len(good))
        if good[i] and not good[j]
    ]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("better", ["high", "low"])
def test_the_area_is_the_share_of_pairs_in_order(better):
    for seed in range(10):
        rng = torch.Generator().manual_seed(seed)
        scores = torch.randint(8, (40,), generator=rng).float()
        scores[torch.rand(40, generator=rng) < 0.1] = NAN
        good = torch.rand(40, generator=rng) < 0.4
        found = area_under_curve(scores, good, better)
        assert found == pytest.approx(slow_area(scores.tolist(), good.tolist(), better), abs=1e-12)


def test_the_area_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="a second opinion")
    scores, good = torch.rand(200).round(decimals=1), torch.rand(200) < 0.3
    expected = metrics.roc_auc_score(good.numpy(), scores.numpy())
    assert area_under_curve(scores, good, "high") == pytest.approx(expected, abs=1e-12)


def test_the_area_at_its_ends():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    good = torch.tensor([False, False, True, True])
    assert area_under_curve(scores, good, "high") == 1
    assert area_under_curve(scores, good, "low") == 0
    assert area_under_curve(torch.zeros(4), good, "high") == 0.5
    assert area_under_curve(scores, torch.ones(4, dtype=torch.bool), "high") is None
    assert area_under_curve(scores, torch.zeros(4, dtype=torch.bool), "high") is None


def test_something_must_be_left():
    check({"kept": 1, "short": 3}, "texts")
    with pytest.raises(DataError, match=r"got no texts .* all of 1,300 .*short 1,000, long 300"):
        check({"kept": 0, "short": 1000, "long": 300}, "texts")
    with pytest.raises(DataError, match="there were none"):
        check({}, "texts")


def test_a_method_that_filters_is_known_by_what_it_offers():
    class Method:
        def filtered(self):
            return {"": Filtered([Item("a", True)], {"kept": 1})}

    assert isinstance(Method(), FiltersItems)
    assert not isinstance(object(), FiltersItems)
