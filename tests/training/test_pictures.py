"""Contact sheets hold the pixels they were given, and a PNG is written whole or not at all."""

import os
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from vestige.errors import ShapeError
from vestige.training.pictures import PAPER, answer_grid, contact_sheet, save_png, time_strip


def _read(path: Path) -> np.ndarray:
    return np.rint(matplotlib.image.imread(path) * 255).astype(np.uint8)


def test_pixels_are_enlarged_and_separated() -> None:
    images = torch.arange(3 * 2 * 2).reshape(3, 1, 2, 2) / 255
    sheet = contact_sheet(images, columns=2, scale=3, gap=1)
    assert sheet.shape == (1 + 2 * (6 + 1), 1 + 2 * (6 + 1), 3) and sheet.dtype == np.uint8
    for index, (top, left) in enumerate([(1, 1), (1, 8), (8, 1)]):
        tile = sheet[top : top + 6, left : left + 6]
        expected = np.kron(np.arange(4 * index, 4 * index + 4).reshape(2, 2), np.ones((3, 3)))
        for channel in range(3):
            np.testing.assert_array_equal(tile[..., channel], expected)
    # Gaps and the place of the missing fourth image are paper.
    assert (sheet[0] == PAPER).all() and (sheet[:, 7] == PAPER).all()
    assert (sheet[8:, 8:] == PAPER).all()


def test_colour_channels_keep_their_order() -> None:
    image = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)
    assert contact_sheet(image, columns=1, gap=0).tolist() == [[[0, 128, 255]]]


def test_values_out_of_range_and_nan_are_drawn() -> None:
    images = torch.tensor([-1.0, 2.0, float("nan"), float("inf")]).reshape(4, 1, 1, 1)
    assert contact_sheet(images, columns=4, gap=0)[0, :, 0].tolist() == [0, 255, 0, 255]


def test_labels_gather_a_class_in_a_row_behind_its_caption() -> None:
    values = torch.tensor([10, 20, 11, 21, 12]) / 255
    images = values.reshape(5, 1, 1, 1).expand(5, 1, 16, 16)
    sheet = contact_sheet(images, columns=2, gap=2, labels=["a", "b", "a", "b", "a"])
    # Two columns of 16 and three gaps stand at the right end; class a needs two rows.
    right = sheet[:, -(2 * 18 + 2) :, 0]
    assert sheet.shape[0] == 2 + 3 * 18
    assert [int(right[2 + 18 * row, 2]) for row in range(3)] == [10, 12, 20]
    assert [int(right[2 + 18 * row, 20]) for row in range(3)] == [11, PAPER, 21]
    captions = sheet[:, : -(2 * 18), 0]
    inked = [bool((captions[2 + 18 * row : 18 + 18 * row] < 128).any()) for row in range(3)]
    assert inked == [True, False, True]


@pytest.mark.parametrize("name", ["$x", "$\\frac$", "漢字", "", "x" * 200, "two\nlines"])
def test_any_class_name_can_be_a_caption(name: str) -> None:
    sheet = contact_sheet(torch.zeros(1, 1, 4, 4), columns=1, labels=[name])
    assert sheet.shape[0] == 4 + 2 * 2 and sheet.shape[1] < 420


