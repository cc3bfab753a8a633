"""Decoded once, found again, never half, by one process or by several."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vestige.core.types import InputSpec
from vestige.data.unlabelled.arrays import ArrayImages, ZippedImages, open_npy
from vestige.data.unlabelled.decoding import Block, Skipped, in_size, row_hashes
from vestige.data.unlabelled.files import find_pictures
from vestige.errors import DataError, ShapeError, StorageError
from vestige.recipes import image_cache
from vestige.recipes.image_cache import images_folder, keep

SPEC = InputSpec.image(3, 6, 5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def images(count: int = 40, side: int = 9) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (count, side, 7, 3), dtype=np.uint8)


def expected(count: int = 40) -> np.ndarray:
    return in_size(images(count), SPEC).images


class Counting(ArrayImages):
    """Counts how often it is decoded."""

    decoded = 0

    def blocks(self, spec: InputSpec, rows: np.ndarray) -> Iterator[Block]:
        self.decoded += 1
        return super().blocks(spec, rows)


def test_the_folder_is_the_users_choice(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert images_folder() == cache
    monkeypatch.delenv("VESTIGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert images_folder() == Path("/somewhere/vestige/images")


def test_images_are_decoded_once() -> None:
    first, second = Counting(images(), "web"), Counting(images(), "called otherwise")
    kept, again = keep(first, SPEC), keep(second, SPEC)
    assert (first.decoded, second.decoded) == (1, 0)
    assert np.array_equal(np.load(kept.images), expected())
    assert np.array_equal(kept.hashes, row_hashes(expected()))
    assert again.images == kept.images and np.array_equal(again.hashes, kept.hashes)
    assert kept.card["rows"] == 40 and kept.card["skipped"] == 0


def test_other_content_or_another_size_is_another_entry(cache: Path) -> None:
    other = images()
    other[39, 8, 6, 2] ^= 1
    entries = {
        keep(ArrayImages(images(), "web"), SPEC).images,
        keep(ArrayImages(other, "web"), SPEC).images,
        keep(ArrayImages(images(), "web"), InputSpec.image(3, 5, 5)).images,
        keep(ArrayImages(images(), "web"), InputSpec.image(1, 6, 5)).images,
        keep(ArrayImages(images(), "web"), SPEC, count=10).images,
        keep(ArrayImages(images(), "web"), SPEC, count=10, seed=1).images,
        keep(ArrayImages(images(), "web"), SPEC, count=11).images,
    }
    assert len(entries) == 7
    # How inputs are normalised changes no byte.
    normalised = InputSpec.image(3, 6, 5, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert keep(ArrayImages(images(), "web"), normalised).images in entries
    assert sorted(path.suffix for path in cache.iterdir()) == [""] * 7 + [".lock"] * 7


def test_a_count_is_drawn_by_the_seed_from_all_rows() -> None:
    def chosen(seed: int) -> set[int]:
        kept = keep(ArrayImages(images(), "web"), SPEC, count=10, seed=seed)
        found = {row.tobytes() for row in np.load(kept.images)}
        return {place for place, row in enumerate(expected()) if row.tobytes() in found}

    assert len(chosen(0)) == 10 and chosen(0) == chosen(0) != chosen(1)
    assert chosen(0) != set(range(10))
    # Ten seeds of ten rows miss one of forty with a chance of 6 %.
    assert len(set().union(*map(chosen, range(10)))) > 30
    with pytest.raises(DataError, match="got count 41 for 'web', which has 40 images"):
        keep(ArrayImages(images(), "web"), SPEC, count=41)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "web"
    folder.mkdir()
    for number, image in enumerate(images(12)):
        Image.fromarray(image).save(folder / f"{number}.png")
    for number in range(4):
        (folder / f"torn-{number}.png").write_bytes(b"\x89PNG" + bytes([number]))
    (folder / "notes.txt").touch()
    return folder


def test_what_is_left_out_is_told_now_and_when_it_is_found_again(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        caplog.clear()
        kept = keep(find_pictures(pictures, "web"), SPEC)
        (told,) = [one for one in caplog.records if one.levelno == logging.WARNING]
        assert "5 files of 'web' left out, 12 images are used: torn-" in told.message
        assert kept.card["rows"] == 12 and kept.card["skipped"] == 4
        assert len(kept.card["first_skipped"]) == 4


def test_a_count_is_of_pictures_that_can_be_decoded(pictures: Path) -> None:
    for seed in range(5):
        kept = keep(find_pictures(pictures, "web"), SPEC, count=12, seed=seed)
        assert len(np.load(kept.images)) == len(kept.hashes) == 12
        assert {one.tobytes() for one in np.load(kept.images)} == {
            one.tobytes() for one in expected(12)
        }
    with pytest.raises(DataError, match=r"got 12 images of 'web' that can be decoded and 4 that"):
        keep(find_pictures(pictures, "web"), SPEC, count=13)


def test_a_folder_of_damaged_files_leaves_no_entry(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"got 0 images of 'torn' .* and 1 that cannot \(a.png: "):
        keep(find_pictures(tmp_path / "torn", "torn"), SPEC)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_changed_channels_are_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        keep(ArrayImages(images()[..., 0].copy(), "grey"), SPEC)
        keep(ArrayImages(images(), "colour"), InputSpec.image(1, 6, 5))
    told = [record.message for record in caplog.records]
    assert (
        told.count("40 images of 'grey' have one channel, which is repeated for the teacher") == 2
    )
    assert (
        told.count("40 images of 'colour' have colours, which are turned to grey for the teacher")
        == 2
    )


def test_a_file_that_fits_is_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "web.npy", expected())
    kept = keep(open_npy(tmp_path / "web.npy", "web"), SPEC)
    assert kept.images == tmp_path / "web.npy"
    assert np.array_equal(kept.hashes, row_hashes(expected()))
    assert not (kept.folder / "images.npy").exists()
    # A choice of its rows is.
    assert keep(open_npy(tmp_path / "web.npy", "web"), SPEC, count=5).images != kept.images
    # What was the same file is not when its content changes.
    np.save(tmp_path / "web.npy", expected()[::-1].copy())
    again = keep(open_npy(tmp_path / "web.npy", "web"), SPEC)
    assert np.array_equal(again.hashes, kept.hashes[::-1])


def test_only_images_can_be_kept() -> None:
    with pytest.raises(ShapeError, match="kind 'embedding'"):
        keep(ArrayImages(images(), "web"), InputSpec("embedding", (4,)))


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "no header": lambda path: _flip(path, 3),
    "a bit in the first rows": lambda path: _flip(path, 200),
    "zeros at the end": lambda path: _zero(path, -50),
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


def _zero(path: Path, start: int) -> None:
    content = bytearray(path.read_bytes())
    content[start:] = bytes(-start)
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["images.npy", "hashes.npy", "card.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(
    file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = keep(ArrayImages(images(), "web"), SPEC)
    if file == "card.json" and damage in ("a bit in the first rows", "zeros at the end"):
        pytest.skip("the card is read whole and compared with the files")
    DAMAGES[damage](kept.folder / file)
    again = keep(ArrayImages(images(), "web"), SPEC)
    assert again.folder == kept.folder
    assert np.array_equal(np.load(again.images), expected())
    assert np.array_equal(again.hashes, row_hashes(expected()))
    assert "the cached images of 'web' are damaged and are decoded again" in caplog.text
    caplog.clear()
    keep(ArrayImages(images(), "web"), SPEC)
    assert caplog.text == ""


def test_what_fails_on_the_way_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, values: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache, "save_array", full)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        keep(ArrayImages(images(), "web"), SPEC)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


DECODE = """
import sys, time
import numpy as np
from vestige.core.types import InputSpec
from vestige.data.unlabelled.arrays import ArrayImages
from vestige.recipes.image_cache import keep

