"""Sets of pictures in class folders, and sets that are stored in one piece."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vestige.core.types import InputSpec
from vestige.data.image import ImageSet, list_images, load_images, to_inputs
from vestige.errors import DataError

GREY, COLOUR = InputSpec.image(1, 6, 5), InputSpec.image(3, 6, 5)


def images(count: int, *, seed: int = 0, size: tuple[int, ...] = (6, 5)) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, *size)).astype(np.uint8)


def save(folder: Path, pixels: np.ndarray, names: list[str], *, suffix: str = "png") -> None:
    """Picture i goes into the class folder names[i]."""
    for number, (one, name) in enumerate(zip(pixels, names, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(folder / name / f"{number}.{suffix}")


def rows(found: ImageSet, spec: InputSpec) -> list[tuple[bytes, str]]:
    """Contents with the names of their classes, in an order of their own."""
    inputs, labels = found.examples(spec)
    named = [found.classes[label] for label in labels.tolist()]
    return sorted(zip((one.numpy().tobytes() for one in inputs), named, strict=True))


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path / "sets"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sets"


@pytest.mark.parametrize(("size", "spec"), [((6, 5), GREY), ((6, 5, 3), COLOUR)])
@pytest.mark.parametrize("stored", ["same size", "resized"])
def test_pictures_and_arrays_are_the_same_examples(
    sets: Path, size: tuple[int, ...], spec: InputSpec, stored: str
) -> None:
    pixels = images(12, size=size if stored == "same size" else (13, 9, *size[2:]))
    names = ["cat", "ant", "dog"] * 4
    save(sets / "drawn/test", pixels, names)
    (sets / "packed").mkdir()
    classes = ["dog", "cat", "ant"]
    labels = np.array([classes.index(name) for name in names], dtype=np.uint8)
    np.savez(sets / "packed/test.npz", x=pixels, y=labels, classes=classes)
    drawn, packed = load_images("drawn", "test"), load_images("packed", "test")
    assert drawn.classes == ("ant", "cat", "dog")
    # PNG loses nothing, and both are resized once, by the same function.
    assert rows(drawn, spec) == rows(packed, spec)


def test_pictures_of_any_size_and_mode_are_read_as_the_spec_says(sets: Path) -> None:
    folder = sets / "mixed/test/a"
    folder.mkdir(parents=True)
    colour = images(1, size=(6, 5, 3))[0]
    Image.fromarray(colour).save(folder / "rgb.png")
    Image.fromarray(np.dstack([colour, images(1)[0]])).save(folder / "rgba.png")
    grey = images(1, seed=1)[0]
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(grey.repeat(4, 0).repeat(4, 1)).save(folder / "large.bmp")
    found = load_images("mixed", "test")
    order = [path.name for path in found.images.paths]
    inputs = dict(zip(order, found.inputs(COLOUR), strict=True))
    assert torch.equal(inputs["rgb.png"], to_inputs(colour[None], COLOUR)[0])
    assert torch.equal(inputs["rgba.png"], inputs["rgb.png"])
    assert torch.equal(inputs["grey.png"], to_inputs(grey[None], COLOUR)[0])
    # 16 bits hold the same picture, which clipping would have turned white.
    assert torch.equal(inputs["sixteen.png"], inputs["grey.png"])
    large = to_inputs(grey.repeat(4, 0).repeat(4, 1)[None], COLOUR)[0]
    assert torch.equal(inputs["large.bmp"], large)
    in_grey = found.inputs(GREY)
    assert in_grey.shape == (5, 1, 6, 5)
    luma = (colour @ np.array([0.299, 0.587, 0.114]) / 255).astype(np.float32)
    read = in_grey[order.index("rgb.png"), 0].numpy()
    np.testing.assert_allclose(read, luma, atol=1 / 255)  # Pillow cuts to whole values.


def test_fingerprint_is_of_contents_not_of_names_or_places(sets: Path) -> None:
    pixels = images(6)
    save(sets / "one/test", pixels, ["a", "b"] * 3)
    before = load_images("one", "test")
    inputs = before.inputs(GREY)
    os.rename(sets / "one", sets / "two")
    for number, path in enumerate(sorted((sets / "two").rglob("*.png"))):
        path.rename(path.with_name(f"renamed{99 - number}.png"))
    after = load_images("two", "test")
    assert after.fingerprint == before.fingerprint
    assert torch.equal(after.inputs(GREY), inputs)
    seen = {before.fingerprint}
    moved = next((sets / "two/test/a").iterdir())
    moved.rename(sets / "two/test/b" / moved.name)
    seen.add(load_images("two", "test").fingerprint)
    (sets / "two/test/b").rename(sets / "two/test/c")
    seen.add(load_images("two", "test").fingerprint)
    save(sets / "two/test", images(1, seed=7), ["c"])
    seen.add(load_images("two", "test").fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize("kind", ["CLASS", "all/CLASS", "all.npz"])
def test_one_piece_is_divided_by_content(sets: Path, kind: str) -> None:
    pixels, names = images(300), [f"c{number % 3}" for number in range(300)]
    folder = sets / "heap"
    folder.mkdir(parents=True)
    if kind == "all.npz":
        np.savez(folder / "all.npz", x=pixels, y=np.arange(300) % 3, classes=["c0", "c1", "c2"])
    else:
        save(folder / kind.removesuffix("CLASS"), pixels, names)

    def parts() -> dict[str, list[tuple[bytes, str]]]:
        return {
            split: rows(load_images("heap", split), GREY) for split in ("train", "select", "test")
        }

    before = parts()
    whole = rows(load_images("heap", "all"), GREY)
    # Disjoint and complete: the 300 differ, and each is in exactly one split.
    assert sorted(row for part in before.values() for row in part) == whole
    assert len({content for content, _ in whole}) == 300
    # Binomial(300, p): four standard deviations around 240, 30 and 30.
    assert abs(len(before["train"]) - 240) < 28
    assert abs(len(before["select"]) - 30) < 21 and abs(len(before["test"]) - 30) < 21
    if kind == "all.npz":
        order = np.random.RandomState(1).permutation(300)
        stored = dict(np.load(folder / "all.npz"))
        np.savez(folder / "all.npz", x=pixels[order], y=stored["y"][order], classes=names[:3])
    else:
        for number, path in enumerate(sorted(folder.rglob("*.png"), reverse=True)):
            path.rename(path.with_name(f"x{number}.png"))
    assert parts() == before


def test_equal_pictures_fall_into_one_split(sets: Path) -> None:
    save(sets / "heap", np.repeat(images(1), 20, 0), ["a", "b"] * 10)
    held = []
    for split in ("train", "select", "test"):
        try:
            held.append(len(load_images("heap", split)))
        except DataError as error:
            assert f"no images for the '{split}' split" in str(error)
    assert held == [20]


def test_last_tenth_of_train_has_all_classes(sets: Path) -> None:
    names = sorted("ab"[number % 2] for number in range(200))
    save(sets / "sorted/train", images(200), names)
    train, select = load_images("sorted", "train"), load_images("sorted", "select")
    assert (len(train), len(select)) == (180, 20)
    # In the order of names the last tenth would be of one class.
    assert set(select.labels.tolist()) == {0, 1}
    assert not {row[0] for row in rows(train, GREY)} & {row[0] for row in rows(select, GREY)}
    save(sets / "sorted/val", images(3, seed=5), ["a", "b", "b"])
    assert len(load_images("sorted", "train")) == 200
    assert len(load_images("sorted", "select")) == 3


def test_splits_number_their_classes_alike(sets: Path) -> None:
    save(sets / "some/train", images(30), ["a", "b", "c"] * 10)
    save(sets / "some/test", images(4, seed=1), ["a", "c"] * 2)
    for name in ("some", str(sets / "some/test")):
        test = load_images(name, "test")
        assert test.classes == ("a", "b", "c")
        assert sorted(test.labels.tolist()) == [0, 0, 2, 2]


@pytest.mark.parametrize("name", ["test", "one.npz"])
def test_what_is_one_split_judges_and_never_trains(sets: Path, name: str) -> None:
    if name == "test":
        save(sets / "test", images(4), ["a", "b"] * 2)
    else:
        sets.mkdir()
        np.savez(sets / name, x=images(4), y=np.arange(4) % 2)
    asked = str(sets / name)
    assert len(load_images(asked, "test")) == len(load_images(asked, "all")) == 4
    for split in ("train", "select"):
        with pytest.raises(DataError, match="what judges must not train; name the folder"):
            load_images(asked, split)


def test_a_broken_picture_is_named(sets: Path) -> None:
    save(sets / "some/test", images(3), ["a", "b", "b"])
    whole = (sets / "some/test/a/0.png").read_bytes()
    for broken in (b"", b"no picture", whole[:20], whole[: len(whole) // 2]):
        (sets / "some/test/b/bad.png").write_bytes(broken)
        found = load_images("some", "test")
        with pytest.raises(DataError, match=r"bad\.png, which cannot be read as a picture"):
            found.examples(GREY)
    (sets / "some/test/b/bad.png").unlink()
    Image.fromarray(images(1)[0].astype(np.int32) * 1000).save(sets / "some/test/b/deep.tif")
    with pytest.raises(DataError, match=r"deep\.tif.*32 bits per channel"):
        load_images("some", "test").inputs(GREY)


def test_nothing_is_left_out_in_silence(sets: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(sets / "some/test", images(3), ["a", "b", "b"])
    (sets / "some/test/a/.DS_Store").write_bytes(b"hidden")
    load_images("some", "test")
    assert not caplog.records
    (sets / "some/test/a/photo.heic").write_bytes(b"unknown")
    load_images("some", "test")
    assert "photo.heic" in caplog.text
    save(sets / "some/test/a", images(1), ["deeper"])
    with pytest.raises(DataError, match="expected them in the class's own folder"):
        load_images("some", "test")


def test_pictures_that_no_class_folder_holds_are_refused(sets: Path) -> None:
    save(sets / "flat", images(4), ["train", "test", "train", "test"])
    with pytest.raises(DataError, match=r"itself, expected them in one folder per class"):
        load_images("flat", "test")


def test_no_names_are_needed_and_any_integers_do(sets: Path) -> None:
    sets.mkdir()
    labels = np.array([0, 4, 2])
    for dtype in (np.uint8, np.int8, np.int32, np.uint64):
        np.savez(sets / "mine.npz", x=images(3)[..., None], y=labels.astype(dtype))
        found = load_images(str(sets / "mine.npz"), "test")
        inputs, numbers = found.examples(GREY)
        assert numbers.dtype == torch.int64 and numbers.tolist() == [0, 4, 2]
        assert torch.equal(inputs, to_inputs(images(3), GREY))
        assert found.classes == ()


def test_sets_of_pictures_are_listed_and_found(sets: Path) -> None:
    save(sets / "some/train", images(30), ["a", "b", "c"] * 10)
    save(sets / "some/test", images(4), ["a", "c"] * 2)
    save(sets / "heap", images(5), ["a"] * 5)
    save(sets / "wrong", images(2), ["train", "test"])
    listed = {name: splits for name, _, splits in list_images()}
    assert listed["some"] == {"train": 27, "select": 3, "test": 4}
    assert listed["heap"] == {"all": 5}
    assert set(listed["wrong"].values()) == {"damaged"}
    for split in ("train", "select", "test"):
        ImageSet.find("some", split)
        ImageSet.find("heap", split)
    with pytest.raises(DataError, match="no class folders of pictures"):
        ImageSet.find("none", "test")
    # By name a heap is divided; a path to it may be judged whole.
    assert not ImageSet.undivided("heap") and ImageSet.undivided(str(sets) + "/../sets/heap/.")
    assert not ImageSet.undivided(str(sets / "some")) and not ImageSet.undivided("digits")


@pytest.mark.parametrize("name", ["x" * 300, "./" + "x" * 300, "x" * 300 + ".npz"])
def test_names_that_no_file_can_have_are_refused(sets: Path, name: str) -> None:
    assert not ImageSet.undivided(name)
    # Python versions differ in whether asking for such a file is an error of its own.
    with pytest.raises(DataError, match=r"got (no file|the data set)"):
        load_images(name, "test")


def test_a_folder_that_may_not_be_read_is_named(
    sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(sets / "some/test", images(2), ["a", "b"])

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"'some', which cannot be looked into .*Permission denied"):
        load_images("some", "test")


def test_one_piece_or_splits_not_both(sets: Path) -> None:
    save(sets / "some/test", images(4), ["a", "c"] * 2)
    with pytest.raises(DataError, match="is divided into test; name one"):
        load_images("some", "all")
    with pytest.raises(DataError, match="got split 'all' of 'digits'"):
        load_images("digits", "all")
