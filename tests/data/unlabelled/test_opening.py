"""What a name stands for: folders, files and sets of the data folder, labels left alone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vestige.core.types import InputSpec
from vestige.data.image import load_images
from vestige.data.unlabelled.decoding import Unlabelled
from vestige.data.unlabelled.opening import find_unlabelled, open_unlabelled
from vestige.errors import DataError

SPEC = InputSpec.image(1, 6, 5)


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def images(count: int, first: int = 0) -> np.ndarray:
    found = np.zeros((count, 6, 5), dtype=np.uint8)
    found[:, 0, 0] = np.arange(first, first + count)
    found[:, 5, 4] = 255
    return found


def read(found: Unlabelled) -> list[int]:
    """The marks of the images, which tell them apart."""
    blocks = found.blocks(SPEC, np.arange(len(found)))
    return sorted(int(one[0, 0, 0]) for block in blocks for one in block.images)


def save(folder: Path, split: str, count: int, first: int = 0) -> None:
    """With labels that nothing can read."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.array([{"no": "label"}] * count, dtype=object)
    np.savez(folder / f"{split}.npz", x=images(count, first), y=labels, classes=labels)


def pictures(folder: Path, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images(count, first)):
        Image.fromarray(image).save(folder / f"{number}.png")


def test_a_set_opens_although_its_labels_cannot_be_read(data: Path) -> None:
    save(data / "web", "train", 20)
    save(data / "web", "test", 5, 100)
    with pytest.raises(DataError):
        load_images("web", "train")
    assert read(open_unlabelled("web")) == list(range(18))
    assert read(open_unlabelled("web", split="train")) == list(range(18))
    assert read(open_unlabelled("web", split="select")) == [18, 19]
    assert read(open_unlabelled("web", split="test")) == list(range(100, 105))
    assert open_unlabelled("web").name == "web/train"
    with pytest.raises(DataError, match=r"got split 'all' of .*divided into test, train"):
        open_unlabelled("web", split="all")


def test_splits_are_those_of_labelled_sets(data: Path) -> None:
    (data / "both").mkdir(parents=True)
    for split, count in (("train", 30), ("test", 8)):
        np.savez(data / "both" / f"{split}.npz", x=images(count), y=np.zeros(count, dtype=int))
    np.savez(data / "both2.npz", x=images(50), y=np.zeros(50, dtype=int))
    (data / "one").mkdir()
    np.savez(data / "one" / "all.npz", x=images(200), y=np.zeros(200, dtype=int))
    for name in ("both", "one"):
        for split in ("train", "select", "test"):
            labelled = load_images(name, split).images
            expected = sorted(int(one[0, 0]) for one in labelled)  # type: ignore[union-attr]
            assert read(open_unlabelled(name, split=split)) == expected, (name, split)
    assert len(open_unlabelled("one")) == 200


def test_pictures_at_any_depth_are_all_there_is(tmp_path: Path) -> None:
    pictures(tmp_path / "web", 3)
    pictures(tmp_path / "web" / "cats" / "small", 4, 10)
    expected = [0, 1, 2, 10, 11, 12, 13]
    assert read(open_unlabelled("./web")) == expected
    assert read(open_unlabelled(str(tmp_path / "web"), split="all")) == expected
    assert open_unlabelled("web").name == "web"


def test_a_share_of_a_folder_is_by_content(tmp_path: Path) -> None:
    pictures(tmp_path / "web", 60)
    parts = {split: read(open_unlabelled("web", split=split)) for split in ("train", "test")}
    parts["select"] = read(open_unlabelled("web", split="select"))
    assert sorted(mark for part in parts.values() for mark in part) == list(range(60))
    # 80 % of 60, give or take four standard deviations.
    assert 36 <= len(parts["train"]) <= 60


def test_folders_of_splits_are_not_mixed(tmp_path: Path) -> None:
    pictures(tmp_path / "web" / "train" / "cats", 20)
    pictures(tmp_path / "web" / "test", 5, 100)
    assert len(read(open_unlabelled("web"))) == 18
    assert read(open_unlabelled("web", split="test")) == list(range(100, 105))
    # The folder of one split is a folder of pictures.
    assert len(open_unlabelled("web/train")) == 20


def test_masks_beside_pictures_are_no_pictures(tmp_path: Path) -> None:
    for split, count, first in (("train", 20, 0), ("test", 5, 100)):
        pictures(tmp_path / "web" / split / "images", count, first)
        pictures(tmp_path / "web" / split / "masks", count, 200)
    assert len(read(open_unlabelled("web"))) == 18
    assert read(open_unlabelled("web", split="test")) == list(range(100, 105))
    assert read(open_unlabelled("web/test")) == list(range(100, 105))


def test_files_are_whole(tmp_path: Path) -> None:
    np.save(tmp_path / "web.npy", images(7))
    np.savez(tmp_path / "web.npz", x=images(6))
    assert read(open_unlabelled("web.npy")) == list(range(7))
    assert read(open_unlabelled("web.npz", split="all")) == list(range(6))
    with pytest.raises(DataError, match=r"got split 'train' of web\.npz, which is one file"):
        open_unlabelled("web.npz", split="train")


def test_the_built_in_set_is_there() -> None:
    assert len(open_unlabelled("digits")) == len(load_images("digits", "train"))
    assert len(open_unlabelled("digits", split="test")) == 500


def test_a_choice_of_classes_is_left_to_the_labelled_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> object:
        asked.append((name, split))
        return load_images("digits", split)

    monkeypatch.setattr("vestige.data.unlabelled.opening.load_images", load)
    monkeypatch.setattr(
        "vestige.data.unlabelled.opening.ImageSet.find", lambda name, split: asked.append((name,))
    )
    assert len(open_unlabelled("digits[1,7]", split="test")) == 500
    assert asked == [("digits[1,7]",), ("digits[1,7]", "test")]


def test_a_folder_that_is_spelled_like_a_choice_is_a_folder(tmp_path: Path) -> None:
    pictures(tmp_path / "web[2024]", 3)
    assert read(open_unlabelled("./web[2024]")) == [0, 1, 2]


def test_what_is_missing_is_named(tmp_path: Path, data: Path) -> None:
    for name, told in {
        "nowhere": f"got no folder {data / 'nowhere'} for 'nowhere', expected a folder of",
        "./nowhere/at/all": "got no folder .*nowhere/at/all",
        "gone.npz": "got no file gone.npz",
        "gone.npy": "got no file gone.npy",
        "a\0b": "a name or a folder",
    }.items():
        with pytest.raises(DataError, match=told):
            find_unlabelled(name)
    with pytest.raises(DataError, match="got split 'dev', expected one of"):
        find_unlabelled("nowhere", "dev")
    pictures(tmp_path / "web", 1)
    with pytest.raises(DataError, match="got column 'image' for 'web'"):
        open_unlabelled("web", column="image")


def test_finding_reads_nothing(data: Path) -> None:
    (data / "web").mkdir(parents=True)
    (data / "web" / "train.npz").write_bytes(b"this is no archive")
    assert find_unlabelled("web").part.path == data / "web" / "train.npz"
    with pytest.raises(DataError, match="cannot be read"):
        open_unlabelled("web")
