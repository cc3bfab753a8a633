import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vestige.core.types import InputSpec
from vestige.errors import RecipeError, ShapeError
from vestige.sources.augment import (
    crop_and_flip,
    crop_resize,
    draw_boxes,
    draw_jitter,
    draw_shifts,
    jitter,
    random_views,
    shift,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int) -> torch.Tensor:
    """Values strictly inside [0, 1], all different."""
    return torch.rand(*shape, generator=rng(9), dtype=torch.float64) * 0.98 + 0.01


def every_shift(reach: int) -> torch.Tensor:
    """All distances in both directions, mirrored or not."""
    sides = range(-reach, reach + 1)
    return torch.tensor([(y, x, f) for y in sides for x in sides for f in (0, 1)])


def slow_shift(image: np.ndarray, row: list[int], wrap: bool) -> np.ndarray:
    """One image (C, H, W), pixel by pixel."""
    down, right, mirrored = row
    height, width = image.shape[1:]
    moved = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            to_y, to_x = y + down, x + right
            if wrap:
                to_y, to_x = to_y % height, to_x % width
            if 0 <= to_y < height and 0 <= to_x < width:
                moved[:, to_y, to_x] = image[:, y, x]
    return moved[:, :, ::-1] if mirrored else moved


@pytest.mark.parametrize("wrap", [False, True])
def test_shift_agrees_with_a_loop_over_images(wrap):
    # Up to 5 pixels: further than the height.
    shifts = every_shift(5)
    images = pictures(len(shifts), 2, 4, 6)
    slow = [
        slow_shift(image, row, wrap)
        for image, row in zip(images.numpy(), shifts.tolist(), strict=True)
    ]
    assert np.array_equal(shift(images, shifts, wrap=wrap).numpy(), np.stack(slow))


def test_a_shift_is_the_crop_with_padding_of_training_recipes():
    image = pictures(1, 3, 5, 7)
    padded = F.pad(image, (2, 2, 2, 2))
    for row in every_shift(2):
        down, right, mirrored = row.tolist()
        crop = padded[:, :, 2 - down : 7 - down, 2 - right : 9 - right]
        assert torch.equal(shift(image, row[None]), crop.flip(3) if mirrored else crop)


def test_gradient_of_a_shift_flows_to_where_each_pixel_came_from():
    shifts = torch.tensor([[1, 0, 0], [0, -2, 1], [0, 0, 0]])
    images = pictures(3, 1, 4, 4).requires_grad_()
    shift(images, shifts).sum().backward()
    lost = images.grad == 0
    # Out of view: the last row of the first image and the first two columns of the second.
    assert lost[0, 0].sum(1).tolist() == [0, 0, 0, 4]
    assert lost[1, 0].sum(0).tolist() == [4, 4, 0, 0]
    assert (images.grad[~lost] == 1).all()
    images.grad = None
    shift(images, shifts, wrap=True).sum().backward()
    assert (images.grad == 1).all()


@pytest.mark.parametrize("wrap", [False, True])
def test_no_shift_leaves_images_as_they_are(wrap):
    images = pictures(4, 2, 3, 5)
    shifts = draw_shifts(4, 0, rng())
    assert not shifts.any()
    assert torch.equal(shift(images, shifts, wrap=wrap), images)


def test_shifts_are_uniform_over_their_reach():
    drawn = draw_shifts(4000, (1, 2), rng(), flip=True)
    assert drawn.dtype == torch.int64
    for column, values in enumerate(([-1, 0, 1], [-2, -1, 0, 1, 2], [0, 1])):
        found, counts = drawn[:, column].unique(return_counts=True)
        assert found.tolist() == values
        expected = 4000 / len(values)
        # Five standard deviations of a binomial count, at most.
        assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()
    assert draw_shifts(50, 3, rng()).abs().amax(0).tolist() == [3, 3, 0]


