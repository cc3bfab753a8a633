"""Folders of pictures as people have them: nested, mixed, and with files that are none."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vestige.core.types import InputSpec
from vestige.data.unlabelled.decoding import in_size
from vestige.data.unlabelled.files import chosen_pictures, find_pictures
from vestige.errors import DataError

SPEC = InputSpec.image(3, 6, 5)


def picture(path: Path, seed: int, *, size: tuple[int, int] = (8, 7), grey: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if grey else (*size, 3)
    array = np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """Twelve pictures at three depths, in four sizes and three formats, two of them grey."""
    folder = tmp_path / "web"
    for seed in range(12):
        suffix = (".png", ".bmp", ".JPG")[seed % 3]
        where = folder / ("", "a", "a/b/c")[seed % 3] / f"picture-{seed}{suffix}"
        picture(where, seed, size=(4 + seed % 4, 7), grey=seed in (4, 7))
    return folder


def read(found: object) -> tuple[np.ndarray, list[str], int]:
    blocks = list(found.blocks(SPEC, np.arange(len(found))))  # type: ignore[attr-defined, arg-type]
    images = np.concatenate([block.images for block in blocks])
    skipped = [name for block in blocks for name in block.skipped]
    return images, skipped, sum(block.repeated for block in blocks)


def test_pictures_are_found_at_any_depth(web: Path) -> None:
    images, skipped, repeated = read(find_pictures(web, "web"))
    assert images.shape == (12, 6, 5, 3) and skipped == [] and repeated == 2
    first = np.array(Image.open(web / "picture-0.png"))
    assert any(np.array_equal(in_size(first[None], SPEC).images[0], one) for one in images)


def test_names_and_places_of_files_change_nothing(web: Path, tmp_path: Path) -> None:
    before = find_pictures(web, "web")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for number, path in enumerate(sorted(web.rglob("*.*"), key=lambda path: path.name[::-1])):
        os.rename(path, moved / f"{number}{path.suffix}")
    after = find_pictures(moved, "moved")
    assert after.fingerprint == before.fingerprint
    with pytest.raises(DataError):
        find_pictures(web, "web")
    again = find_pictures(moved, "again")
    assert np.array_equal(read(again)[0], read(after)[0])


def test_what_is_no_picture_is_left_out_and_told(web: Path) -> None:
    (web / "notes.txt").write_text("not a picture")
    (web / "a" / "empty.png").touch()
    (web / "dangling.png").symlink_to(web / "nowhere.png")
    (web / ".DS_Store").write_bytes(b"hidden")
    (web / ".thumbs").mkdir()
    picture(web / ".thumbs" / "hidden.png", 99)
    found = find_pictures(web, "web")
    assert len(found) == 12
    assert found.left_out.count == 3
    assert "a/empty.png: empty" in found.left_out.first
    assert "notes.txt: no picture" in found.left_out.first
    assert any(one.startswith("dangling.png: No such file") for one in found.left_out.first)


def test_what_cannot_be_decoded_is_left_out_and_told(web: Path) -> None:
    whole = (web / "picture-0.png").read_bytes()
    (web / "torn.png").write_bytes(whole[: len(whole) // 2])
    (web / "text.jpg").write_text("this is a web page about cats")
    (web / "noise.gif").write_bytes(b"GIF89a" + os.urandom(50))
    images, skipped, _ = read(find_pictures(web, "web"))
    assert len(images) == 12
    assert sorted(one.partition(":")[0] for one in skipped) == ["noise.gif", "text.jpg", "torn.png"]
    assert all(one.partition(": ")[2] for one in skipped)


def test_a_whole_block_of_damaged_files_is_passed_over(
    web: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vestige.data.unlabelled.files._FEW", 2)
    for number in range(7):
        (web / f"torn-{number}.png").write_bytes(b"\x89PNG" + bytes([number]))
    images, skipped, _ = read(find_pictures(web, "web"))
    assert len(images) == 12 and len(skipped) == 7


def test_equal_pictures_count_twice(web: Path) -> None:
    (web / "copy.png").write_bytes((web / "picture-0.png").read_bytes())
    assert len(find_pictures(web, "web")) == 13


def test_empty_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"got no pictures in .*none, expected at least one"):
        find_pictures(tmp_path / "none", "none")
    (tmp_path / "none" / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match=r"no pictures in .*none but 1 other files"):
        find_pictures(tmp_path / "none", "none")


def test_chosen_files_are_found_by_their_paths(web: Path) -> None:
    paths = sorted(web.rglob("*.png"))
    found = chosen_pictures(paths, "chosen")
    assert len(read(found)[0]) == len(paths) == 4
    assert len(read(chosen_pictures(paths[:1], "one"))[0]) == 1
    with pytest.raises(DataError, match="cannot be read"):
        chosen_pictures([*paths, web / "gone.png"], "chosen")
