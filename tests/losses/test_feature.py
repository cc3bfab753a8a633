import inspect

import numpy as np
import pytest
import torch

from vestige.errors import ShapeError
from vestige.losses.feature import (
    attention_map,
    attention_transfer_loss,
    channel_weights,
    classifier_alignment_loss,
    weighted_feature_loss,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def slow_map(maps: np.ndarray) -> np.ndarray:
    """Of one row (C, H, W), entry by entry."""
    channels, height, width = maps.shape
    found = np.zeros(height * width)
    for y in range(height):
        for x in range(width):
            found[y * width + x] = sum(maps[c, y, x] ** 2 for c in range(channels)) / channels
    return found / np.sqrt((found**2).sum())


def test_attention_agrees_with_its_definition():
    features = draw(3, 4, 2, 5)
    slow = [slow_map(row) for row in features.numpy()]
    np.testing.assert_allclose(attention_map(features).numpy(), slow, rtol=1e-12)


def test_attention_is_where_not_how_strong_or_in_which_channel():
    features = draw(3, 4, 2, 5)
    other = -7 * features[:, [2, 0, 3, 1]]
    torch.testing.assert_close(attention_map(other), attention_map(features))
    # Nor in how many channels.
    torch.testing.assert_close(attention_map(torch.cat([other] * 3, 1)), attention_map(features))


def test_a_dead_layer_looks_nowhere_and_has_a_finite_gradient():
    features = draw(2, 3, 2, 2)
    features[0] = 0
    features.requires_grad_()
    found = attention_map(features)
    assert not found[0].any()
    assert found[1].norm().item() == pytest.approx(1)
    (found * draw(2, 4, seed=1)).sum().backward()
    assert not features.grad[0].any()
    assert features.grad[1].abs().min() > 0


def test_transfer_agrees_with_its_loop_over_layers_and_samples():
    student = [draw(3, 2, 4, 4), draw(3, 5, 2, 3, seed=1)]
    teacher = [draw(3, 6, 4, 4, seed=2), draw(3, 5, 2, 3, seed=3)]
    slow = np.zeros(3)
    for own, other in zip(student, teacher, strict=True):
        for row in range(3):
            difference = slow_map(own[row].numpy()) - slow_map(other[row].numpy())
            slow[row] += (difference**2).mean()
    found = attention_transfer_loss(student, teacher)
    np.testing.assert_allclose(found.numpy(), slow, rtol=1e-12)
    # Its batch mean is what ZSKT's code takes: one mean over everything per layer.
    whole = sum(
        (attention_map(a) - attention_map(b)).square().mean()
        for a, b in zip(student, teacher, strict=True)
    )
    torch.testing.assert_close(found.mean(), whole)


def test_the_teachers_maps_may_be_handed_in_ready():
    student, teacher = ([draw(2, c, n, n, seed=c) for n in (4, 2)] for c in (3, 5))
    ready = [attention_map(one) for one in teacher]
    expected = attention_transfer_loss(student, teacher)
    assert torch.equal(attention_transfer_loss(student, ready), expected)
    with pytest.raises(ShapeError, match=r"got at layer 0 .*\(2, 3, 4, 4\).*\(2, 4\)"):
        attention_transfer_loss(student, ready[::-1])


def test_two_networks_that_look_at_different_places_are_two_apart():
    student, teacher = torch.zeros(1, 2, 2, 3), torch.zeros(1, 4, 2, 3)
    student[0, 1, 0, 0], teacher[0, 2, 1, 2] = 5.0, -0.1
    # Two unit vectors at right angles: squared distance 2, mean over 6 positions, 3 layers.
    found = attention_transfer_loss([student] * 3, [teacher] * 3)
    torch.testing.assert_close(found, torch.tensor([3 * 2 / 6]))


def test_the_same_network_costs_nothing_and_is_left_alone():
    teacher = draw(2, 3, 2, 2)
    student = (2 * teacher).requires_grad_()
    loss = attention_transfer_loss([student], [teacher])
    loss.sum().backward()
    # Rounding of float64.
    assert loss.max() < 1e-30
    assert student.grad.abs().max() < 1e-15


def test_gradient_flows_to_both_networks():
    student, teacher = draw(2, 3, 2, 2).requires_grad_(), draw(2, 2, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: attention_transfer_loss([a], [b]), (student, teacher)
    )
    attention_transfer_loss([student], [teacher]).sum().backward()
    assert student.grad.abs().min() > 0
    assert teacher.grad.abs().min() > 0


def test_layers_that_do_not_pair_are_refused():
    with pytest.raises(ShapeError, match="got features of 1 student and 2 teacher layers"):
        attention_transfer_loss([draw(2, 3, 2, 2)], [draw(2, 3, 2, 2)] * 2)
    with pytest.raises(ShapeError, match="at least 1"):
        attention_transfer_loss([], [])
    first = draw(2, 3, 2, 2)
    with pytest.raises(ShapeError, match=r"got at layer 1 .*\(2, 3, 4, 4\).*equal resolution"):
        attention_transfer_loss([first, draw(2, 3, 4, 4)], [first, draw(2, 3, 2, 2)])


def test_features_that_are_no_maps_are_refused():
    # Unwrapped, because the run-time type check of the test run would speak first.
    with pytest.raises(ShapeError, match=r"got features \(2, 3\), expected maps.*before the pool"):
        inspect.unwrap(attention_map)(draw(2, 3))


def test_channels_weigh_by_the_length_of_their_columns():
    classifier = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])
    # Lengths 5, 0, 1 with mean 2.
    torch.testing.assert_close(channel_weights(classifier), torch.tensor([2.5, 0.0, 0.5]))
    found = channel_weights(draw(7, 12))
    assert found.mean().item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("classifier", [torch.eye(3), -torch.eye(4)[:, [2, 0]], torch.zeros(2, 5)])
