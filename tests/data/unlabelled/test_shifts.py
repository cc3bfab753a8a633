"""Distortions: each does what its name says, and the seed alone decides how strongly."""

import numpy as np
import pytest
from numpy.random import RandomState

from vestige.data.unlabelled.shifts import SHIFTS, shifted, unknown_shifts
from vestige.errors import DataError


def images(count: int = 12, side: int = 28, channels: int = 1) -> np.ndarray:
    """Bright bars on black, off the centre."""
    found = np.zeros((count, side, side, channels), dtype=np.uint8)
    found[:, 4:-4, side // 2 : side // 2 + 4] = 220
    found[:, 6:10, 5:9] = 140
    return found


@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("form", [(28, 1), (16, 3)])
def test_each_gives_as_many_images_of_the_same_form(name: str, form: tuple[int, int]) -> None:
    before = images(6, *form)
    after = shifted(before, [name], RandomState(0))
    assert after.shape == before.shape and after.dtype == np.uint8
    assert not np.array_equal(after, before)
    assert np.array_equal(before, images(6, *form)), "what was handed in stays as it is"
    assert np.array_equal(after, shifted(before, [name], RandomState(0)))


@pytest.mark.parametrize("name", sorted({*SHIFTS} - {"invert", "thicken", "thin"}))
def test_strengths_differ_from_image_to_image_and_by_seed(name: str) -> None:
    after = shifted(images(), [name], RandomState(0))
    # Two of twelve may draw nearly the same strength.
    assert len(np.unique(after.reshape(12, -1), axis=0)) >= 10
    assert not np.array_equal(after, shifted(images(), [name], RandomState(1)))


def test_oblong_images_are_taken() -> None:
    oblong = images()[:, 4:20]
    for name in SHIFTS:
        assert shifted(oblong, [name], RandomState(0)).shape == oblong.shape


def test_inverting_twice_is_nothing() -> None:
    assert np.array_equal(shifted(images(), ["invert", "invert"], RandomState(0)), images())


def test_tint_keeps_the_drawing_and_two_colours_that_differ() -> None:
    flat = (images(200, 28, 3) > 0).astype(np.uint8) * 255
    after = shifted(flat, ["tint"], RandomState(0)).astype(int)
    ink, paper = after[:, 8, 7], after[:, 0, 0]
    for row, one in enumerate(after):
        assert len(np.unique(one.reshape(-1, 3), axis=0)) == 2
        assert np.array_equal((one == ink[row]).all(-1), flat[row, ..., 0] > 0)
    assert np.abs(ink - paper).mean(1).min() >= 85
    assert (np.ptp(paper, axis=1) > 30).any(), "there are colours, not greys alone"


def test_rotation_is_of_up_to_25_degrees_about_the_centre() -> None:
    line = np.zeros((300, 33, 33, 1), dtype=np.uint8)
    line[:, 2:31, 15:18] = 255
    after = shifted(line, ["rotate"], RandomState(0)).astype(float)[..., 0]
    y, x = np.mgrid[-16:17, -16:17]
    mass = after.sum((1, 2))
    angles = 0.5 * np.arctan2(
        2 * (after * x * y).sum((1, 2)) / mass,
        ((after * y * y).sum((1, 2)) - (after * x * x).sum((1, 2))) / mass,
    )
    degrees = np.degrees(angles)
    # The axis of a bar of 3 x 29 pixels is found to within half a degree.
    assert np.abs(degrees).max() < 25.5 and degrees.max() > 22 and degrees.min() < -22
    assert np.abs((after * x).sum((1, 2)) / mass).max() < 0.3


def test_strokes_become_thicker_and_thinner() -> None:
    for side, more in ((28, 2), (16, 1)):
        bar = np.zeros((1, side, side, 1), dtype=np.uint8)
        bar[0, :, 5:9] = 255
        width = (shifted(bar, ["thicken"], RandomState(0))[0, side // 2, :, 0] > 0).sum()
        assert width == 4 + more
        assert (shifted(bar, ["thin"], RandomState(0))[0, side // 2, :, 0] > 0).sum() == 3


def test_blur_keeps_the_mean_and_takes_the_edges() -> None:
    before = images()
    after = shifted(before, ["blur"], RandomState(0))
    assert np.abs(after.mean((1, 2, 3)) - before.mean((1, 2, 3))).max() < 1
    steps = [np.abs(np.diff(one.astype(int), axis=2)).max((1, 2, 3)) for one in (before, after)]
    assert (steps[1] < 0.6 * steps[0]).all()
    flat = np.full((2, 16, 16, 3), 77, dtype=np.uint8)
    assert np.array_equal(shifted(flat, ["blur"], RandomState(0)), flat)


def test_noise_has_the_stated_strength() -> None:
    grey = np.full((40, 28, 28, 1), 128, dtype=np.uint8)
    deviation = shifted(grey, ["noise"], RandomState(0)).std((1, 2, 3)) / 255
    # Clipping at both ends takes a little off the strongest.
    assert deviation.min() > 0.09 and 0.2 < deviation.max() < 0.26


def test_contrast_and_shade_have_the_stated_strength() -> None:
    before = images()
    ratio = shifted(before, ["contrast"], RandomState(0)).std((1, 2, 3)) / before.std((1, 2, 3))
    assert ratio.min() > 0.24 and ratio.max() < 0.61
    white = np.full((60, 21, 21, 1), 255, dtype=np.uint8)
    shade = shifted(white, ["shade"], RandomState(0)) / 255
    # The darkest corner is that of the gradient's side.
    assert shade.min() < 0.4 and shade.max((1, 2, 3)).min() > 0.75


def test_alternatives_are_drawn_per_image() -> None:
    asked = ["invert|thicken"]
    after = shifted(images(200), asked, RandomState(0))
    inverted = (after[:, 0, 0, 0] == 255).sum()
    thick = np.array_equal(
        after[after[:, 0, 0, 0] == 0],
        shifted(images(200 - inverted), ["thicken"], RandomState(0)),
    )
    # 200 fair draws, four standard deviations.
    assert thick and 72 <= inverted <= 128


def test_several_act_one_after_another() -> None:
    after = shifted(images(), ["invert", "contrast"], RandomState(0))
    assert np.array_equal(
        after, SHIFTS["contrast"](SHIFTS["invert"](images(), RandomState(9)), RandomState(0))
    )


def test_unknown_names_are_found() -> None:
    assert unknown_shifts(["invert", "rotate | blurr", "swirl"]) == ["blurr", "swirl"]
    with pytest.raises(DataError, match="got the shift 'swirl', expected one of invert"):
        shifted(images(), ["swirl"], RandomState(0))
