import pytest
import torch
from torch.nn import functional

from vestige.core.seeding import generator
from vestige.training.spatial import (
    flips,
    mirrored,
    moved,
    random_flip,
    random_shift,
    shifts,
)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Masks, and images that show them: each pixel's class is its value."""
    masks = torch.randint(5, (12, 6, 9))
    return masks[:, None].float().expand(-1, 3, -1, -1), masks


def test_a_mask_moves_with_its_image(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, masks = pair
    by = shifts(12, 3, generator(0, "test"))
    shifted = moved(images, by)
    assert torch.equal(shifted[:, 0].long(), moved(masks, by))
    assert not torch.equal(shifted, images)
    turned = flips(12, generator(0, "test"))
    assert 0 < turned.sum() < 12
    assert torch.equal(mirrored(images, turned)[:, 0].long(), mirrored(masks, turned))
    assert torch.equal(mirrored(masks, turned)[turned], masks[turned].flip(2))
    assert torch.equal(mirrored(masks, turned)[~turned], masks[~turned])


def test_what_comes_in_repeats_the_border_of_mask_and_image() -> None:
    masks = torch.arange(6).view(1, 2, 3)
    assert moved(masks, torch.tensor([[1], [0]]))[0].tolist() == [[3, 4, 5], [3, 4, 5]]
    assert moved(masks, torch.tensor([[0], [-2]]))[0].tolist() == [[0, 0, 0], [3, 3, 3]]
    assert torch.equal(moved(masks, torch.tensor([[0], [0]])), masks)


def test_the_same_draws_and_pixels_as_padding_by_the_border() -> None:
    images = torch.randn(5, 2, 6, 7)
    padded = functional.pad(images, (2,) * 4, mode="replicate")
    start = torch.randint(5, (2, 5, 1), generator=generator(3, "test"))
    expected = torch.stack(
        [
            padded[row, :, top : top + 6, left : left + 7]
            for row, (top, left) in enumerate(start[:, :, 0].T.tolist())
        ]
    )
    assert torch.equal(random_shift(images, 2, generator(3, "test")), expected)
    which = torch.randint(2, (5, 1, 1, 1), generator=generator(3, "test")).bool()
    turned = torch.where(which, images.flip(3), images)
    assert torch.equal(random_flip(images, generator(3, "test")), turned)
