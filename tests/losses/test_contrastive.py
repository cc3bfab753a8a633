import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vestige.errors import RecipeError, ShapeError
from vestige.losses.contrastive import info_nce, nt_xent


def draw(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows of length 1."""
    rng = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=rng, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_orthonormal_rows_cost_what_cmi_says(temperature):
    # cmi: e_i = log(1 + (B - 1) exp(-1 / tau)).
    rows = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    expected = math.log(1 + 6 * math.exp(-1 / temperature))
    found = info_nce(rows, rows, temperature=temperature)
    torch.testing.assert_close(found, torch.full((7,), expected, dtype=torch.float64))


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 8)])
def test_identical_rows_cost_the_logarithm_of_the_number_of_keys(queries, keys):
    row = draw(1, 4)
    found = info_nce(row.repeat(queries, 1), row.repeat(keys, 1), temperature=0.1)
    torch.testing.assert_close(found, torch.full((queries,), math.log(keys)).double())


def test_it_agrees_with_the_sum_of_its_definition():
    queries, keys = 2 * draw(3, 5), 3 * draw(6, 5, seed=1)
    slow = []
    for index, query in enumerate(queries.tolist()):
        weights = [
            math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / 0.7)
            for key in keys.tolist()
        ]
        slow.append(-math.log(weights[index] / sum(weights)))
    found = info_nce(queries, keys, temperature=0.7)
    np.testing.assert_allclose(found.numpy(), slow, rtol=1e-10)


def test_a_further_key_only_adds_to_the_cost():
    queries, keys = draw(4, 5), draw(9, 5, seed=1)
    costs = [info_nce(queries, keys[:count], temperature=0.2) for count in range(4, 10)]
    assert all((more > less).all() for less, more in itertools.pairwise(costs))


def test_the_first_rows_alone_move_the_queries_as_the_full_comparison_does():
    # cmi: the B-row form has the gradient of the (B + N')^2 form on what was made anew.
    new, old, keys = draw(4, 6).requires_grad_(), draw(9, 6, seed=1), draw(13, 6, seed=2)
    (fast,) = torch.autograd.grad(info_nce(new, keys, temperature=0.1).mean(), new)
    every = torch.cat([new, old]) @ keys.t() / 0.1
    each = F.cross_entropy(every, torch.arange(13), reduction="none")
    (full,) = torch.autograd.grad(each[:4].mean() + each[4:].mean(), new)
    assert fast.abs().max() > 1e-3
    torch.testing.assert_close(fast, full, rtol=1e-6, atol=1e-12)


def test_gradient_flows_to_both_sides_unless_they_are_constants():
    queries, keys = draw(3, 4).requires_grad_(), draw(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: info_nce(q, k, temperature=0.5), (queries, keys))
    info_nce(queries, keys.detach(), temperature=0.5).sum().backward()
    assert queries.grad.abs().amax(1).min() > 0
    assert keys.grad is None
    info_nce(queries.detach(), keys, temperature=0.5).sum().backward()
    # Also the keys of nobody are pushed away.
    assert keys.grad.abs().amax(1).min() > 0


def test_descent_brings_a_query_to_its_own_key_and_away_from_the_others():
    queries, keys = draw(3, 4).requires_grad_(), draw(5, 4, seed=1)
    (slope,) = torch.autograd.grad(info_nce(queries, keys, temperature=0.5).sum(), queries)
    change = -slope @ keys.t()
    others = change.masked_fill(torch.eye(3, 5, dtype=torch.bool), -math.inf)
    assert (change.diagonal() > others.amax(1)).all()


def test_rows_are_compared_as_they_are():
    queries, keys = draw(3, 4), draw(5, 4, seed=1)
    torch.testing.assert_close(
        info_nce(10 * queries, keys, temperature=1.0), info_nce(queries, keys, temperature=0.1)
    )


def test_far_apart_rows_stay_finite():
    rows = 1e3 * torch.eye(3, requires_grad=True)
    swapped = rows[[1, 2, 0]]
    cost = info_nce(rows, swapped, temperature=0.1)
    (slope,) = torch.autograd.grad(cost.sum(), rows)
    torch.testing.assert_close(cost, torch.full((3,), 1e7))
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(RecipeError, match=r"got temperature .*expected a value above 0"):
        info_nce(draw(2, 3), draw(2, 3), temperature=temperature)


@pytest.mark.parametrize(
    ("queries", "keys", "message"),
    [
        ((4, 3), (3, 3), r"got 4 queries and 3 keys, expected at least as many"),
        ((4, 3), (4, 2), r"\(4, 3\) and keys \(4, 2\), expected \(B, d\).*project both"),
        ((4, 3, 1), (4, 3, 1), r"\(4, 3, 1\).*expected \(B, d\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(queries, keys, message):
    # Unwrapped, because the run-time type check of the test run would speak first.
    with pytest.raises(ShapeError, match=message):
        inspect.unwrap(info_nce)(torch.zeros(queries), torch.zeros(keys), temperature=0.1)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_equal_views_cost_the_logarithm_of_the_number_of_other_rows(rows):
    view = draw(1, 4).repeat(rows, 1)
    found = nt_xent(view, view, temperature=0.5)
    torch.testing.assert_close(found, torch.full((rows,), math.log(2 * rows - 1)).double())


def test_two_inputs_cost_what_is_computed_by_hand():
    # Each row meets its other view at similarity 1 and both views of the other input at 0.
    eye = torch.eye(2, dtype=torch.float64)
    by_hand = math.log(1 + 2 * math.exp(-1 / 0.5))
    torch.testing.assert_close(
        nt_xent(eye, eye, temperature=0.5), torch.full((2,), by_hand).double()
    )


def test_it_agrees_with_a_loop_over_all_views():
    first, second = draw(4, 5), draw(4, 5, seed=1)
    every = torch.cat([first, second])
    slow = []
    for index in range(8):
        other = (index + 4) % 8
        weights = {
            key: math.exp(float(every[index] @ every[key]) / 0.7)
            for key in range(8)
            if key != index
        }
        slow.append(-math.log(weights[other] / sum(weights.values())))
    found = nt_xent(first, second, temperature=0.7)
    means = [(slow[row] + slow[row + 4]) / 2 for row in range(4)]
    np.testing.assert_allclose(found.numpy(), means, rtol=1e-10)


def test_further_keys_are_negatives_and_rows_of_their_own_may_be_asked_apart():
    first, second = draw(6, 5), draw(6, 5, seed=1)
    whole = nt_xent(first, second, temperature=0.3)
    # Of another process: its own rows come first among the keys.
    order = [4, 5, 0, 1, 2, 3]
    part = nt_xent(first[4:], second[4:], temperature=0.3, keys=(first[order], second[order]))
    torch.testing.assert_close(part, whole[4:])


def test_inputs_that_are_the_same_are_no_negatives_of_each_other():
    first, second = draw(4, 5), draw(4, 5, seed=1)
    same = torch.zeros(4, 4, dtype=torch.bool)
    same[:2, :2] = True  # rows 0 and 1, each also with itself, which changes nothing
    found = nt_xent(first, second, temperature=0.5, same=same)
    rest = [0, 2, 3]
    without = nt_xent(first[rest], second[rest], temperature=0.5)
    torch.testing.assert_close(found[0], without[0])
    torch.testing.assert_close(found[2:], nt_xent(first, second, temperature=0.5)[2:])
    alone = nt_xent(first, second, temperature=0.5, same=torch.ones_like(same))
    torch.testing.assert_close(alone, torch.zeros(4).double())


def test_views_that_do_not_fit_are_refused():
    ask = inspect.unwrap(nt_xent)
    with pytest.raises(RecipeError, match="got temperature 0"):
        ask(draw(2, 3), draw(2, 3), temperature=0)
    for first, second, further in (
        (draw(2, 3), draw(3, 3), {}),
        (draw(2, 3), draw(2, 3), {"keys": (draw(1, 3), draw(1, 3))}),
        (draw(2, 3), draw(2, 3), {"same": torch.ones(2, 3, dtype=torch.bool)}),
    ):
        with pytest.raises(ShapeError, match=r"expected \(B, d\) twice, \(N, d\) twice"):
            ask(first, second, temperature=1.0, **further)
