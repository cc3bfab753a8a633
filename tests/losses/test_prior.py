import inspect
import math

import numpy as np
import pytest
import torch

from vestige.errors import RecipeError, ShapeError
from vestige.losses.prior import (
    activation_loss,
    class_balance_loss,
    entropy_loss,
    one_hot_loss,
    total_variation,
)


def draw(*shape: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return 2 * torch.randn(*shape, generator=rng, dtype=torch.float64)


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def test_one_hot_is_the_negative_log_of_the_largest_probability():
    logits = draw(6, 5)
    slow = [-math.log(softmax(row).max()) for row in logits.numpy()]
    np.testing.assert_allclose(one_hot_loss(logits).numpy(), slow, rtol=1e-12)


def test_one_hot_runs_from_zero_to_log_k():
    assert one_hot_loss(torch.tensor([[80.0, 0.0, 0.0]])).item() == 0
    assert one_hot_loss(torch.zeros(1, 3)).item() == pytest.approx(math.log(3))


def test_one_hot_descent_raises_the_class_that_leads():
    logits = draw(6, 5).requires_grad_()
    one_hot_loss(logits).sum().backward()
    probs = logits.detach().softmax(1)
    expected = probs - torch.nn.functional.one_hot(probs.argmax(1), 5)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("base", [math.e, 10.0])
def test_class_balance_is_lowest_when_classes_take_turns(base):
    turns = 60 * torch.eye(4, dtype=torch.float64)
    one_class = turns[:1].repeat(4, 1)
    lowest = class_balance_loss(turns, base=base).item()
    assert lowest == pytest.approx(-math.log(4, base), rel=1e-12)
    assert class_balance_loss(one_class, base=base).item() == pytest.approx(0, abs=1e-12)
    assert lowest < class_balance_loss(draw(9, 4), base=base).item() < 0


def test_class_balance_agrees_with_its_sum():
    logits = draw(6, 5)
    mean = np.mean([softmax(row) for row in logits.numpy()], axis=0)
    slow = sum(p * math.log(p) for p in mean)
    assert class_balance_loss(logits).item() == pytest.approx(slow, rel=1e-12)


def test_class_balance_is_about_the_batch_not_the_sample():
    # Each sample is sure of one class, so a mean of per-sample entropies would be 0.
    sure = torch.tensor([[60.0, 0.0], [0.0, 60.0]])
    assert class_balance_loss(sure).item() == pytest.approx(-math.log(2))


def test_class_balance_has_a_finite_gradient_where_a_class_underflows():
    logits = torch.tensor([[0.0, 1.0, -1e4], [3.0, 1.0, -1e4]], requires_grad=True)
    loss = class_balance_loss(logits)
    loss.backward()
    assert (logits.detach().softmax(1)[:, 2] == 0).all()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[:, :2].abs().min() > 1e-3


def test_dense_logits_are_a_batch_of_positions():
    dense = draw(3, 4, 2, 5)
    rows = dense.movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(class_balance_loss(dense), class_balance_loss(rows))
    torch.testing.assert_close(one_hot_loss(dense), one_hot_loss(rows).reshape(3, 10).mean(1))


def test_activation_is_the_negative_mean_of_sizes():
    features = torch.tensor([[1.0, -3.0], [0.0, 5.0]], requires_grad=True)
    loss = activation_loss(features)
    assert loss.tolist() == [-2.0, -2.5]
    loss.sum().backward()
    assert features.grad.tolist() == [[-0.5, 0.5], [0.0, -0.5]]
    maps = features.detach().reshape(2, 1, 2, 1)
    assert torch.equal(activation_loss(maps), loss)


@pytest.mark.parametrize("loss", [one_hot_loss, class_balance_loss, activation_loss])
def test_gradients_are_those_of_the_value(loss):
    assert torch.autograd.gradcheck(loss, (draw(3, 4, 2).requires_grad_(),))


def test_a_base_that_is_no_base_is_refused():
    with pytest.raises(RecipeError, match="got base 1"):
        class_balance_loss(draw(2, 3), base=1.0)


def test_one_hot_of_given_labels_is_their_negative_log_probability():
    logits, labels = draw(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    slow = [-math.log(softmax(row)[k]) for row, k in zip(logits.numpy(), labels, strict=True)]
    np.testing.assert_allclose(one_hot_loss(logits, labels).numpy(), slow, rtol=1e-12)
    assert torch.equal(one_hot_loss(logits, logits.argmax(1)), one_hot_loss(logits))


def test_total_variation_of_four_pixels_by_hand():
    image = torch.tensor([[[[1.0, 4.0], [5.0, 7.0]]]])
    # Differences: right -3 and -2, down -4 and -3, to the lower right -6, to the upper right 1.
    assert total_variation(image, form="l1").item() == pytest.approx(2.5 + 3.5 + 6 + 1)
    norms = math.sqrt(13) + math.sqrt(25) + 6 + 1
    assert total_variation(image).item() == pytest.approx(norms)


def slow_variation(images: np.ndarray, form: str) -> float:
    """Pixel by pixel: to the right, below, to the lower right and to the upper right."""
    height, width = images.shape[2:]
    total = 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (-1, 1)):
        found = [
            image[:, y, x] - image[:, y + down, x + right]
            for image in images
            for y in range(height)
            for x in range(width)
            if 0 <= y + down < height and 0 <= x + right < width
        ]
        total += np.abs(found).mean() if form == "l1" else np.sqrt(np.square(found).sum())
    return total


@pytest.mark.parametrize("form", ["l1", "l2"])
def test_total_variation_agrees_with_its_loop(form):
    images = draw(3, 2, 4, 5)
    slow = slow_variation(images.numpy(), form)
    assert total_variation(images, form=form).item() == pytest.approx(slow, rel=1e-12)


def test_one_form_of_total_variation_grows_with_the_batch_and_the_other_does_not():
    images = draw(2, 1, 3, 3)
    four = images.repeat(4, 1, 1, 1)
    l1, l2 = (total_variation(images, form=form) for form in ("l1", "l2"))
    torch.testing.assert_close(total_variation(four, form="l1"), l1)
    torch.testing.assert_close(total_variation(four, form="l2"), 2 * l2)


@pytest.mark.parametrize("form", ["l1", "l2"])
def test_images_of_one_colour_have_no_variation_and_no_gradient(form):
    images = (
        torch.ones(2, 3, 4, 4) * torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    ).requires_grad_()
    loss = total_variation(images, form=form)
    loss.backward()
    assert loss == 0
    assert not images.grad.any()


@pytest.mark.parametrize("form", ["l1", "l2"])
def test_total_variation_has_the_gradient_of_its_value_and_an_even_image_in_between(form):
    images = draw(3, 1, 3, 3)
    assert torch.autograd.gradcheck(
        lambda values: total_variation(values, form=form), (images.requires_grad_(),)
    )
    flat = torch.cat([images.detach(), torch.zeros(1, 1, 3, 3).double()]).requires_grad_()
    total_variation(flat, form=form).backward()
    assert flat.grad[:3].abs().sum() > 0
    assert not flat.grad[3].any()


def test_images_without_neighbours_and_unknown_forms_are_refused():
    for shape in ((2, 1, 1, 5), (2, 1, 5, 1), (2, 5, 5)):
        # Unwrapped, because the run-time type check of the test run would speak first.
        with pytest.raises(ShapeError, match=r"expected .* at least 2 x 2 pixels"):
            inspect.unwrap(total_variation)(torch.zeros(shape))
    with pytest.raises(RecipeError, match="got form 'tv', expected 'l1' or 'l2'"):
        total_variation(torch.zeros(1, 1, 2, 2), form="tv")


def test_entropy_runs_from_zero_to_log_k():
    assert entropy_loss(torch.tensor([[200.0, 0.0, 0.0]])).item() == 0
    assert entropy_loss(torch.zeros(1, 3)).item() == pytest.approx(math.log(3))


def test_entropy_agrees_with_its_sum_and_stays_finite_where_a_class_underflows():
    logits = draw(6, 5)
    slow = [-sum(p * math.log(p) for p in softmax(row)) for row in logits.numpy()]
    np.testing.assert_allclose(entropy_loss(logits).numpy(), slow, rtol=1e-12)
    # exp(-400) is 0 in float32, and 0 log 0 of a plain softmax is NaN.
    extreme = torch.tensor([[0.0, -400.0, 3.0]], requires_grad=True)
    entropy_loss(extreme).sum().backward()
    assert torch.isfinite(extreme.grad).all()


def test_dense_entropy_is_the_mean_over_positions():
    dense = draw(2, 5, 3, 4)
    flat = dense.movedim(1, -1).reshape(2, 12, 5)
    expected = torch.stack([entropy_loss(rows).mean() for rows in flat])
    torch.testing.assert_close(entropy_loss(dense), expected)