DRAWS = {
    "shifts": lambda count, rng: draw_shifts(count, 4, rng, flip=True),
    "boxes": lambda count, rng: draw_boxes(count, (8, 8), rng, flip=True),
    "jitter": lambda count, rng: draw_jitter(count, rng, brightness=0.4, contrast=0.4),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_generator_alone_decides(name):
    draw = DRAWS[name]
    before = torch.get_rng_state()
    first = draw(20, rng(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draw(20, rng(1)), first)
    assert not torch.equal(draw(20, rng(2)), first)
    # One row per image, and no two alike.
    assert len(first) == 20
    assert len(first.unique(dim=0)) > 10


@pytest.mark.parametrize("size", [(8, 8), (8, 10)])
def test_boxes_lie_inside_and_have_the_shapes_they_promise(size):
    height, width = size
    boxes = draw_boxes(4000, size, rng(), scale=(0.1, 0.3), ratio=(0.5, 1.25), flip=True).double()
    top, left, tall, wide, mirrored = boxes.unbind(1)
    for start, side, most in ((top, tall, height), (left, wide, width)):
        assert start.min() >= 0
        # float32 keeps sums below 20 to 1e-6.
        assert (start + side).max() < most + 1e-5
        # Everywhere in the image, not only in its middle.
        free = start / (most - side)
        assert free.mean().item() == pytest.approx(0.5, abs=0.025)
        assert free.min() < 0.01
        assert free.max() > 0.99
    area, ratio = tall * wide / (height * width), wide / tall
    # No side of these is longer than the image, so both are as drawn.
    assert area.min().item() == pytest.approx(0.1, abs=1e-3)
    assert area.max().item() == pytest.approx(0.3, abs=1e-3)
    # Uniform: deviation of the mean 0.2 / sqrt(12 * 4000) = 0.0009.
    assert area.mean().item() == pytest.approx(0.2, abs=0.005)
    assert ratio.min().item() == pytest.approx(0.5, abs=2e-3)
    assert ratio.max().item() == pytest.approx(1.25, abs=2e-3)
    # The logarithm is uniform: deviation of its mean 0.92 / sqrt(12 * 4000) = 0.004.
    middle = (math.log(0.5) + math.log(1.25)) / 2
    assert ratio.log().mean().item() == pytest.approx(middle, abs=0.02)
    assert mirrored.unique().tolist() == [0, 1]
    assert mirrored.mean().item() == pytest.approx(0.5, abs=0.04)


def test_sides_longer_than_the_image_are_cut_to_it():
    boxes = draw_boxes(200, (4, 16), rng(), scale=(0.9, 1.0), ratio=(1.0, 1.0))
    assert (boxes[:, 0] == 0).all()
    assert (boxes[:, 2] == 4).all()
    assert (boxes[:, 3] < 8.01).all()
    assert not boxes[:, 4].any()


def test_the_whole_image_as_a_box_changes_nothing():
    images = pictures(6, 3, 8, 8)
    boxes = draw_boxes(6, (8, 8), rng(), scale=(1, 1), ratio=(1, 1))
    assert boxes.tolist() == [[0, 0, 8, 8, 0]] * 6
    # float32 computes places among 8 pixels to 1e-6; the images here are float64.
    torch.testing.assert_close(crop_resize(images, boxes), images, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        crop_resize(images.float(), boxes), images.float(), rtol=0, atol=1e-5
    )
    wide = pictures(2, 1, 5, 9)
    boxes = torch.tensor([[0.0, 0.0, 5.0, 9.0, 0.0], [0.0, 0.0, 5.0, 9.0, 1.0]])
    expected = torch.stack([wide[0], wide[1].flip(2)])
    torch.testing.assert_close(crop_resize(wide, boxes), expected, rtol=0, atol=1e-12)


def slow_crop(image: np.ndarray, box: list[float]) -> np.ndarray:
    """One image (C, H, W): bilinear between pixel centres, pixel by pixel."""
    top, left, tall, wide, mirrored = box
    height, width = image.shape[1:]
    part = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            y = min(max(top + (i + 0.5) * tall / height - 0.5, 0), height - 1)
            x = min(max(left + (j + 0.5) * wide / width - 0.5, 0), width - 1)
            up, west = int(y), int(x)
            down, east = min(up + 1, height - 1), min(west + 1, width - 1)
            upper = image[:, up, west] * (west + 1 - x) + image[:, up, east] * (x - west)
            lower = image[:, down, west] * (west + 1 - x) + image[:, down, east] * (x - west)
            part[:, i, j] = upper * (up + 1 - y) + lower * (y - up)
    return part[:, :, ::-1] if mirrored else part


def test_crop_agrees_with_a_loop_over_images():
    images = pictures(20, 2, 5, 7)
    boxes = draw_boxes(20, (5, 7), rng(), flip=True).double()
    slow = [
        slow_crop(image, box) for image, box in zip(images.numpy(), boxes.tolist(), strict=True)
    ]
    np.testing.assert_allclose(crop_resize(images, boxes).numpy(), np.stack(slow), atol=1e-12)


def test_a_crop_is_the_interpolated_part_of_the_image():
    images = pictures(1, 2, 8, 8)
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0, 0.0]])
    part = F.interpolate(images[..., :4, :4], (8, 8), mode="bilinear", align_corners=False)
    found = crop_resize(images, boxes)
    # The last row and column lie between the part and its neighbours.
    torch.testing.assert_close(found[..., :7, :7], part[..., :7, :7])
    edge = 0.75 * images[..., 0, 3] + 0.25 * images[..., 0, 4]
    torch.testing.assert_close(found[..., 0, 7], edge)


