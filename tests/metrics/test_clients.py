"""Scores of clients: closed forms, and who is counted."""

import math

import pytest
import torch

from vestige.errors import ShapeError
from vestige.metrics.clients import client_scores


@pytest.mark.parametrize("clients", [1, 7, 100])
def test_equal_clients_have_no_spread(clients: int) -> None:
    found = client_scores([0.7] * clients, [5] * clients)
    assert found == pytest.approx({"mean": 0.7, "std": 0.0, "worst_decile": 0.7, "jain": 1.0})


def test_jain_is_one_only_if_all_are_equal() -> None:
    # (1 + r)^2 / (2 (1 + r^2)) = 1 - (1 - r)^2 / (2 (1 + r^2)).
    found = client_scores([1.0, 0.99], [1, 1])["jain"]
    assert found == pytest.approx(1 - 0.01**2 / (2 * (1 + 0.99**2)), abs=1e-12)
    assert found < 1 - 1e-6
    assert client_scores([1.0, 0.0, 0.0, 0.0], [1] * 4)["jain"] == pytest.approx(0.25)
    assert client_scores([0.0, 0.0], [1, 1])["jain"] == 1.0


def test_figures_by_hand() -> None:
    found = client_scores(torch.tensor([0.2, 0.4, 0.9]), torch.tensor([1, 100, 7]))
    assert found["mean"] == pytest.approx(0.5)
    # Sizes do not weigh.
    assert found["std"] == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 3))
    assert found["jain"] == pytest.approx(1.5**2 / (3 * (0.04 + 0.16 + 0.81)))


@pytest.mark.parametrize(
    ("clients", "lowest"), [(1, 1), (9, 1), (10, 1), (11, 2), (20, 2), (25, 3)]
)
def test_the_worst_tenth_is_at_least_one_client(clients: int, lowest: int) -> None:
    order = torch.randperm(clients, generator=torch.Generator().manual_seed(0))
    found = client_scores(order / clients, [1] * clients)["worst_decile"]
    assert found == pytest.approx(sum(range(lowest)) / lowest / clients)


def test_clients_without_test_examples_are_left_out() -> None:
    found = client_scores([0.5, math.nan, 1.0, 0.0], [3, 0, 3, 0])
    assert found == client_scores([0.5, 1.0], [3, 3])
    nobody = client_scores([math.nan, 0.3], [0, 0])
    assert len(nobody) == 4 and all(map(math.isnan, nobody.values()))


@pytest.mark.parametrize(
    ("accuracies", "examples"),
    [([0.5], [1, 2]), ([math.nan], [1]), ([50.0], [1]), ([-0.1], [1]), ([[0.5]], [[1]])],
)
def test_what_is_no_accuracy_is_refused(accuracies: list, examples: list) -> None:
    with pytest.raises(ShapeError, match="expected"):
        client_scores(accuracies, examples)
