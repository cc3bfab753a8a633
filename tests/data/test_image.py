import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from vestige.core.types import InputSpec
from vestige.data.image import (
    channel_statistics,
    data_folder,
    list_images,
    load_images,
    to_inputs,
)
from vestige.errors import DataError, ShapeError

CLASSES = np.array(["a", "b", "c"])


def write(path: Path, count: int, *, first: int = 0, colour: bool = False) -> None:
    """Images that all differ: image i is filled with the value i, its label is i modulo 3."""
    number = np.arange(first, first + count)
    images = np.tile(number.astype(np.uint8)[:, None, None], (1, 4, 5))
    if colour:
        images = np.stack([images] * 3, axis=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x=images, y=number % 3, classes=CLASSES)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path))
    write(tmp_path / "plain" / "train.npz", 105)
    write(tmp_path / "plain" / "test.npz", 7, first=200)
    return tmp_path


def test_digits_are_split_as_documented() -> None:
    splits = {split: load_images("digits", split) for split in ("train", "select", "test")}
    assert [len(found) for found in splits.values()] == [1168, 129, 500]
    assert np.bincount(splits["test"].labels).tolist() == [50] * 10
    assert splits["train"].images.dtype == np.uint8 and splits["train"].images.shape[1:] == (8, 8)
    assert splits["train"].images.min() == 0 and splits["train"].images.max() == 255

    sklearn_digits = pytest.importorskip("sklearn.datasets").load_digits()
    seen = [
        (label, image.tobytes())
        for found in splits.values()
        for label, image in zip(found.labels, found.images, strict=True)
    ]
    stored = np.rint(sklearn_digits.images * 255 / 16).astype(np.uint8)
    expected = [(y, x.tobytes()) for y, x in zip(sklearn_digits.target, stored, strict=True)]
    # Each of the 1,797 appears exactly once: nothing is lost, and no split shares an image.
    assert sorted(seen) == sorted(expected)


def test_digits_never_change() -> None:
    fingerprints = {
        split: load_images("digits", split).fingerprint[:16]
        for split in ("train", "select", "test")
    }
    assert fingerprints == {
        "train": "21a9fa08eebdfd74",
        "select": "96a29f1098e323f4",
        "test": "ec354549f59ec837",
    }


def test_last_tenth_of_train_is_select(folder: Path) -> None:
    train, select = load_images("plain", "train"), load_images("plain", "select")
    assert train.images[:, 0, 0].tolist() == list(range(95))
    assert select.images[:, 0, 0].tolist() == list(range(95, 105))
    assert load_images("plain", "test").images[:, 0, 0].tolist() == list(range(200, 207))
    assert select.path == train.path == folder / "plain" / "train.npz"
    assert train.classes == ("a", "b", "c") and train.name == "plain"


@pytest.mark.parametrize("stem", ["select", "val"])
def test_a_selection_file_leaves_train_whole(folder: Path, stem: str) -> None:
    write(folder / "plain" / f"{stem}.npz", 3, first=150)
    assert len(load_images("plain", "train")) == 105
    assert load_images("plain", "select").images[:, 0, 0].tolist() == [150, 151, 152]


def test_a_path_is_a_folder_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = load_images("plain", "test")
    monkeypatch.setenv("VESTIGE_DATA", str(folder / "elsewhere"))
    by_path = load_images(str(folder / "plain"), "test")
    assert by_path.fingerprint == by_name.fingerprint and by_path.name == "plain"


def test_fingerprint_sees_every_content(folder: Path) -> None:
    prints = {load_images("plain", "test").fingerprint}
    path = folder / "plain" / "test.npz"
    stored = dict(np.load(path))
    changed = {
        "x": stored["x"] ^ (np.arange(stored["x"].size).reshape(stored["x"].shape) == 3),
        "y": stored["y"][::-1].copy(),
        "classes": np.array(["a", "b", "d"]),
    }
    for key, value in changed.items():
        np.savez(path, **{**stored, key: value})
        prints.add(load_images("plain", "test").fingerprint)
    np.savez(path, **{**stored, "x": stored["x"].reshape(7, 5, 4)})
    prints.add(load_images("plain", "test").fingerprint)
    assert len(prints) == 5