@pytest.mark.parametrize(
    ("images", "options"),
    [
        (torch.zeros(2, 2, 4, 4), {}),
        (torch.zeros(3, 4, 4), {}),
        (torch.zeros(0, 1, 4, 4), {}),
        (torch.zeros(1, 1, 4, 4), {"columns": 0}),
        (torch.zeros(1, 1, 4, 4), {"scale": 0}),
        (torch.zeros(1, 1, 4, 4), {"gap": -1}),
        (torch.zeros(2, 1, 4, 4), {"labels": ["a"]}),
    ],
)
def test_what_does_not_fit_is_refused(images: torch.Tensor, options: dict) -> None:
    with pytest.raises(ShapeError, match="expected"):
        contact_sheet(images, **{"columns": 1, **options})


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4), (1, 1)])
def test_png_round_trip_is_exact(tmp_path: Path, shape: tuple[int, ...]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save_png(picture, tmp_path / "a.png")
    np.testing.assert_array_equal(_read(tmp_path / "a.png"), picture)


@pytest.mark.parametrize(
    "picture", [np.zeros((2, 2)), np.zeros((2, 2, 2), np.uint8), np.zeros((0, 2), np.uint8)]
)
def test_png_refuses_what_is_no_picture(tmp_path: Path, picture: np.ndarray) -> None:
    with pytest.raises(ShapeError):
        save_png(picture, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_png(np.zeros((2, 2), np.uint8), tmp_path / "a.png")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_png(np.ones((2, 2), np.uint8), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert _read(tmp_path / "a.png").max() == 0


def test_moments_stand_in_columns_with_a_caption_under_each_image() -> None:
    images = torch.tensor([10, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    strip = time_strip([("round 1", images, ["a", "b"]), ("round 9", images[:1], ["c"])])
    side = 14 * 8  # 8 pixels, enlarged to as many whole times as 112 holds
    line = (strip.shape[0] - 2 * side) // 3
    assert strip.shape == (line + 2 * (side + line), 2 * (side + 16) - 16, 3)
    for row, value in ((0, 10), (1, 200)):
        top = line + row * (side + line)
        assert (strip[top : top + side, :side] == value).all()
        caption = strip[top + side : top + side + line, :side]
        assert (caption == PAPER).any() and (caption < PAPER).any()
    assert (strip[line : line + side, side + 16 :] == 10).all()
    # The second moment has one image only: below its caption there is paper.
    assert (strip[2 * line + side :, side + 16 :] == PAPER).all()


def test_a_strip_refuses_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="no columns"):
        time_strip([])
    with pytest.raises(ShapeError, match="1 labels for 2 images"):
        time_strip([("round 1", torch.zeros(2, 1, 4, 4, dtype=torch.uint8), ["a"])])


def test_answers_stand_in_columns_under_their_headings() -> None:
    def flat(*values: float, channels: int = 3) -> torch.Tensor:
        return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, channels, 32, 64)

    columns = {
        "input": flat(0.0, 0.2, channels=1),
        "teacher": flat(0.4, 0.6),
        "truth": flat(0.8, 1),
    }
    sheet = answer_grid(columns)
    line, gap, height, width = 22, 8, 64, 128  # enlarged to as many whole times as 128 holds
    assert sheet.shape == (gap + line + 2 * (height + gap), gap + 3 * (width + gap), 3)
    for column, values in enumerate(((0, 51), (102, 153), (204, 255))):
        left = gap + column * (width + gap)
        heading = sheet[: gap + line, left : left + width]
        assert (heading < PAPER).any() and (heading == PAPER).any()
        for row, value in enumerate(values):
            top = gap + line + row * (height + gap)
            assert (sheet[top : top + height, left : left + width] == value).all()
    # What lies between is paper.
    assert (sheet[:, :gap] == PAPER).all() and (sheet[-gap:] == PAPER).all()


def test_large_answers_are_made_smaller_and_narrow_ones_leave_room_for_the_heading() -> None:
    large = answer_grid({"input": torch.zeros(1, 3, 1000, 2000)})
    assert large.shape == (8 + 22 + 160 + 8, 8 + 320 + 8, 3)
    narrow = answer_grid({"input": torch.zeros(1, 1, 128, 2), "truth": torch.zeros(1, 1, 128, 2)})
    assert narrow.shape[1] == 8 + 2 * (64 + 8)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "no columns"),
        ({"input": torch.zeros(2, 2, 4, 4)}, "C 1 or 3"),
        ({"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(1, 3, 4, 4)}, "the same for all"),
        ({"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(2, 3, 4, 5)}, "the same for all"),
    ],
)
def test_a_grid_refuses_what_does_not_fit(columns: dict, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        answer_grid(columns)
