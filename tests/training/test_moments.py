"""Inputs over time: which rounds are kept, at what size, and that a resumed run keeps the same."""

from itertools import pairwise

import pytest
import torch

from vestige.core.types import InputSpec
from vestige.training.checkpoint import decode, encode
from vestige.training.moments import Moments

GREY = InputSpec.image(1, 4, 4, mean=(0.5,), std=(0.25,))


def followed(rounds: int, moments: Moments | None = None, start: int = 1) -> Moments:
    """Moments of a run whose inputs of round n are images of the value n / 1000."""
    moments = moments or Moments(GREY)
    for number in range(start, rounds + 1):
        images = torch.full((9, 1, 4, 4), number / 1000)
        moments.observe(GREY.normalize(images), torch.arange(9))
        moments.end_round("train", number, 10 * number)
    return moments


@pytest.mark.parametrize("rounds", [1, 2, 7, 8, 9, 15, 16, 17, 31, 40, 100, 999])
def test_first_and_last_round_are_shown_and_the_others_lie_evenly(rounds: int) -> None:
    chosen = [moment.round for moment in followed(rounds).chosen()]
    assert chosen == sorted(set(chosen)) and chosen[0] == 1 and chosen[-1] == rounds
    assert len(chosen) == min(rounds, 8)
    gaps = [second - first for first, second in pairwise(chosen)]
    even = (rounds - 1) / 7
    assert all(0.4 * even <= gap <= max(1, 1.8 * even) for gap in gaps)


def test_pixels_are_those_of_the_round_and_classes_the_teachers() -> None:
    for moment in followed(20).chosen():
        assert moment.images.dtype == torch.uint8 and moment.images.shape == (4, 1, 4, 4)
        assert (moment.images == round(255 * moment.round / 1000)).all()
        assert moment.classes.tolist() == [0, 1, 2, 3] and moment.step == 10 * moment.round


@pytest.mark.parametrize("cut", [1, 5, 15, 16, 17, 33])
def test_a_resumed_run_keeps_what_an_uninterrupted_one_keeps(cut: int) -> None:
    tensors: dict[str, torch.Tensor] = {}
    stored = encode(followed(cut).state_dict(), tensors)
    resumed = Moments(GREY)
    resumed.load_state_dict(decode(stored, tensors))
    first, second = followed(50).chosen(), followed(50, resumed, start=cut + 1).chosen()
    assert [one.round for one in first] == [one.round for one in second]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.classes, other.classes)


def test_what_is_kept_is_bounded_whatever_the_size_of_images_and_run() -> None:
    spec = InputSpec.image(3, 224, 200)
    moments = Moments(spec)
    image = torch.rand(64, 3, 224, 200)
    for number in range(1, 41):
        moments.observe(image, torch.zeros(64, dtype=torch.int64))
        moments.end_round("train", number, number)
    tensors: dict[str, torch.Tensor] = {}
    encode(moments.state_dict(), tensors)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) < 1_000_000
    small = moments.chosen()[0].images
    assert small.shape == (4, 3, 56, 50)
    # Each pixel is the mean of the 4 x 4 that it stands for.
    mean = 255 * image[0, :, :4, :4].mean((1, 2))
    assert (small[0, :, 0, 0].float() - mean).abs().max() <= 0.5 + 1e-3


def test_rounds_without_inputs_and_inputs_that_cannot_be_drawn_leave_nothing() -> None:
    moments = followed(3)
    moments.end_round("second", 1, 99)
    assert [moment.step for moment in moments.chosen()] == [10, 20, 30]
    for spec in (InputSpec("embedding", (5,)), InputSpec.image(2, 4, 4), InputSpec("tokens", (7,))):
        other = Moments(spec)
        other.observe(torch.rand(3, *spec.shape), torch.zeros(3, dtype=torch.int64))
        other.end_round("train", 1, 1)
        assert other.chosen() == []
