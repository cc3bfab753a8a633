from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vestige.core.types import InputSpec
from vestige.data.image import ImageSet, list_images, load_images
from vestige.errors import DataError

SPEC = InputSpec.image(3, 4, 6)
NAMES = np.array(["sky", "road"])


def arrays(count: int, *, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of 4x6 pixels that all differ, and masks of 0, 1 and 255."""
    number = np.arange(first, first + count, dtype=np.uint8)
    images = np.tile(number[:, None, None, None], (1, 4, 6, 3))
    masks = np.random.RandomState(first).choice([0, 1, 255], (count, 4, 6)).astype(np.uint8)
    return images, masks


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path))
    for split, count, first in (("train", 20, 0), ("test", 5, 100)):
        images, masks = arrays(count, first=first)
        (tmp_path / "town").mkdir(exist_ok=True)
        np.savez(tmp_path / "town" / f"{split}.npz", x=images, y=masks, classes=NAMES)
    return tmp_path


def save_pictures(folder: Path, images: np.ndarray, masks: np.ndarray, *, first: int = 0) -> None:
    for number, (image, mask) in enumerate(zip(images, masks, strict=True), first):
        for part, values in (("images", image), ("masks", mask)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / part / f"{number:03}.png")


def test_masks_of_an_npz_are_read_as_they_are(folder: Path) -> None:
    found = load_images("town", "test")
    _, masks = arrays(5, first=100)
    inputs, labels = found.examples(SPEC)
    assert inputs.shape == (5, 3, 4, 6) and labels.dtype == torch.int64
    assert np.array_equal(labels.numpy(), masks)
    torch.testing.assert_close(inputs[:, 0, 0, 0], torch.arange(100.0, 105.0) / 255)
    assert found.classes == ("sky", "road")
    train, select = load_images("town", "train"), load_images("town", "select")
    assert (len(train), len(select)) == (18, 2)
    assert np.array_equal(select.labels, arrays(20)[1][18:])
    assert {name: splits for name, _, splits in list_images()}["town"] == {
        "train": 18,
        "select": 2,
        "test": 5,
    }


def test_the_dtype_of_a_mask_does_not_matter_to_its_fingerprint(folder: Path) -> None:
    images, masks = arrays(5, first=100)
    before = load_images("town", "test").fingerprint
    for dtype in (np.int64, np.int32, np.uint16):
        np.savez(folder / "town" / "test.npz", x=images, y=masks.astype(dtype), classes=NAMES)
        assert load_images("town", "test").fingerprint == before
    np.savez(folder / "town" / "test.npz", x=images, y=masks.astype(int) - 1, classes=NAMES)
    negative = load_images("town", "test")
    assert negative.fingerprint != before
    assert np.array_equal(negative.examples(SPEC)[1].numpy(), masks.astype(int) - 1)


def test_masks_are_resized_by_nearest_neighbour_and_images_bilinearly(folder: Path) -> None:
    _, masks = arrays(5, first=100)
    found = load_images("town", "test")
    # Doubled: each pixel four times. Halved: the pixel that the middle of two by two lies in.
    _, large = found.examples(InputSpec.image(3, 8, 12))
    assert np.array_equal(large.numpy(), masks.repeat(2, 1).repeat(2, 2))
    _, small = found.examples(InputSpec.image(3, 2, 3))
    assert np.array_equal(small.numpy(), masks[:, 1::2, 1::2])
    # Where nothing fits: as torch does with the same middles.
    _, odd = found.examples(InputSpec.image(3, 5, 7))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(masks)[:, None].float(), (5, 7), mode="nearest-exact"
    )
    assert torch.equal(odd, expected[:, 0].long())
    assert set(odd.unique().tolist()) <= {0, 1, 255}


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        (np.zeros((5, 4, 5), np.uint8), r"shape \(5, 4, 5\) for 5 images of 4x6 pixels in .*test"),
        (np.zeros((4, 4, 6), np.uint8), r"shape \(4, 4, 6\) for 5 images"),
        (np.zeros((5, 4, 6, 1), np.uint8), r"shape \(5, 4, 6, 1\)"),
        (np.zeros((5, 4, 6)), "dtype float64"),
    ],
)
def test_masks_of_another_form_are_named(folder: Path, masks: np.ndarray, expected: str) -> None:
    np.savez(folder / "town" / "test.npz", x=arrays(5)[0], y=masks)
    with pytest.raises(DataError, match=expected):
        load_images("town", "test")


def test_pictures_with_masks_are_the_same_as_an_npz(folder: Path) -> None:
    for split, count, first in (("train", 20, 0), ("test", 5, 100)):
        images, masks = arrays(count, first=first)
        save_pictures(folder / "pictures" / split, images, masks)
    (folder / "pictures" / "classes.txt").write_text("sky\nroad\n")
    for asked, split, count in (
        ("pictures", "test", 5),
        ("pictures", "train", 18),
        ("pictures", "select", 2),
        (str(folder / "pictures" / "test"), "test", 5),
    ):
        found = load_images(asked, split)
        assert len(found) == count and found.classes == ("sky", "road")
    by_value = {}
    for asked in ("pictures", "town"):
        inputs, masks = load_images(asked, "test").examples(SPEC)
        order = inputs[:, 0, 0, 0].argsort()
        by_value[asked] = inputs[order], masks[order]
    assert torch.equal(by_value["pictures"][0], by_value["town"][0])
    assert torch.equal(by_value["pictures"][1], by_value["town"][1])
    assert {name: splits for name, _, splits in list_images()}["pictures"] == {
        "train": 18,
        "select": 2,
        "test": 5,
    }


def test_a_folder_without_splits_is_divided_by_the_pictures(folder: Path) -> None:
    images = np.random.RandomState(0).randint(0, 256, (30, 4, 6, 3)).astype(np.uint8)
    save_pictures(folder / "whole", images, np.zeros((30, 4, 6), np.uint8))
    sizes = [len(load_images("whole", split)) for split in ("train", "select", "test", "all")]
    assert sum(sizes[:3]) == sizes[3] == 30 and min(sizes) > 0
    assert ImageSet.undivided(str(folder / "whole")) and not ImageSet.undivided("whole")
    # A class of its own called "images" beside others is one of several classes.
    (folder / "whole" / "others").mkdir()
    Image.fromarray(images[0]).save(folder / "whole" / "others" / "a.png")
    assert load_images("whole", "all").classes == ("images", "masks", "others")


def test_palette_and_grey_and_one_bit_masks_hold_numbers(folder: Path) -> None:
    image, numbers = np.zeros((4, 6, 3), np.uint8), np.arange(24).reshape(4, 6).astype(np.uint8) % 2
    (folder / "set/test/images").mkdir(parents=True)
    (folder / "set/test/masks").mkdir()
    palette = Image.fromarray(numbers, "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    for name, mask in {
        "a": palette,
        "b": Image.fromarray(numbers),
        "c": Image.fromarray(numbers.astype(bool)),
    }.items():
        Image.fromarray(image).save(folder / f"set/test/images/{name}.jpg")
        mask.save(folder / f"set/test/masks/{name}.png")
    _, masks = load_images("set", "test").examples(SPEC)
    assert all(np.array_equal(mask, numbers) for mask in masks.numpy())


def test_pictures_may_differ_in_size_but_not_from_their_masks(folder: Path) -> None:
    test = folder / "sizes" / "test"
    save_pictures(test, np.zeros((1, 4, 6, 3), np.uint8), np.zeros((1, 4, 6), np.uint8))
    save_pictures(test, np.ones((1, 8, 8, 3), np.uint8), np.ones((1, 8, 8), np.uint8), first=1)
    _, masks = load_images("sizes", "test").examples(InputSpec.image(3, 4, 4))
    assert sorted(masks.flatten(1).float().mean(1).tolist()) == [0.0, 1.0]
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(test / "masks" / "000.png")
    with pytest.raises(DataError, match=r"masks/000\.png of 5x4 pixels for .*000\.png of 6x4"):
        load_images("sizes", "test")


def test_what_is_no_pair_is_named(folder: Path) -> None:
    test = folder / "pairs" / "test"
    save_pictures(test, *arrays(2))
    (test / "masks/001.png").rename(test / "masks/002.png")
    with pytest.raises(DataError, match=r"images/001\.png and nothing called 001 in .*masks"):
        load_images("pairs", "test")
    (test / "images/001.png").unlink()
    with pytest.raises(DataError, match=r"masks/002\.png and nothing called 002 in .*images"):
        load_images("pairs", "test")
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(test / "masks/002.png")
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(test / "images/002.png")
    with pytest.raises(DataError, match=r"masks/002\.png in mode RGB, expected 8-bit grey"):
        load_images("pairs", "test")
    (test / "masks/002.png").rename(test / "masks/002.bmp")
    with pytest.raises(DataError, match=r"masks/002\.bmp, expected a PNG"):
        load_images("pairs", "test")
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(test / "masks/002.png")
    with pytest.raises(DataError, match="expected each name once"):
        load_images("pairs", "test")
    (test / "masks/002.bmp").unlink()
    assert len(load_images("pairs", "test")) == 2
    (test / "masks/002.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"002\.png, which cannot be read as a picture"):
        load_images("pairs", "test")
    (folder / "pairs/classes.txt").write_text("a\na\n")
    save_pictures(test, *arrays(1), first=2)
    with pytest.raises(DataError, match="a name twice"):
        load_images("pairs", "test")


def test_fingerprint_sees_pictures_masks_and_names(folder: Path) -> None:
    test = folder / "prints" / "test"
    images, masks = arrays(3)
    save_pictures(test, images, masks)
    prints = {load_images("prints", "test").fingerprint}
    for number, path in enumerate(sorted(test.glob("*/*.png"))):
        path.rename(path.with_name(f"{'abc'[number % 3]}.png"))
    assert load_images("prints", "test").fingerprint in prints
    Image.fromarray(255 - masks[0]).save(test / "masks/a.png")
    prints.add(load_images("prints", "test").fingerprint)
    (folder / "prints/classes.txt").write_text("sky\nroad\n")
    prints.add(load_images("prints", "test").fingerprint)
    assert len(prints) == 3


def test_camvid() -> None:
    try:
        found = load_images("camvid", "select")
    except DataError as error:
        pytest.skip(str(error))
    assert len(found) == 101 and len(found.classes) == 11
    _, masks = found.examples(InputSpec.image(3, 48, 64))
    assert masks.shape == (101, 48, 64)
    assert set(masks.unique().tolist()) == {*range(11), 255}
