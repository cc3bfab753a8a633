"""Junk of known origin."""

import numpy as np
import pytest

from vestige.core.types import InputSpec
from vestige.data.unlabelled.made_up import MADE_UP, MadeUpImages, stream

SPEC = InputSpec.image(3, 20, 16)


def read(found: MadeUpImages, spec: InputSpec = SPEC, rows: object = None) -> np.ndarray:
    rows = np.arange(len(found)) if rows is None else np.array(rows)
    return np.concatenate([block.images for block in found.blocks(spec, rows)])


@pytest.mark.parametrize("kind", MADE_UP)
def test_images_are_made_at_the_teachers_size_by_the_seed(kind: str) -> None:
    made = MadeUpImages(kind, 700, 0)
    images = read(made)
    assert images.shape == (700, 20, 16, 3) and images.dtype == np.uint8
    assert len(np.unique(images.reshape(700, -1), axis=0)) == 700
    assert np.array_equal(images, read(MadeUpImages(kind, 700, 0)))
    assert not np.array_equal(images, read(MadeUpImages(kind, 700, 1)))
    assert np.array_equal(read(made, rows=[0, 511, 512, 699]), images[[0, 511, 512, 699]])
    assert read(made, InputSpec.image(1, 8, 8)).shape == (700, 8, 8, 1)
    assert made.fingerprint != MadeUpImages(kind, 700, 1).fingerprint


def test_noise_is_uniform_and_without_pattern() -> None:
    images = read(MadeUpImages("noise", 200, 0)).astype(float)
    # A million values: standard errors are below 0.1.
    assert abs(images.mean() - 127.5) < 0.5 and abs(images.std() - 73.9) < 0.5
    beside = np.corrcoef(images[:, :, 1:].ravel(), images[:, :, :-1].ravel())[0, 1]
    assert abs(beside) < 0.01


def test_textures_have_pattern_and_colours() -> None:
    images = read(MadeUpImages("textures", 400, 0)).astype(float)
    near = [np.corrcoef(one[:, 1:].ravel(), one[:, :-1].ravel())[0, 1] for one in images.mean(-1)]
    assert np.median(near) > 0.4
    assert (np.abs(images[..., 0] - images[..., 2]).mean((1, 2)) > 20).mean() > 0.7


def test_streams_are_apart() -> None:
    assert stream(0, "a").randint(2**31) == stream(0, "a").randint(2**31)
    assert stream(0, "a").randint(2**31) != stream(0, "b").randint(2**31)
    assert stream(2**80, "a").randint(2**31) >= 0
