import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vestige.core.types import InputSpec
from vestige.errors import ContractError, DataError
from vestige.sources.pool import Pool
from vestige.sources.pool_files import open_pool, read_card, save_pool

SPEC = InputSpec.image(1, 2, 3, mean=(0.4,), std=(0.3,))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pool() -> Pool:
    pool = Pool(SPEC)
    for start in (0, 5):
        levels = torch.arange(start, start + 5.0).view(5, 1, 1, 1).expand(5, 1, 2, 3) / 255
        pool.add(SPEC.normalize(levels), torch.arange(5) % 3, loss=torch.tensor(float(start)))
    return pool


def test_an_opened_pool_draws_what_the_saved_one_drew(pool, tmp_path):
    save_pool(pool, tmp_path / "pool", {"teacher_fingerprint": "abc"})
    opened = open_pool(tmp_path / "pool")
    assert len(opened) == 10
    assert torch.equal(opened.draw(50, rng()), pool.draw(50, rng()))
    _, labels = opened.draw_labelled(50, rng())
    assert torch.equal(labels, pool.draw_labelled(50, rng())[1])
    wanted = torch.tensor([2, 0, 1, 1])
    assert torch.equal(opened.draw_of(wanted, rng()), pool.draw_of(wanted, rng()))
    card = read_card(tmp_path / "pool")
    assert (card["images"], card["batches"], card["labels"]) == (10, 2, [4, 4, 2])
    assert card["teacher_fingerprint"] == "abc"


def test_the_folder_of_a_run_is_found_by_its_pool(pool, tmp_path):
    save_pool(pool, tmp_path / "pool", {})
    assert len(open_pool(tmp_path)) == 10


def test_another_teacher_gets_the_images_in_its_own_normalisation(pool, tmp_path):
    save_pool(pool, tmp_path, {})
    other = InputSpec.image(1, 2, 3, mean=(0.0,), std=(0.5,))
    images = other.denormalize(open_pool(tmp_path, other).draw(30, rng()))
    torch.testing.assert_close(images, SPEC.denormalize(pool.draw(30, rng())))


def test_other_programs_can_read_it(pool, tmp_path):
    save_pool(pool, tmp_path, {})
    images = np.load(tmp_path / "images.npy", allow_pickle=False)
    assert images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == list(range(10))
    assert np.load(tmp_path / "labels.npy").tolist() == [0, 1, 2, 0, 1] * 2


def test_an_opened_pool_is_only_read(pool, tmp_path):
    save_pool(pool, tmp_path, {})
    with pytest.raises(ContractError, match="only read"):
        open_pool(tmp_path).add(torch.zeros(1, 1, 2, 3), torch.tensor([0]))


def test_a_pool_without_labels_stays_without(tmp_path):
    pool = Pool(SPEC)
    pool.add(torch.zeros(2, 1, 2, 3))
    save_pool(pool, tmp_path, {})
    opened = open_pool(tmp_path)
    assert opened.labels is None
    with pytest.raises(DataError, match="without labels"):
        opened.draw_labelled(1, rng())


def damage_card(folder: Path) -> None:
    (folder / "pool.json").write_text("{")


def another_schema(folder: Path) -> None:
    card = json.loads((folder / "pool.json").read_text())
    (folder / "pool.json").write_text(json.dumps({**card, "schema": 99}))


def lose_images(folder: Path) -> None:
    (folder / "images.npy").unlink()


def cut_images(folder: Path) -> None:
    whole = (folder / "images.npy").read_bytes()
    (folder / "images.npy").write_bytes(whole[:-7])


def pickled_labels(folder: Path) -> None:
    np.save(folder / "labels.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


def other_images(folder: Path) -> None:
    np.save(folder / "images.npy", np.zeros((3, 1, 2, 3), np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_card, "damaged"),
        (another_schema, "schema 99"),
        (lose_images, "cannot be read"),
        (cut_images, "cannot be read"),
        (pickled_labels, "cannot be read"),
        (other_images, r"\(3, 1, 2, 3\), expected uint8 of \(10, 1, 2, 3\)"),
    ],
)
def test_what_is_damaged_is_refused_with_the_file(pool, tmp_path, damage, message):
    save_pool(pool, tmp_path, {})
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        open_pool(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_what_is_no_pool_says_what_one_is(tmp_path):
    with pytest.raises(DataError, match=r"pool\.json, images\.npy"):
        open_pool(tmp_path)


def test_images_of_another_shape_than_the_teachers_are_refused(pool, tmp_path):
    save_pool(pool, tmp_path, {})
    with pytest.raises(DataError, match=r"images \(1, 2, 3\) .* teacher's \(3, 2, 3\)"):
        open_pool(tmp_path, InputSpec.image(3, 2, 3))


@pytest.mark.parametrize("pool", [Pool(SPEC), Pool()])
def test_only_images_that_are_there_are_saved(pool, tmp_path):
    with pytest.raises(DataError, match="expected at least one uint8 image"):
        save_pool(pool, tmp_path, {})
