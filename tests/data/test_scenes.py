import hashlib
import math

import numpy as np
import pytest

from vestige.data._scenes import Shape, covers
from vestige.data.image import SCENE_CLASSES, draw_scenes, list_images, load_images
from vestige.errors import DataError


def test_scenes_never_change() -> None:
    prints = {
        split: load_images("scenes", split).fingerprint[:16]
        for split in ("train", "select", "test")
    }
    assert prints == {
        "train": "dc59a63f73b8ae1c",
        "select": "4c41796a83f67e41",
        "test": "d30a43e6ac7d9bfb",
    }
    images, masks = draw_scenes(3, seed=5, size=33, num_classes=8, shapes=(1, 6))
    digest = hashlib.sha256(images.tobytes() + masks.tobytes()).hexdigest()
    assert digest[:16] == "5b064ec5d070725a"


def test_splits_are_as_documented_and_share_nothing() -> None:
    sizes = {"train": 1000, "select": 100, "test": 200}
    seen = set()
    for split, count in sizes.items():
        found = load_images("scenes", split)
        assert found.images.shape == (count, 64, 64, 3) and found.images.dtype == np.uint8
        assert found.labels.shape == (count, 64, 64)
        assert np.unique(found.labels).tolist() == [0, 1, 2, 3, 4]
        assert found.classes == ("background", "disc", "square", "triangle", "ring")
        seen |= {image.tobytes() for image in found.images}
    assert len(seen) == sum(sizes.values())
    listed = {name: splits for name, _, splits in list_images()}
    assert listed["scenes"] == sizes
    with pytest.raises(DataError, match="split 'all' of 'scenes'"):
        load_images("scenes", "all")


def test_nobody_can_change_the_set_for_others() -> None:
    first = load_images("scenes", "select")
    first.images[:] = 0
    first.labels[:] = 0
    assert load_images("scenes", "select").images.any()
    assert load_images("scenes", "select").labels.any()


def test_masks_are_exact_to_the_pixel() -> None:
    images, masks = draw_scenes(60, seed=1, num_classes=8)
    for image, mask in zip(images.astype(int), masks, strict=True):
        ground = image[mask == 0]
        low, high = ground.min(0), ground.max(0)
        # As documented: no pixel of a shape has a colour within the range of the background's.
        outside = ((image < low) | (image > high)).any(2)
        assert np.array_equal(outside, mask > 0)


def test_the_first_scenes_do_not_depend_on_the_count() -> None:
    few, many = draw_scenes(3, seed=2), draw_scenes(7, seed=2)
    assert np.array_equal(few[0], many[0][:3]) and np.array_equal(few[1], many[1][:3])
    assert not np.array_equal(draw_scenes(3, seed=3)[0], few[0])


def test_colour_alone_does_not_tell_the_class() -> None:
    found = load_images("scenes", "train")
    colours = [found.images[found.labels == label].astype(float) for label in range(5)]
    # The classes' mean colours lie close together, each spread over much of the range.
    means = np.array([values.mean(0) for values in colours])
    assert np.abs(means - means.mean(0)).max() < 10
    assert min(values.std(0).min() for values in colours) > 40


def test_number_of_shapes_classes_and_size_are_as_asked() -> None:
    images, masks = draw_scenes(40, seed=4, size=48, num_classes=3, shapes=(1, 1))
    assert images.shape == (40, 48, 48, 3) and masks.shape == (40, 48, 48)
    assert {len(np.unique(mask)) for mask in masks} == {2}
    assert set(np.unique(masks)) == {0, 1, 2}


def test_shapes_have_the_areas_of_their_definitions() -> None:
    half = math.sqrt(0.3)
    areas = {
        "disc": math.pi,
        "square": 1.6**2,
        "triangle": 1.8**2 / math.sqrt(3),
        "ring": 0.7 * math.pi,
        "cross": 2 * 2 * 0.6 - 0.6**2,
        "bar": 2.2 * 0.6,
    }
    assert half**2 == pytest.approx(0.3)
    for name, area in areas.items():
        label = SCENE_CLASSES.index(name)
        for cos, sin in ((1.0, 0.0), (0.8, 0.6)):
            shape = Shape(label, 200.3, 199.6, 150, cos, sin)
            pixels = covers(label, *shape.frame(400)).sum()
            assert pixels == pytest.approx(area * 150**2, rel=0.005)
    # Turned by a quarter: what pointed down points left.
    square = [covers(3, *Shape(3, 32, 32, 20, cos, sin).frame(64)) for cos, sin in ((1, 0), (0, 1))]
    assert np.array_equal(np.rot90(square[0], -1), square[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"size": 15},
        {"shapes": (3, 2)},
        {"shapes": (0, 2)},
        {"num_classes": 1},
        {"num_classes": 9},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"got (count|num_classes)="):
        draw_scenes(**{"count": 1, **wrong})  # type: ignore[arg-type]
