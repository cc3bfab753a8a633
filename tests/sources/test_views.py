import math

import numpy as np
import pytest
import torch

from vestige.core.types import InputSpec
from vestige.errors import RecipeError, ShapeError
from vestige.sources.views import (
    draw_colours,
    draw_turns,
    draw_views,
    recoloured,
    turned,
    viewed,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int) -> torch.Tensor:
    """Values strictly inside [0, 1], all different."""
    return torch.rand(*shape, generator=rng(9), dtype=torch.float64) * 0.98 + 0.01


DRAWS = {
    "colours": lambda count, rng: draw_colours(count, 3, rng, 0.5),
    "turns": lambda count, rng: draw_turns(count, rng, 30),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_generator_alone_decides(name):
    draw = DRAWS[name]
    before = torch.get_rng_state()
    first = draw(20, rng(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draw(20, rng(1)), first)
    assert not torch.equal(draw(20, rng(2)), first)
    # One row per image; of turns about half are none.
    assert len(first) == 20
    assert len(first.unique(dim=0)) >= 5


def slow_recolour(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    made = np.empty_like(image)
    for channel, (came_from, factor, place, share) in enumerate(colours):
        plane = image[int(came_from)]
        plane = plane.mean() + factor * (plane - plane.mean())
        room = 1 - (plane.max() - plane.min())
        made[channel] = np.clip(plane + share * (place * room - plane.min()), 0, 1)
    return made


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_recolouring_agrees_with_a_loop_over_channels(strength):
    images = pictures(12, 3, 2, 4)
    colours = draw_colours(12, 3, rng(), strength).double()
    slow = [slow_recolour(*pair) for pair in zip(images.numpy(), colours.numpy(), strict=True)]
    np.testing.assert_allclose(recoloured(images, colours).numpy(), np.stack(slow), atol=1e-14)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_colours_lie_in_the_range_of_their_strength(strength):
    order, factor, place, share = draw_colours(4000, 3, rng(), strength).double().unbind(2)
    assert (share == strength).all()
    assert torch.equal(order.sort(1).values, torch.arange(3).double().expand(4000, -1))
    # Of six permutations one changes nothing; five deviations of a binomial share.
    moved = (order != torch.arange(3)).any(1).double().mean()
    assert abs(moved - strength * 5 / 6) < 0.04
    inverted = factor < 0
    assert (inverted.all(1) | ~inverted.any(1)).all()
    assert abs(inverted[:, 0].double().mean() - strength / 2) < 0.04
    for values, low, high in ((factor.abs(), 1 - strength / 2, 1), (place, 0, 1)):
        reach = high - low
        assert low - 1e-6 <= values.min() < low + 0.01 * reach
        assert high - 0.01 * reach < values.max() <= high + 1e-6
        # Uniform: deviation of the mean of 12000 is 0.0026 of the range.
        assert abs(values.mean() - (low + high) / 2) < 0.013 * reach
    # Channels, and what is drawn for one of them, have nothing to do with each other.
    drawn = torch.stack([*factor.abs().t(), *place.t()])
    assert (torch.corrcoef(drawn) - torch.eye(6)).abs().max() < 0.08


def test_no_strength_leaves_the_colours():
    images = pictures(3, 2, 3, 3)
    found = recoloured(images, draw_colours(3, 2, rng(), 0.0))
    torch.testing.assert_close(found, images, rtol=0, atol=1e-15)


def test_at_full_strength_no_value_is_cut_and_a_common_pattern_stays_common():
    pattern = 0.2 * pictures(50, 1, 6, 6)
    images = pattern + 0.7 * pictures(50, 3, 1, 1)
    found = recoloured(images, draw_colours(50, 3, rng(), 1.0).double())
    assert found.min() >= 0
    assert found.max() <= 1
    # Up to a factor of the same sign in all channels.
    centred = found - found.mean((2, 3), keepdim=True)
    own = pattern - pattern.mean((2, 3), keepdim=True)
    factors = (centred * own).sum((2, 3)) / (own * own).sum((2, 3))
    torch.testing.assert_close(centred, factors[..., None, None] * own)
    assert (factors.sign() == factors.sign()[:, :1]).all()
    assert (factors.abs() >= 0.5).all()


def test_gradient_passes_new_colours_in_the_places_that_were_drawn():
    images = pictures(2, 2, 3, 3).requires_grad_()
    colours = draw_colours(2, 2, rng(), 0.6).double()
    with torch.no_grad():
        made = recoloured(images, colours)
    recoloured(images, colours).sum().backward()
    # Where values go is a constant, so the sum changes by the means of channels alone.
    inside = ((made > 0) & (made < 1)).all()
    assert inside
    torch.testing.assert_close(images.grad, torch.ones_like(images))
    weights = pictures(2, 2, 3, 3)
    images.grad = None
    (weights * recoloured(images, colours)).sum().backward()
    order, factor = colours[..., 0].long(), colours[..., 1, None, None]
    mean = weights.mean((2, 3), keepdim=True)
    expected = torch.empty_like(weights)
    expected.scatter_(
        1, order[..., None, None].expand_as(weights), mean + factor * (weights - mean)
    )
    torch.testing.assert_close(images.grad, expected)


def row(angle: float, zoom: float = 1.0, mirrored: bool = False) -> torch.Tensor:
    return torch.tensor([[angle, zoom, float(mirrored)]])


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_quarters_of_a_turn_are_counter_clockwise_after_the_mirror(quarters, mirrored):
    images = pictures(1, 2, 5, 5)
    expected = torch.rot90(images.flip(3) if mirrored else images, quarters, (2, 3))
    angle = 90 * quarters if quarters < 3 else -90
    torch.testing.assert_close(
        turned(images, row(angle, mirrored=mirrored)), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("size", [(40, 40), (48, 60)])
def test_a_spot_goes_where_geometry_sends_it(size):
    height, width = size
    images = torch.zeros(1, 1, height, width)
    # A spot right of the middle; y counts downwards.
    images[0, 0, height // 2 - 1 : height // 2 + 1, width // 2 + 6 : width // 2 + 9] = 1
    found = turned(images, row(60, zoom=0.8))[0, 0]
    x = torch.arange(width) + 0.5 - width / 2
    y = torch.arange(height) + 0.5 - height / 2
    middle = [float((found.sum(0) * x).sum()), float((found.sum(1) * y).sum())]
    away = 7.5 / 0.8
    place = [value / float(found.sum()) for value in middle]
    expected = [away * math.cos(math.pi / 3), -away * math.sin(math.pi / 3)]
    assert place == pytest.approx(expected, abs=0.3)


def test_beyond_the_border_the_image_is_reflected():
    images = pictures(1, 1, 8, 8)
    smaller = turned(images, row(0, zoom=1.25))
    assert smaller.min() > images.min()
    mirrored = surrounded(images)
    expected = torch.nn.functional.grid_sample(
        mirrored,
        torch.nn.functional.affine_grid(
            torch.tensor([[[1.25 / 3, 0, 0], [0, 1.25 / 3, 0]]]).double(),
            [1, 1, 8, 8],
            align_corners=False,
        ),
        align_corners=False,
    )
    torch.testing.assert_close(smaller, expected, atol=1e-6, rtol=0)


def surrounded(images: torch.Tensor) -> torch.Tensor:
    """Each image with its mirror images around it, three times as large."""
    wide = torch.cat([images.flip(3), images, images.flip(3)], 3)
    return torch.cat([wide.flip(2), wide, wide.flip(2)], 2)


def test_turns_are_uniform_over_their_range_and_leave_one_of_two_images():
    turns = draw_turns(8000, rng(), 30).double()
    kept = (turns == torch.tensor([0.0, 1.0, 0.0]).double()).all(1)
    # Five deviations of a binomial share.
    assert abs(kept.double().mean() - 0.5) < 0.028
    angle, zoom, mirrored = turns[~kept].unbind(1)
    for values, low, high in ((angle, -30, 30), (zoom, 0.8, 1.25)):
        reach = high - low
        assert low - 1e-5 <= values.min() < low + 0.01 * reach
        assert high - 0.01 * reach < values.max() <= high + 1e-5
        assert abs(values.mean() - (low + high) / 2) < 0.023 * reach
    assert mirrored.unique().tolist() == [0, 1]
    assert abs(mirrored.mean() - 0.5) < 0.04


def test_an_image_that_is_not_turned_stays_as_it_is():
    images = pictures(1, 2, 7, 9).float()
    torch.testing.assert_close(turned(images, row(0)), images, atol=1e-5, rtol=0)


def test_gradient_passes_a_turn():
    images = pictures(2, 2, 4, 5).requires_grad_()
    turns = draw_turns(2, rng(), 180).double()
    assert torch.autograd.gradcheck(lambda values: turned(values, turns), (images,))


def test_views_work_in_the_teachers_space():
    spec = InputSpec.image(2, 6, 6, mean=(0.3, 0.5), std=(0.2, 0.25))
    images = pictures(5, 2, 6, 6).float()
    drawn = draw_views(5, spec, rng(), recolour=0.5, turn=180)
    assert {name: tuple(value.shape) for name, value in drawn.items()} == {
        "turns": (5, 3),
        "colours": (5, 2, 4),
    }
    found = viewed(spec.normalize(images), {**drawn, "labels": torch.zeros(5)}, spec)
    expected = recoloured(turned(images, drawn["turns"]), drawn["colours"])
    torch.testing.assert_close(spec.denormalize(found), expected, atol=1e-6, rtol=0)


def test_nothing_is_drawn_and_done_where_nothing_is_asked_for():
    spec, draws = InputSpec.image(1, 4, 4), rng()
    before = draws.get_state()
    assert draw_views(3, spec, draws) == {}
    assert torch.equal(draws.get_state(), before)
    # Also of inputs that are no images.
    assert draw_views(3, InputSpec("embedding", (7,)), draws) == {}
    inputs = pictures(3, 1, 4, 4) * 5
    assert viewed(inputs, {"fresh": torch.ones(3)}, spec) is inputs


def test_views_refuse_what_they_cannot_use():
    with pytest.raises(RecipeError, match=r"colours of 1\.5"):
        draw_colours(2, 3, rng(), 1.5)
    with pytest.raises(RecipeError, match="turn of 200 degrees"):
        draw_turns(2, rng(), 200)
    with pytest.raises(RecipeError, match=r"turn 90 for embedding inputs of shape \(7,\)"):
        draw_views(2, InputSpec("embedding", (7,)), rng(), turn=90)
    with pytest.raises(ShapeError, match=r"colours \(2, 1, 4\)"):
        recoloured(pictures(2, 3, 4, 4), draw_colours(2, 1, rng(), 1.0))
    with pytest.raises(ShapeError, match=r"turns \(1, 3\)"):
        turned(pictures(2, 3, 4, 4), row(0))