class Slow(ArrayImages):
    def blocks(self, spec, rows):
        for part in np.array_split(rows, 10):
            print("decoding", flush=True)
            time.sleep(float(sys.argv[1]))
            yield from super().blocks(spec, part)

images = np.random.RandomState(0).randint(0, 256, (40, 9, 7, 3), dtype=np.uint8)
kept = keep(Slow(images, "web"), InputSpec.image(3, 6, 5))
print("kept", len(np.load(kept.images)), flush=True)
"""


def decoding(seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DECODE, str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_killed_process_leaves_nothing_that_is_read_as_whole(cache: Path) -> None:
    killed = decoding(5)
    assert killed.stdout is not None and killed.stdout.readline() == "decoding\n"
    killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (partial,) = cache.glob("*.partial")
    assert (partial / "images.npy").is_file()
    assert not (cache / partial.stem).exists()
    kept = keep(ArrayImages(images(), "web"), SPEC)
    assert np.array_equal(np.load(kept.images), expected())
    assert not partial.exists() and kept.folder == cache / partial.stem


def test_several_processes_decode_once_between_them(cache: Path) -> None:
    both = [decoding(0.1), decoding(0.1)]
    said = [one.communicate(timeout=120)[0].split("\n") for one in both]
    assert [lines[-2] for lines in said] == ["kept 40", "kept 40"]
    assert sorted(lines.count("decoding") for lines in said) == [0, 10]
    assert not list(cache.glob("*.partial"))


def test_long_decoding_says_how_far_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = iter(range(0, 10_000, 15))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    monkeypatch.setattr("vestige.data.unlabelled.arrays.BLOCK", 10)
    keep(ArrayImages(images(), "web"), SPEC)
    assert "decoding 'web': 20 of 40 images, about 30 s left" in caplog.text


def test_the_card_says_what_it_is_of() -> None:
    kept = keep(ArrayImages(images(), "web"), SPEC, count=7, seed=3)
    card = json.loads((kept.folder / "card.json").read_text())
    assert card["name"] == "web" and card["shape"] == [3, 6, 5] and card["rows"] == 7
    assert card["count"] == 7 and card["seed"] == 3 and card["key"] == kept.folder.name


def test_streams_need_not_be_in_memory(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "web.npz", x=images(3000))
    kept = keep(ZippedImages(tmp_path / "web.npz", "web"), SPEC)
    assert np.array_equal(np.load(kept.images), expected(3000))
    assert isinstance(ZippedImages(tmp_path / "web.npz", "web").left_out, Skipped)
