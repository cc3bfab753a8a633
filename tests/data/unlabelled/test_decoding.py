"""An image of any form becomes the bytes that a labelled set of the same file gives."""

import numpy as np
import pytest
import torch
from PIL import Image

from vestige.core.types import InputSpec
from vestige.data.image import to_inputs
from vestige.data.unlabelled.decoding import (
    Skipped,
    as_bytes,
    check_spec,
    in_size,
    row_hashes,
)
from vestige.errors import DataError, ShapeError

COLOUR, GREY = InputSpec.image(3, 6, 5), InputSpec.image(1, 6, 5)


def images(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(4, 9, 11, 3), (4, 3, 2, 3), (4, 6, 5, 3), (4, 9, 11)])
def test_resizing_is_that_of_labelled_sets_to_half_a_grey_level(shape: tuple[int, ...]) -> None:
    found = torch.from_numpy(in_size(images(*shape), COLOUR).images).permute(0, 3, 1, 2) / 255
    # Rounding to 255 levels moves a value by at most half of one, and float32 adds its own.
    torch.testing.assert_close(found, to_inputs(images(*shape), COLOUR), atol=0.5001 / 255, rtol=0)


def test_what_fits_is_not_touched() -> None:
    assert np.array_equal(in_size(images(4, 6, 5, 3), COLOUR).images, images(4, 6, 5, 3))


def test_one_channel_is_repeated_and_that_is_counted() -> None:
    block = in_size(images(4, 6, 5), COLOUR)
    assert block.repeated == 4 and block.greyed == 0
    for channel in range(3):
        assert np.array_equal(block.images[..., channel], images(4, 6, 5))


def test_colours_become_grey_as_in_pictures() -> None:
    block = in_size(images(4, 6, 5, 3), GREY)
    assert block.greyed == 4 and block.images.shape == (4, 6, 5, 1)
    for colour, grey in zip(images(4, 6, 5, 3), block.images, strict=True):
        assert np.array_equal(np.asarray(Image.fromarray(colour).convert("L")), grey[..., 0])


def test_other_channels_are_refused() -> None:
    with pytest.raises(DataError, match="got images with 3 channels, expected 4"):
        in_size(images(2, 6, 5, 3), InputSpec.image(4, 6, 5))
    with pytest.raises(ShapeError, match="kind 'text'"):
        check_spec(InputSpec("text", (3, 6, 5)))


def test_labelled_images_are_decoded_alike() -> None:
    blocks = list(as_bytes(images(600, 9, 11), COLOUR))
    assert len(blocks) > 1
    assert np.array_equal(np.concatenate(blocks), in_size(images(600, 9, 11), COLOUR).images)


def test_a_hash_is_of_the_contents_alone() -> None:
    rows = images(5, 6, 5, 3)
    rows[3] = rows[1]
    hashes = row_hashes(rows)
    assert hashes.dtype == np.uint64
    assert hashes[3] == hashes[1] and len(set(hashes.tolist())) == 4
    # Neither the place nor what lies beside it in memory counts.
    assert np.array_equal(row_hashes(np.ascontiguousarray(rows[:, ::-1])[:, ::-1]), hashes)
    assert row_hashes(rows[:0]).shape == (0,)
    rows[0, 0, 0, 0] ^= 1
    assert row_hashes(rows)[0] != hashes[0]


def test_of_much_that_is_left_out_few_are_named() -> None:
    left_out = Skipped().plus(["a: empty"]).plus([f"{i}: torn" for i in range(9)])
    assert left_out.count == 10 and len(left_out.first) == 5 and left_out.first[0] == "a: empty"
