"""Arrays of images: nothing but x is read, and no more of it than a block at a time."""

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vestige.core.types import InputSpec
from vestige.data.unlabelled import arrays
from vestige.data.unlabelled.arrays import ArrayImages, ZippedImages, open_npy
from vestige.errors import DataError

SPEC = InputSpec.image(3, 6, 5)


def images(count: int = 700) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (count, 6, 5, 3), dtype=np.uint8)


def read(found: object, rows: np.ndarray | None = None) -> np.ndarray:
    rows = np.arange(len(found)) if rows is None else rows  # type: ignore[arg-type]
    return np.concatenate([block.images for block in found.blocks(SPEC, rows)])  # type: ignore[attr-defined]


def zipped(folder: Path, array: np.ndarray, *, pack: bool = False, **more: np.ndarray) -> Path:
    (np.savez_compressed if pack else np.savez)(folder / "web.npz", x=array, **more)
    return folder / "web.npz"


@pytest.mark.parametrize("pack", [False, True])
def test_an_npz_gives_its_rows(tmp_path: Path, pack: bool) -> None:
    found = ZippedImages(zipped(tmp_path, images(), pack=pack), "web")
    assert len(found) == 700 and np.array_equal(read(found), images())
    # Blocks begin and end anywhere.
    rows = np.array([0, 255, 256, 511, 512, 699])
    assert np.array_equal(read(found, rows), images()[rows])


def test_chosen_rows_are_numbered_anew(tmp_path: Path) -> None:
    chosen = np.array([1, 300, 650])
    found = ZippedImages(zipped(tmp_path, images()), "web", chosen)
    assert len(found) == 3
    assert np.array_equal(read(found, np.array([0, 2])), images()[[1, 650]])


def test_labels_that_cannot_be_read_do_not_matter(tmp_path: Path) -> None:
    """Objects in y would need pickle, and its bytes are torn besides."""
    path = tmp_path / "web.npz"
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("x.npy", "w") as member:
            np.lib.format.write_array(member, images(4))
        archive.writestr("y.npy", b"\x93NUMPY\x01\x00 this is no header")
    assert np.array_equal(read(ZippedImages(path, "web")), images(4))


def test_labels_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path, images(4), y=np.arange(4), classes=np.array(list("abcd")))
    opened = []
    original = zipfile.ZipFile.open

    def watched(self: zipfile.ZipFile, name: str, *given: object, **more: object) -> object:
        opened.append(name if isinstance(name, str) else name.filename)
        return original(self, name, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(zipfile.ZipFile, "open", watched)
    read(ZippedImages(path, "web"))
    assert set(opened) == {"x.npy"}


def test_columns_first_arrays_are_read_whole(tmp_path: Path) -> None:
    found = ZippedImages(zipped(tmp_path, np.asfortranarray(images(20))), "web")
    assert np.array_equal(read(found, np.array([3, 19])), images(20)[[3, 19]])


def test_an_npy_is_mapped_and_recognised_as_fitting(tmp_path: Path) -> None:
    np.save(tmp_path / "web.npy", images())
    found = open_npy(tmp_path / "web.npy", "web")
    assert isinstance(found.images, np.memmap) and found.paths == (tmp_path / "web.npy",)
    assert np.array_equal(read(found, np.array([5, 600])), images()[[5, 600]])
    assert found.fits(SPEC)
    assert not found.fits(InputSpec.image(3, 5, 6)) and not found.fits(InputSpec.image(1, 6, 5))
    grey = ArrayImages(images()[..., 0].copy(), "grey")
    assert grey.fits(InputSpec.image(1, 6, 5)) and not grey.fits(SPEC)
    assert not ArrayImages(np.asfortranarray(images(20)), "columns").fits(SPEC)


def test_a_fingerprint_is_of_the_images_alone(tmp_path: Path) -> None:
    plain = ZippedImages(zipped(tmp_path, images(9)), "a").fingerprint
    labelled = ZippedImages(zipped(tmp_path, images(9), pack=True, y=np.arange(9)), "b")
    assert labelled.fingerprint == plain == ArrayImages(images(9), "c").fingerprint
    other = images(9)
    other[8, 5, 4, 2] ^= 1
    assert ArrayImages(other, "d").fingerprint != plain
    assert ArrayImages(images(9).reshape(9, 5, 6, 3), "e").fingerprint != plain


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """40 MiB of images are streamed in blocks of 24 KiB; Python's own peak stays far below."""
    found = ZippedImages(zipped(tmp_path, np.zeros((450_000, 6, 5, 3), np.uint8)), "web")
    tracemalloc.start()
    try:
        count = sum(len(block) for block in found.native(np.arange(len(found))))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 450_000
    # The row numbers, 3.4 MiB and a copy of them, are what grows.
    assert peak < 12 * 2**20


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (images(4) / 255, "multiply values in .* by 255 first"),
        (images(4).astype(np.int64), "convert them with astype"),
        (images(4).transpose(0, 3, 1, 2), "put the channels last"),
        (images(4).repeat(2, axis=3), "keep 1 or 3 channels"),
        (images(0), "got no images in web"),
        (images(4)[:, 0, 0], "store one image per row"),
        (images(4)[:, :0], "store one image per row"),
    ],
)
def test_arrays_that_are_none_of_images_are_refused(
    tmp_path: Path, array: np.ndarray, told: str
) -> None:
    with pytest.raises(DataError, match=told):
        ZippedImages(zipped(tmp_path, array), "web")
    np.save(tmp_path / "web.npy", array)
    with pytest.raises(DataError, match=told):
        open_npy(tmp_path / "web.npy", "web")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", images=images(4))
    with pytest.raises(DataError, match=r"with the keys \['images'\]"):
        ZippedImages(tmp_path / "other.npz", "other")
    whole = zipped(tmp_path, images(), pack=True).read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"torn.npz, which cannot be read"):
        ZippedImages(tmp_path / "torn.npz", "torn")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with pytest.raises(DataError, match=r"flipped.npz, which cannot be read"):
        ZippedImages(tmp_path / "flipped.npz", "flipped")
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(DataError, match=r"torn.npy, which cannot be read"):
        open_npy(tmp_path / "torn.npy", "torn")
    (tmp_path / "zip.npy").write_bytes(whole)
    with pytest.raises(DataError, match=r"zip.npy, which is an .npz file"):
        open_npy(tmp_path / "zip.npy", "zip")


def test_an_array_that_ends_too_early_is_damaged(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, archive.open("x.npy", "w") as x:
        header = {"descr": "|u1", "fortran_order": False, "shape": (9, 6, 5, 3)}
        np.lib.format.write_array_header_1_0(x, header)
        x.write(images(8).data)
    with pytest.raises(DataError, match="the array ends too early"):
        ZippedImages(tmp_path / "short.npz", "short")


def test_blocks_are_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arrays, "BLOCK", 3)
    found = ZippedImages(zipped(tmp_path, images(8)), "web")
    assert [len(block.images) for block in found.blocks(SPEC, np.arange(8))] == [3, 3, 2]
    assert np.array_equal(read(found), images(8))
