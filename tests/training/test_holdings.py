"""Who holds what: the figures by hand, the order of many clients, and the picture."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vestige.errors import ShapeError
from vestige.training.holdings import (
    checked,
    figures,
    has_room,
    holdings_picture,
    in_groups,
    write_holdings,
)


def test_figures_by_hand() -> None:
    found = figures(checked([[4, 0, 0], [2, 2, 0], [0, 0, 0], [1, 1, 2]]))
    assert [found[key] for key in ("examples", "least", "median", "most", "empty")] == [
        12, 0, 4, 4, 1,
    ]  # fmt: skip
    assert found["classes"] == pytest.approx((1 + 2 + 3) / 3)
    # exp of the entropies 0, ln 2 and 1.5 ln 2.
    assert found["effective_classes"] == pytest.approx((1 + 2 + 2**1.5) / 3)
    assert found["main_share"] == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_clients_without_examples_have_no_mix() -> None:
    found = figures(checked([[0, 0]]))
    assert found["empty"] == 1 and math.isnan(found["main_share"])
    assert in_groups(checked([[0, 0], [0, 0]])).shape == (0, 2)


def test_clients_of_one_main_class_stand_together_and_groups_are_means() -> None:
    table = checked([[0, 8], [6, 2], [1, 3], [0, 0], [9, 0]])
    assert in_groups(table).tolist() == [[1, 0], [0.75, 0.25], [0, 1], [0.25, 0.75]]
    # A client's size has no say in the mean.
    assert in_groups(table, most=2).tolist() == [[0.875, 0.125], [0.125, 0.875]]


def test_grouped_clients_still_show_how_uneven_each_is() -> None:
    # A thousand clients of one class each, in random order: neighbours have the same class.
    rng = np.random.default_rng(0)
    table = np.zeros((1000, 10))
    table[np.arange(1000), rng.permutation(np.arange(1000) % 10)] = 60
    groups = in_groups(table)
    assert groups.shape == (100, 10) and groups.max(1).min() == 1.0
    # In their own order the groups would look nearly even.
    assert np.stack([part.mean(0) for part in np.array_split(table / 60, 100)]).max() < 0.7


@pytest.mark.parametrize(
    "wrong",
    [[], [[]], [1, 2], [[1, -1]], [[1], [1, 2]], [["a"]], [[math.nan]], [[None]], [{}], [[1e300]]],
)
def test_what_is_no_table_of_counts_is_refused(wrong: object) -> None:
    with pytest.raises(ShapeError, match=r"expected \(clients, classes\)"):
        checked(wrong)


@pytest.mark.parametrize(("clients", "classes"), [(3, 2), (40, 100), (300, 10), (60, 300), (50, 1)])
def test_the_picture_is_drawn_for_few_and_for_many(
    tmp_path: Path, clients: int, classes: int
) -> None:
    counts = np.random.default_rng(0).integers(0, 9, (clients, classes))
    # Names are drawn as they are, whatever signs are in them.
    write_holdings(tmp_path, counts, ["$x^", "a" * 200])
    with Image.open(tmp_path / "clients.png") as image:
        assert image.mode == "RGB" and 250 < image.width < 1700 and 200 < image.height < 1300
        # Something is drawn on the white.
        assert (np.asarray(image).min(2) < 200).mean() > 0.005


def test_the_picture_shows_the_counts() -> None:
    few, many = np.eye(4) * 100, np.repeat(np.eye(4) * 100, 30, axis=0)
    assert has_room(few) and not has_room(many)
    for counts in (few, many):
        drawn, turned = (holdings_picture(one, ()) for one in (counts, counts[:, ::-1]))
        assert drawn.dtype == np.uint8 and drawn.shape[2] == 3
        assert np.array_equal(drawn, holdings_picture(counts, ()))
        if counts is few:
            assert not np.array_equal(drawn, turned)
        else:
            # Sorted by their main class, both are the same staircase.
            assert np.array_equal(drawn, turned)
    nobody = holdings_picture(np.zeros((60, 3)), ())
    assert (nobody.min(2) < 200).any()
