"""Rows of bytes: what is drawn, from where, and how little of a file is held."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from vestige.core.protocols import Source
from vestige.core.rows import KnowsParts, RowSource
from vestige.core.types import InputSpec
from vestige.data.image import to_inputs
from vestige.errors import DataError
from vestige.sources.stored import StoredHeap, StoredImages

SPEC = InputSpec.image(3, 6, 5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
GREY = InputSpec.image(1, 6, 5, mean=(0.3,), std=(0.2,))


def images(count: int = 20, channels: int = 3) -> np.ndarray:
    shape = (count, 6, 5, channels) if channels == 3 else (count, 6, 5)
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)


def stored(array: object = None, **given: object) -> StoredImages:
    array = images() if array is None else array
    return StoredImages(array, SPEC, **{"origin": "foreign", "name": "web", **given})  # type: ignore[arg-type]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rows_are_what_the_teacher_was_trained_on_bit_for_bit() -> None:
    """The same numbers as a labelled set of the same images gives."""
    index = torch.tensor([3, 3, 19, 0])
    assert torch.equal(stored().rows(index), to_inputs(images(), SPEC)[index])
    grey = images(channels=1)
    source = StoredImages(grey, GREY, origin="foreign", name="grey")
    assert torch.equal(source.rows(index), to_inputs(grey, GREY)[index])
    plain = InputSpec.image(3, 6, 5)
    source = StoredImages(images(), plain, origin="foreign", name="plain")
    assert torch.equal(source.rows(index), to_inputs(images(), plain)[index])


@pytest.fixture(params=["in-memory", "in-the-file"])
def memory(request, monkeypatch):
    """Small files are held in memory; here also read as if they were large."""
    if request.param == "in-the-file":
        monkeypatch.setattr("vestige.sources.stored.MEMORY_LIMIT", 0)


@pytest.mark.usefixtures("memory")
def test_a_file_gives_what_the_array_gives(tmp_path: Path) -> None:
    np.save(tmp_path / "web.npy", images())
    source = stored(tmp_path / "web.npy")
    assert source.paths == (tmp_path / "web.npy",)
    assert torch.equal(source.draw(50, rng()), stored().draw(50, rng()))
    assert stored(str(tmp_path / "web.npy")).paths == source.paths


def test_draws_depend_on_the_generator_alone_and_reach_every_row() -> None:
    source = stored()
    state = torch.get_rng_state()
    first = source.draw(400, rng())
    assert first.shape == (400, 3, 6, 5) and first.dtype == torch.float32
    assert first.is_contiguous() and not first.requires_grad
    assert torch.equal(first, source.draw(400, rng()))
    assert not torch.equal(first, source.draw(400, rng(1)))
    assert torch.equal(torch.get_rng_state(), state)
    # 400 draws of 20 rows miss a given one with a chance of 1e-9.
    assert len(first.flatten(1).unique(dim=0)) == 20


def test_drawing_changes_nothing_that_was_handed_in() -> None:
    array = images()
    source = stored(array)
    source.draw(8, rng()).zero_()
    assert np.array_equal(array, images())


def test_it_keeps_the_contract_of_rows() -> None:
    source: Source = stored()
    assert isinstance(source, RowSource) and len(source) == 20
    # A method may not learn of parts where there are none.
    assert not isinstance(source, KnowsParts)


def test_a_copy_for_a_rehearsal_copies_no_images() -> None:
    source = stored()
    assert copy.deepcopy({"foreign": source})["foreign"] is source


def test_a_heap_remembers_parts_and_draws_the_same() -> None:
    parts = {"right": True, "unknown": None, "wrong": False}
    index = np.arange(20) % 3
    heap = StoredHeap(images(), SPEC, origin="foreign", name="heap", parts=parts, part_index=index)
    assert isinstance(heap, KnowsParts) and dict(heap.parts) == parts
    asked = torch.tensor([0, 7, 19])
    assert heap.part_of(asked).tolist() == [0, 1, 1] and heap.part_of(asked).dtype == torch.int64
    assert torch.equal(heap.draw(9, rng()), stored().draw(9, rng()))
    with pytest.raises(DataError, match=r"parts of \(3,\) rows for 20 images"):
        StoredHeap(images(), SPEC, origin="foreign", name="heap", parts=parts, part_index=[0, 1, 2])


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (images().astype(np.float32), "dtype float32"),
        (images()[:, :5], r"expected uint8 \(N, 6, 5, 3\)"),
        (images(channels=1), r"shape \(20, 6, 5\)"),
        (images()[:0], "N > 0"),
        (images().transpose(0, 3, 1, 2), r"shape \(20, 3, 6, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused(array: np.ndarray, told: str) -> None:
    with pytest.raises(DataError, match=told):
        stored(array)


def test_an_unknown_origin_is_refused() -> None:
    with pytest.raises(DataError, match="got origin 'web'"):
        stored(origin="web")


def test_files_that_are_no_arrays_are_named(tmp_path: Path) -> None:
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY\x01")
    np.save(tmp_path / "columns.npy", np.asfortranarray(images()))
    for name, told in (("torn.npy", "cannot be read"), ("columns.npy", "C order")):
        with pytest.raises(DataError, match=told):
            stored(tmp_path / name)


def test_a_file_that_becomes_shorter_is_no_reason_to_crash(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vestige.sources.stored.MEMORY_LIMIT", 0)
    np.save(tmp_path / "web.npy", images())
    source = stored(tmp_path / "web.npy")
    with open(tmp_path / "web.npy", "r+b") as file:
        file.truncate(900)
    assert len(source.rows(torch.tensor([0, 1]))) == 2
    with pytest.raises(DataError, match="which ends before row 19 of 20"):
        source.rows(torch.tensor([0, 19]))


@pytest.mark.gpu
def test_on_a_gpu_rows_lie_there_and_are_the_same() -> None:
    source = stored(device="cuda")
    drawn = source.draw(64, torch.Generator("cuda").manual_seed(0))
    assert drawn.device.type == "cuda"
    index = torch.tensor([5, 2])
    torch.testing.assert_close(source.rows(index.cuda()).cpu(), stored().rows(index))