def test_a_crop_has_the_gradient_of_its_value_and_none_outside():
    images = pictures(3, 1, 4, 5).requires_grad_()
    boxes = draw_boxes(3, (4, 5), rng(), flip=True).double()
    assert torch.autograd.gradcheck(lambda values: crop_resize(values, boxes), (images,))
    corner = torch.tensor([[0.0, 0.0, 2.0, 2.0, 0.0]]).repeat(3, 1)
    crop_resize(images, corner).sum().backward()
    seen = images.grad.amax((0, 1)) > 0
    assert seen[:3, :3].all()
    assert not seen[3:].any()
    assert not seen[:, 3:].any()


def slow_jitter(image: np.ndarray, bright: float, contrast: float) -> np.ndarray:
    image = image * bright
    mean = image.sum() / image.size
    return np.array([min(max(mean + (v - mean) * contrast, 0), 1) for v in image.ravel()])


def test_jitter_agrees_with_a_loop_over_images():
    images = pictures(12, 3, 2, 4)
    factors = draw_jitter(12, rng(), brightness=0.9, contrast=0.9).double()
    slow = [
        slow_jitter(image, *row)
        for image, row in zip(images.numpy(), factors.tolist(), strict=True)
    ]
    found = jitter(images, factors)
    np.testing.assert_allclose(found.flatten(1).numpy(), np.stack(slow), atol=1e-14)
    assert (found == 0).any()
    assert (found == 1).any()


def test_factors_of_one_change_nothing_and_no_contrast_leaves_the_mean():
    images = pictures(3, 2, 3, 3)
    factors = draw_jitter(3, rng())
    assert torch.equal(factors, torch.ones(3, 2))
    torch.testing.assert_close(jitter(images, factors), images, rtol=0, atol=1e-15)
    flat = jitter(images, torch.tensor([[0.5, 0.0]]).repeat(3, 1))
    mean = images.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(flat, (0.5 * mean).expand_as(images))


def test_jitter_factors_are_uniform_around_one():
    factors = draw_jitter(4000, rng(), brightness=0.5, contrast=0.1).double()
    for column, spread in ((0, 0.5), (1, 0.1)):
        values = (factors[:, column] - 1) / spread
        assert 0.99 < values.max() <= 1.0001
        assert -1.0001 <= values.min() < -0.99
        # Uniform on [-1, 1]: deviation of the mean 0.009.
        assert values.mean().abs() < 0.045
        assert values.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.05)
    # The two are drawn apart from each other.
    assert torch.corrcoef(factors.t())[0, 1].abs() < 0.08


