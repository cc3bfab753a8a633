from pathlib import Path

import numpy as np
import pytest

from vestige.core.types import InputSpec
from vestige.data.image import ImageSet, load_images
from vestige.errors import DataError
from vestige.training.pictures import save_png

NAMES = np.array(["cat", "dog", "ship"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path))
    (tmp_path / "pets").mkdir()
    for split, count in (("train", 40), ("test", 9)):
        number = np.arange(count)
        images = np.tile(number.astype(np.uint8)[:, None, None], (1, 4, 4))
        np.savez(tmp_path / "pets" / f"{split}.npz", x=images, y=number % 3, classes=NAMES)
    return tmp_path


def test_only_these_classes_numbered_as_given(folder: Path) -> None:
    whole, some = load_images("pets", "test"), load_images("pets[ship, cat]", "test")
    assert some.classes == ("ship", "cat") and some.name == "pets[ship,cat]"
    assert some.images[:, 0, 0].tolist() == [0, 2, 3, 5, 6, 8]
    assert some.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert some.fingerprint not in (whole.fingerprint, load_images("pets[cat,ship]", "test"))
    assert some.fingerprint == load_images("pets[ship,cat]", "test").fingerprint
    all_ = load_images("pets[cat,dog,ship]", "test")
    assert np.array_equal(all_.labels, whole.labels) and all_.fingerprint == whole.fingerprint


def test_the_split_for_selection_is_cut_before_classes_are_taken(folder: Path) -> None:
    select = load_images("pets[dog]", "select")
    assert select.images[:, 0, 0].tolist() == [37]
    train = load_images("pets[dog]", "train")
    assert train.images[:, 0, 0].tolist() == [n for n in range(36) if n % 3 == 1]


def test_digits_and_folders_of_pictures_have_subsets(folder: Path) -> None:
    some, whole = load_images("digits[3,8]", "test"), load_images("digits", "test")
    assert len(some) == 100 and some.classes == ("3", "8")
    assert np.array_equal(some.images[some.labels == 1], whole.images[whole.labels == 8])
    for number in range(6):
        path = folder / "folders/test" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(np.full((4, 4), number, np.uint8), path)
    some = load_images("folders[c,a]", "test")
    inputs, labels = some.examples(InputSpec.image(1, 4, 4))
    values = (inputs[:, 0, 0, 0] * 255).round().int().tolist()
    assert sorted(zip(values, labels.tolist(), strict=True)) == [(0, 1), (2, 0), (3, 1), (5, 0)]
    prints = {load_images(f"folders{one}", "test").fingerprint for one in ("", "[a,c]", "[c,a]")}
    assert len(prints | {some.fingerprint}) == 3
    by_path = load_images(f"{folder}/folders/test[c,a]", "test")
    assert by_path.fingerprint == some.fingerprint


def test_unknown_and_wrong_names_are_told(folder: Path) -> None:
    with pytest.raises(DataError, match=r"classes shipp of data set 'pets'.*did you mean 'ship'"):
        load_images("pets[cat,shipp]", "test")
    with pytest.raises(DataError, match="did you mean 'ship'"):
        ImageSet.find("pets[cat,shipp]", "test")
    ImageSet.find("pets[cat,ship]", "test")
    for wrong in ("pets[]", "pets[cat,cat]", "pets[cat,]", "[cat]"):
        with pytest.raises(DataError, match="with each class once"):
            load_images(wrong, "test")
    with pytest.raises(DataError, match=r"no file .*gone/test\.npz"):
        load_images("gone[cat]", "test")
    np.savez(folder / "pets/test.npz", x=np.zeros((3, 4, 4), np.uint8), y=np.arange(3))
    with pytest.raises(DataError, match="pets names no classes"):
        load_images("pets[cat]", "test")
    with pytest.raises(DataError, match="class for every pixel"):
        load_images("scenes[disc,ring]", "test")
    with pytest.raises(DataError, match="no images for the 'test' split"):
        np.savez(folder / "pets/test.npz", x=np.zeros((3, 4, 4), np.uint8), y=[0] * 3,
                 classes=NAMES)  # fmt: skip
        load_images("pets[dog]", "test")


def test_a_folder_with_brackets_in_its_name_is_itself(folder: Path) -> None:
    (folder / "pets").rename(folder / "pets[cat]")
    assert len(load_images("pets[cat]", "test")) == 9
    assert load_images("pets[cat][cat]", "test").name == "pets[cat][cat]"