def test_data_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VESTIGE_DATA", "/somewhere")
    assert data_folder() == Path("/somewhere")
    monkeypatch.delenv("VESTIGE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data_folder() == Path("/cache/vestige/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_folder() == Path.home() / ".cache" / "vestige" / "data"


def test_missing_set_says_which_file_and_where(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_images("mnist", "test")
    message = str(caught.value)
    assert str(folder / "mnist" / "test.npz") in message
    assert "numpy.savez" in message and "uint8 (N, H, W)" in message


def test_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="'validation', expected one of train, select, test"):
        load_images("digits", "validation")


IMAGES, LABELS = np.zeros((4, 2, 2), np.uint8), np.arange(4) % 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"x": IMAGES, "classes": CLASSES}, "add y"),
        ({"x": IMAGES.astype(float), "y": LABELS, "classes": CLASSES}, "x of dtype float64"),
        ({"x": IMAGES[0], "y": LABELS, "classes": CLASSES}, r"shape \(2, 2\)"),
        ({"x": np.zeros((4, 2, 2, 4), np.uint8), "y": LABELS, "classes": CLASSES}, "4 channels"),
        ({"x": IMAGES, "y": LABELS.astype(float), "classes": CLASSES}, "y of dtype float64"),
        ({"x": IMAGES > 0, "y": LABELS}, "x of dtype bool"),
        ({"x": np.zeros((4, 3, 2, 2), np.uint8), "y": LABELS}, "channels come first"),
        ({"x": IMAGES, "y": LABELS - 1}, "y from -1 to 1 in"),
        ({"x": IMAGES, "y": LABELS[:3], "classes": CLASSES}, "for 4 images"),
        ({"x": IMAGES, "y": LABELS + 1, "classes": CLASSES}, "from 1 to 3 for 3 class names"),
        ({"x": IMAGES, "y": LABELS - 1, "classes": CLASSES}, "from -1 to 1"),
        ({"x": IMAGES, "y": LABELS, "classes": np.arange(3)}, "classes of dtype int64"),
    ],
)
def test_wrong_content_is_named(folder: Path, content: dict[str, object], expected: str) -> None:
    np.savez(folder / "plain" / "test.npz", **content)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=expected):
        load_images("plain", "test")


def test_damaged_files_are_named(folder: Path) -> None:
    path = folder / "plain" / "test.npz"
    whole = path.read_bytes()
    for damaged in (b"", b"hello", whole[:100], whole[:-30], whole[:200] + b"!" + whole[201:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"test\.npz"):
            load_images("plain", "test")


def test_python_objects_are_not_unpickled(folder: Path) -> None:
    path = folder / "plain" / "test.npz"
    path.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(DataError, match="Python objects"):
        load_images("plain", "test")
    np.savez(path, x=np.array([{}, {}], dtype=object), y=LABELS, classes=CLASSES)
    with pytest.raises(DataError, match="Python objects"):
        load_images("plain", "test")


def test_inputs_without_resize_are_exact() -> None:
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4) * 10
    inputs = to_inputs(images, InputSpec.image(1, 3, 4, mean=(0.5,), std=(0.25,)))
    expected = (torch.from_numpy(images).float() / 255 - 0.5) / 0.25
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs[:, 0], expected, rtol=0, atol=0)


