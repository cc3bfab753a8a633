"""Diversity: exact against loops over pairs, and what it says of pools whose answer is known."""

import math

import pytest
import torch
from torch import Tensor, nn

from vestige.errors import DataError, RecipeError, ShapeError, TeacherError
from vestige.metrics.diversity import (
    Diversity,
    effective_number,
    measure,
    nearest_distance,
    pairwise_distance,
)


def rows(count: int = 23, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.5


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cosine_distance(a: Tensor, b: Tensor) -> float:
    return 1 - float(torch.dot(a, b) / (a.norm() * b.norm()))


class Plain(nn.Module):
    """Features are the input, logits its first three numbers."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(width, 3, bias=False)
        with torch.no_grad():
            self.last.weight.copy_(torch.eye(3, width))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.drop(inputs))


def test_the_mean_over_pairs_is_that_of_a_loop():
    features = rows().double()
    pairs = [
        cosine_distance(features[i], features[j]) for i in range(23) for j in range(23) if i != j
    ]
    # Two float64 routes to one number.
    assert float(pairwise_distance(features)) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


def test_known_sets_have_known_distances():
    same = torch.tensor([[3.0, 4.0]]).repeat(6, 1) * torch.arange(1, 7)[:, None]
    assert float(pairwise_distance(same)) == pytest.approx(0, abs=1e-12)
    assert float(pairwise_distance(torch.eye(7))) == pytest.approx(1, rel=1e-12)
    # The vertices of a simplex: as far apart as N rows can be on average.
    simplex = torch.eye(4, dtype=torch.float64) - 0.25
    assert float(pairwise_distance(simplex)) == pytest.approx(4 / 3, rel=1e-12)
    # A row of zeros is orthogonal to all.
    zero = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    assert float(pairwise_distance(zero)) == pytest.approx(2 / 3, rel=1e-12)


def test_many_nearly_equal_rows_lose_no_digits():
    # 1 - cos is 5e-9 of angle 1e-4; the sum of cosines is 1e8 times as large.
    features = torch.ones(10_000, 2, dtype=torch.float64)
    features[::2, 1] += 2e-4
    angle = math.atan(1 + 2e-4) - math.pi / 4
    apart = 2 * 5000 * 5000 / (10_000 * 9_999) * (1 - math.cos(angle))
    assert float(pairwise_distance(features)) == pytest.approx(apart, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 23, 100])
def test_the_nearest_neighbour_is_that_of_a_loop(chunk):
    features = rows()
    slow = [
        min(cosine_distance(features[i], features[j]) for j in range(23) if j != i)
        for i in range(23)
    ]
    found = nearest_distance(features, chunk=chunk)
    # float32 cosines.
    torch.testing.assert_close(found, torch.tensor(slow), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([5, 0, 0], 1.0), ([4, 4, 4, 4], 4.0), ([1, 1, 0], 2.0), ([3, 1], 4 / 3**0.75)],
)
def test_the_effective_number_of_classes(counts, expected):
    assert effective_number(torch.tensor(counts)) == pytest.approx(expected, rel=1e-12)


def test_a_measure_is_of_all_batches_in_eval_mode():
    inputs = rows(30)
    network = Plain().train()
    network.drop.eval()  # frozen by somebody
    flags = network.training, network.drop.training
    found = measure(network, inputs.split(7), rng(), threshold=0.1)
    assert (network.training, network.drop.training) == flags
    assert not any(layer._forward_pre_hooks for layer in network.modules())
    said = torch.bincount(inputs[:, :3].argmax(1), minlength=3)
    near = nearest_distance(inputs) < 0.1
    assert found == Diversity(
        inputs=30,
        pairwise_distance=pytest.approx(float(pairwise_distance(inputs)), rel=1e-6),
        class_share=1.0,
        effective_classes=pytest.approx(effective_number(said), rel=1e-12),
        repeats=pytest.approx(float(near.float().mean()), rel=1e-6),
        compared=30,
        threshold=0.1,
    )
    assert 0 < found.repeats < 1


def test_features_of_an_image_are_means_over_positions():
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = rows(6, 16).view(6, 1, 4, 4)
    # Positions rearranged are the same feature, and one channel has one direction.
    turned = torch.cat([images, images.flip(2)]).abs()
    assert measure(network, [turned], rng(), layer="0").pairwise_distance == pytest.approx(
        0, abs=1e-12
    )


def test_repeats_are_told_and_what_is_scaled_counts_as_one():
    # A corner of 40 dimensions: angles of 90 degrees unless repeated.
    inputs = torch.eye(40)
    network = Plain(40)
    assert measure(network, [inputs], rng()).repeats == 0
    some = torch.cat([inputs, inputs[:10]])
    assert measure(network, [some], rng()).repeats == pytest.approx(20 / 50)
    assert measure(network, [torch.cat([inputs, 3 * inputs])], rng()).repeats == 1
    # 1 - cos of the angle between e0 and e0 + 0.1 e1 is 0.005.
    close = inputs[:2].clone()
    close[1] = inputs[0] + 0.1 * inputs[1]
    assert measure(network, [close], rng(), threshold=0.006).repeats == 1
    assert measure(network, [close], rng(), threshold=0.004).repeats == 0


def test_only_so_many_are_compared_and_the_seed_says_which():
    inputs = rows(400)
    network = Plain()

    def repeats(seed: int, parts: int = 400) -> float:
        found = measure(network, inputs.split(parts), rng(seed), limit=50, threshold=0.1)
        assert found.compared == 50
        assert found.inputs == 400
        return found.repeats

    assert repeats(0) == repeats(0)
    assert len({repeats(seed) for seed in range(8)}) > 1
    assert 0 < repeats(0, parts=33) < 1
    whole = measure(network, [inputs], rng(), threshold=0.1)
    # Fewer have a near neighbour among fewer.
    assert sum(repeats(seed) for seed in range(8)) / 8 < whole.repeats
    # The mean distance is always of all.
    some = measure(network, [inputs], rng(), limit=2)
    assert some.pairwise_distance == whole.pairwise_distance


def test_every_row_is_compared_as_often_as_any_other():
    # The rows that repeat are the last ones: a sample of the first only would find none.
    inputs = torch.cat([torch.eye(60), torch.eye(60)[-1:].repeat(60, 1)])
    network = Plain(60)
    shares = [measure(network, inputs.split(20), rng(s), limit=30).repeats for s in range(30)]
    # 61 of 120 rows are one: binomial-like with a standard error of 1.6 %.
    assert sum(shares) / 30 == pytest.approx(61 / 120, abs=0.07)


def test_labels_replace_what_the_network_says():
    inputs = rows(12)
    network = Plain()
    found = measure(network, inputs.split(5), rng(), labels=torch.tensor([2] * 12))
    assert found.class_share == pytest.approx(1 / 3)
    assert found.effective_classes == pytest.approx(1.0)
    found = measure(network, inputs.split(5), rng(), labels=torch.arange(12) % 2)
    assert found.class_share == pytest.approx(2 / 3)
    assert found.effective_classes == pytest.approx(2.0)


@pytest.mark.parametrize("labels", [[0] * 11, [3] * 12, [-1] * 12])
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(ShapeError, match="for 12 inputs and 3 classes"):
        measure(Plain(), [rows(12)], rng(), labels=torch.tensor(labels))


@pytest.mark.parametrize("batches", [[], [torch.ones(1, 5)]])
def test_one_input_has_no_diversity(batches):
    with pytest.raises(DataError, match="expected at least two"):
        measure(Plain(), batches, rng(), labels=torch.zeros(0))
    with pytest.raises(DataError, match="expected at least two"):
        nearest_distance(torch.ones(1, 5))


@pytest.mark.parametrize("settings", [{"threshold": 0}, {"threshold": 3}, {"limit": 1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(RecipeError, match="expected a threshold in"):
        measure(Plain(), [rows()], rng(), **settings)


def test_features_that_are_no_numbers_and_unknown_layers_are_refused():
    with pytest.raises(DataError, match="not finite"):
        measure(Plain(), [rows() / 0.0], rng())
    with pytest.raises(TeacherError, match="'last'"):
        measure(Plain(), [rows()], rng(), layer="lost")