def test_channels_with_equal_columns_weigh_the_same(classifier):
    assert torch.equal(channel_weights(classifier), torch.ones(classifier.shape[1]))


def test_features_are_compared_by_direction_with_weighted_channels():
    student, teacher, weights = draw(4, 3), draw(4, 3, seed=1), torch.tensor([0.5, 2.0, 0.0])
    slow = []
    for first, second in zip(student.numpy(), teacher.numpy(), strict=True):
        own, other = (row / np.sqrt((row**2).sum()) for row in (first, second))
        terms = zip(weights.tolist(), own, other, strict=True)
        slow.append(sum((w * (a - b)) ** 2 for w, a, b in terms))
    found = weighted_feature_loss(student, teacher, channels=weights.double())
    np.testing.assert_allclose(found.numpy(), slow, rtol=1e-10)


def test_features_agree_exactly_in_one_direction_and_not_in_the_opposite_one():
    teacher = draw(5, 4)
    lengths = torch.rand(5, 1, dtype=torch.float64) + 0.1
    same = weighted_feature_loss(lengths * teacher, teacher)
    # Unit vectors that round in the last digit.
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-30)
    opposite = weighted_feature_loss(-lengths * teacher, teacher)
    torch.testing.assert_close(opposite, torch.full_like(opposite, 4.0))
    turned = weighted_feature_loss(teacher + 0.1 * draw(5, 4, seed=2), teacher)
    assert (turned > 1e-5).all()


def test_the_teachers_features_and_classifier_get_no_gradient():
    student, teacher = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    bias = draw(3, seed=2).requires_grad_()
    loss = weighted_feature_loss(student, teacher).sum()
    loss = loss + classifier_alignment_loss((student, None), (teacher, bias))
    loss.backward()
    assert student.grad is not None
    assert student.grad.any()
    assert teacher.grad is None
    assert bias.grad is None


def test_classifiers_are_compared_by_the_mean_square_of_weights_and_of_biases():
    own, other = draw(3, 4), draw(3, 4, seed=1)
    bias = torch.tensor([1.0, -2.0, 0.0]).double()
    weights = sum((a - b) ** 2 for a, b in zip(own.flatten(), other.flatten(), strict=True)) / 12
    found = classifier_alignment_loss((own, bias), (other, None))
    assert found.item() == pytest.approx(weights.item() + 5 / 3, rel=1e-12)
    both = classifier_alignment_loss((own, bias), (other, 2 * bias))
    assert both.item() == pytest.approx(found.item(), rel=1e-12)
    assert classifier_alignment_loss((own, bias), (own.clone(), bias.clone())).item() == 0


def test_features_and_classifiers_of_other_shapes_are_refused():
    # Unwrapped, because the run-time type check of the test run would speak first.
    features, classifiers = map(inspect.unwrap, (weighted_feature_loss, classifier_alignment_loss))
    with pytest.raises(ShapeError, match=r"\(2, 3\), teacher features \(2, 4\) and None channel"):
        features(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"and 4 channel weights, expected .* d weights"):
        features(torch.zeros(2, 3), torch.zeros(2, 3), channels=torch.ones(4))
    with pytest.raises(ShapeError, match=r"got weights \(2, 3\) and \(2, 4\)"):
        classifiers((torch.zeros(2, 3), None), (torch.zeros(2, 4), None))