def test_channels_last_become_channels_first() -> None:
    images = np.random.RandomState(0).randint(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    inputs = to_inputs(images, InputSpec.image(3, 4, 5, mean=mean, std=std))
    for channel in range(3):
        expected = (images[..., channel] / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(inputs[:, channel].numpy(), expected, atol=1e-6)


def test_grey_is_repeated_over_colours() -> None:
    images = np.random.RandomState(0).randint(0, 256, (3, 4, 5)).astype(np.uint8)
    inputs = to_inputs(images, InputSpec.image(3, 4, 5))
    assert torch.equal(inputs[:, 0], inputs[:, 1]) and torch.equal(inputs[:, 0], inputs[:, 2])
    with_channel = to_inputs(images[..., None], InputSpec.image(3, 4, 5))
    assert torch.equal(inputs, with_channel)


def test_shrinking_is_antialiased_and_growing_is_plain_bilinear() -> None:
    # One white pixel in 8: without antialiasing a shrink by 8 would miss it or take it whole.
    stripes = np.zeros((1, 8, 8), np.uint8)
    stripes[0, :, ::8] = 255
    small = to_inputs(stripes, InputSpec.image(1, 1, 1))
    assert 0.02 < small.item() < 0.2
    images = np.random.RandomState(0).randint(0, 256, (2, 4, 4)).astype(np.uint8)
    large = to_inputs(images, InputSpec.image(1, 8, 8))
    plain = functional.interpolate(
        torch.from_numpy(images)[:, None].float() / 255, (8, 8), mode="bilinear"
    )
    torch.testing.assert_close(large, plain)


def test_batch_size_changes_nothing() -> None:
    images = np.random.RandomState(0).randint(0, 256, (7, 9, 9)).astype(np.uint8)
    spec = InputSpec.image(1, 6, 6)
    assert torch.equal(to_inputs(images, spec, batch_size=2), to_inputs(images, spec))


def test_what_is_no_image_for_the_spec_is_refused() -> None:
    colour = np.zeros((1, 4, 4, 3), np.uint8)
    with pytest.raises(DataError, match="3 channels, expected 1"):
        to_inputs(colour, InputSpec.image(1, 4, 4))
    with pytest.raises(DataError, match="dtype float64"):
        to_inputs(np.zeros((1, 4, 4)), InputSpec.image(1, 4, 4))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="kind 'embedding'"):
        to_inputs(colour, InputSpec("embedding", (4,)))


def test_channel_statistics_normalise_to_zero_and_one() -> None:
    images = np.random.RandomState(0).randint(0, 200, (20, 4, 5, 3)).astype(np.uint8)
    mean, std = channel_statistics(to_inputs(images, InputSpec.image(3, 4, 5)))
    inputs = to_inputs(images, InputSpec.image(3, 4, 5, mean=mean, std=std)).transpose(0, 1)
    torch.testing.assert_close(inputs.flatten(1).mean(1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs.flatten(1).std(1, correction=0), torch.ones(3))


def test_list_counts_what_load_returns(folder: Path) -> None:
    write(folder / "colour" / "train.npz", 20, colour=True)
    write(folder / "colour" / "val.npz", 4, colour=True)
    (folder / "broken").mkdir()
    (folder / "broken" / "test.npz").write_bytes(b"hello")
    (folder / "sentences").mkdir()
    (folder / "sentences" / "train.jsonl").write_text("{}")
    listed = {name: splits for name, _, splits in list_images()}
    assert listed["digits"] == {"train": 1168, "select": 129, "test": 500}
    assert listed["plain"] == {"train": 95, "select": 10, "test": 7}
    assert listed["colour"] == {"train": 20, "select": 4, "test": "missing"}
    assert listed["broken"] == {"train": "missing", "select": "missing", "test": "damaged"}
    assert set(listed["mnist"].values()) == {"missing"}
    assert "sentences" not in listed


def test_real_mnist() -> None:
    try:
        found = [load_images("mnist", split) for split in ("train", "select", "test")]
    except DataError as error:
        pytest.skip(str(error))
    assert [len(images) for images in found] == [54000, 6000, 10000]
    mean, std = channel_statistics(to_inputs(found[0].images, InputSpec.image(1, 28, 28)))
    # The normalisation that everybody uses, computed there on all 60,000.
    assert mean == pytest.approx((0.1307,), abs=5e-4)
    assert std == pytest.approx((0.3081,), abs=5e-4)