def test_gradient_passes_jitter_but_not_where_it_was_clamped():
    images = pictures(2, 1, 3, 3).requires_grad_()
    gentle = torch.tensor([[0.9, 1.05], [1.01, 0.5]]).double()
    assert torch.autograd.gradcheck(lambda values: jitter(values, gentle), (images,))
    bright = jitter(images, torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
    bright.sum().backward()
    assert (bright == 1).any()
    torch.testing.assert_close(images.grad, torch.where(bright == 1, 0.0, 2.0).double())


def test_inputs_are_cropped_and_mirrored_in_the_teachers_space_with_black_borders():
    spec = InputSpec.image(2, 6, 5, mean=(0.3, 0.5), std=(0.2, 0.25))
    images = pictures(40, 2, 6, 5)
    inputs = spec.normalize(images).requires_grad_()
    found = crop_and_flip(inputs, spec, rng(1), padding=2, flip=True)
    expected = spec.normalize(shift(images, draw_shifts(40, 2, rng(1), flip=True)))
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    # Black, which is not 0 in this space, came in from the sides.
    black = spec.normalize(torch.zeros(1, 2, 1, 1).double())
    assert torch.isclose(found, black).any()


def test_inputs_are_left_alone_where_nothing_is_asked_for():
    spec, inputs, draws = InputSpec.image(1, 4, 4), pictures(3, 1, 4, 4), rng()
    before = draws.get_state()
    assert crop_and_flip(inputs, spec, draws, padding=0, flip=False) is inputs
    assert torch.equal(draws.get_state(), before)
    mirrored = crop_and_flip(inputs, spec, draws, padding=0, flip=True)
    for found, image in zip(mirrored, inputs, strict=True):
        assert torch.equal(found, image) or torch.equal(found, image.flip(2))


@pytest.mark.parametrize(("apply", "width"), [(shift, 3), (crop_resize, 5), (jitter, 2)])
def test_what_was_drawn_must_fit_the_images(apply, width):
    for images, drawn in (
        (torch.zeros(4, 1, 3, 3), torch.zeros(3, width)),
        (torch.zeros(4, 1, 3, 3), torch.zeros(4, width + 1)),
        (torch.zeros(4, 3, 3), torch.zeros(4, width)),
    ):
        with pytest.raises(ShapeError, match=rf"got images .*, expected .*\(B, {width}\)"):
            apply(images, drawn)


def test_ranges_that_are_none_are_refused():
    with pytest.raises(RecipeError, match=r"reach of \(2, -1\) pixels, expected at least 0"):
        draw_shifts(2, (2, -1), rng())
    for scale in ((0.0, 1.0), (0.6, 0.5), (0.5, 1.1)):
        with pytest.raises(RecipeError, match=r"got scale .*expected 0 < least"):
            draw_boxes(2, (8, 8), rng(), scale=scale)
    for ratio in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(RecipeError, match=r"got ratio .*expected 0 < least"):
            draw_boxes(2, (8, 8), rng(), ratio=ratio)
    for wrong in ({"brightness": 1.5}, {"contrast": -0.1}):
        with pytest.raises(RecipeError, match=r"expected values in \[0, 1\]"):
            draw_jitter(2, rng(), **wrong)


def test_views_are_crops_or_parts_or_the_inputs_themselves():
    spec, inputs = InputSpec.image(1, 6, 6, mean=(0.4,), std=(0.2,)), pictures(3, 1, 6, 6)
    draws = rng()
    before = draws.get_state()
    assert random_views(inputs, spec, draws) is inputs
    assert torch.equal(draws.get_state(), before)
    cropped = random_views(inputs, spec, rng(1), padding=2, flip=True)
    assert torch.equal(cropped, crop_and_flip(inputs, spec, rng(1), padding=2, flip=True))
    enlarged = random_views(inputs, spec, rng(1), flip=True, area=0.3)
    boxes = draw_boxes(3, (6, 6), rng(1), scale=(0.3, 1.0), flip=True)
    assert torch.equal(enlarged, crop_resize(inputs, boxes))
    # What is no image has no views.
    rows = torch.zeros(3, 5)
    assert random_views(rows, InputSpec("embedding", (5,)), rng(), padding=2, area=0.3) is rows
