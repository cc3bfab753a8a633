import pytest
import torch
from torch import Tensor

from vestige.core.protocols import Sharded
from vestige.core.types import InputSpec
from vestige.errors import DataError, ShapeError
from vestige.sources.pool import Pool

SPEC = InputSpec.image(1, 2, 3, mean=(0.4,), std=(0.3,))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1)


def test_it_grows_and_forgets_nothing() -> None:
    pool = Pool()
    assert isinstance(pool, Sharded) and len(pool) == 0 and pool.shard_count() == 0
    for start in range(0, 50, 5):
        pool.add(torch.arange(start, start + 5.0).view(5, 1))
    assert len(pool) == 50 and pool.shard_count() == 10
    for index in range(10):
        assert pool.shard(index)["inputs"][:, 0].tolist() == list(range(5 * index, 5 * index + 5))
    assert set(pool.draw(2000, rng())[:, 0].tolist()) == set(range(50))


def test_every_row_is_equally_likely_whatever_the_shards() -> None:
    pool = Pool()
    pool.add(rows(0))
    pool.add(rows(1, 2, 3))
    counts = torch.bincount(pool.draw(8000, rng())[:, 0].long())
    # Expected 2,000 each with deviation 39: six deviations.
    assert ((counts - 2000).abs() < 234).all()
    assert torch.equal(pool.draw(9, rng(1)), pool.draw(9, rng(1)))


def test_later_changes_do_not_reach_the_pool() -> None:
    pool, inputs = Pool(), rows(1.0, 2.0).requires_grad_()
    pool.add(inputs)
    with torch.no_grad():
        inputs.fill_(7)
    assert pool.shard(0)["inputs"][:, 0].tolist() == [1, 2]
    assert not pool.draw(3, rng()).requires_grad


def test_images_are_kept_to_half_a_grey_level() -> None:
    pool = Pool(SPEC)
    images = torch.rand(40, 1, 2, 3)
    pool.add(SPEC.normalize(images))
    stored = pool.shard(0)["inputs"]
    assert stored.dtype == torch.uint8
    assert (stored.float() / 255 - images).abs().max() <= 0.5 / 255 + 1e-6
    drawn = pool.draw(500, rng())
    assert drawn.dtype == torch.float32
    grey = SPEC.denormalize(drawn) * 255
    torch.testing.assert_close(grey, grey.round(), rtol=0, atol=1e-3)


def test_grey_levels_survive_unchanged() -> None:
    levels = torch.arange(256.0).view(-1, 1, 1, 1).expand(-1, 1, 2, 3)
    pool = Pool(SPEC)
    pool.add(SPEC.normalize(levels / 255))
    assert torch.equal(pool.shard(0)["inputs"].float(), levels)


def test_values_outside_of_images_are_clamped() -> None:
    pool = Pool(SPEC)
    pool.add(torch.full((1, 1, 2, 3), 100.0))
    pool.add(torch.full((1, 1, 2, 3), -100.0))
    assert pool.shard(0)["inputs"].unique().tolist() == [255]
    assert pool.shard(1)["inputs"].unique().tolist() == [0]


def test_labels_stay_with_their_inputs() -> None:
    pool = Pool()
    pool.add(rows(0, 1, 2), torch.tensor([0, 1, 2]))
    pool.add(rows(3, 4), torch.tensor([3, 4]))
    inputs, labels = pool.draw_labelled(100, rng())
    assert torch.equal(inputs[:, 0].long(), labels)
    assert torch.equal(inputs, pool.draw(100, rng()))


def test_shards_restore_it_bit_for_bit() -> None:
    pool, copy = Pool(SPEC), Pool(SPEC)
    for _ in range(5):
        pool.add(torch.randn(3, 1, 2, 3), torch.randint(9, (3,)))
    copy.add(torch.randn(1, 1, 2, 3))  # what was there before is replaced
    saved = [
        {name: value.clone() for name, value in pool.shard(index).items()}
        for index in range(pool.shard_count())
    ]
    copy.load_shards(saved)
    assert copy.shard_count() == 5 and len(copy) == 15
    assert torch.equal(pool.draw(50, rng()), copy.draw(50, rng()))
    assert torch.equal(pool.draw_labelled(50, rng())[1], copy.draw_labelled(50, rng())[1])
    pool.add(torch.randn(2, 1, 2, 3), torch.tensor([1, 2]))  # growing leaves old shards alone
    for index, shard in enumerate(saved):
        assert all(torch.equal(pool.shard(index)[name], shard[name]) for name in shard)


def test_mistakes_are_refused_and_change_nothing() -> None:
    pool = Pool(SPEC)
    with pytest.raises(DataError, match="empty pool"):
        pool.draw(1, rng())
    pool.add(torch.zeros(2, 1, 2, 3))
    with pytest.raises(ShapeError, match=r"\(2, 1, 3, 3\), expected \(B, 1, 2, 3\)"):
        pool.add(torch.zeros(2, 1, 3, 3))
    with pytest.raises(ShapeError, match="B > 0"):
        pool.add(torch.zeros(0, 1, 2, 3))
    with pytest.raises(ShapeError, match="mix"):
        pool.add(torch.zeros(2, 1, 2, 3), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="without labels"):
        pool.draw_labelled(1, rng())
    with pytest.raises(ShapeError, match=r"labels of shape \(3,\), expected \(2,\)"):
        Pool().add(torch.zeros(2, 1), torch.zeros(3))
    plain = Pool()
    plain.add(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="float64"):
        plain.add(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"\(2, 5\)"):
        plain.add(torch.zeros(2, 5))
    assert len(pool) == len(plain) == 2 and pool.shard_count() == plain.shard_count() == 1


def test_beyond_its_limit_a_pool_lies_in_a_file_and_is_the_same() -> None:
    held, moved = Pool(SPEC), Pool(SPEC, memory_limit=30)  # five images of six bytes
    for start in range(0, 12, 3):
        levels = torch.arange(start, start + 3.0).view(3, 1, 1, 1).expand(3, 1, 2, 3)
        for pool in (held, moved):
            pool.add(SPEC.normalize(levels / 255), torch.arange(3))
    assert torch.equal(held.draw(60, rng()), moved.draw(60, rng()))
    wanted = torch.tensor([1, 2, 0, 0])
    assert torch.equal(held.draw_of(wanted, rng()), moved.draw_of(wanted, rng()))
    for index in range(4):
        assert torch.equal(held.shard(index)["inputs"], moved.shard(index)["inputs"])
    copy = Pool(SPEC, memory_limit=30)
    copy.load_shards([moved.shard(index) for index in range(4)])
    assert torch.equal(copy.draw(60, rng()), held.draw(60, rng()))


def test_of_each_class_that_is_asked_for_one_of_its_images_comes() -> None:
    pool = Pool()
    pool.add(rows(10, 11, 20), torch.tensor([1, 1, 2]))
    pool.add(rows(12, 30), torch.tensor([1, 3]))
    labels = torch.tensor([1, 3, 2] * 1000)
    drawn = pool.draw_of(labels, rng())[:, 0]
    assert torch.equal((drawn / 10).long(), labels)
    counts = torch.bincount(drawn.long())[10:13]
    # Expected a third of 1,000 each, deviation 15: six deviations.
    assert ((counts - 333.3).abs() < 90).all()
    pool.add(rows(40), torch.tensor([4]))  # what was sorted before is sorted anew
    assert pool.draw_of(torch.tensor([4]), rng()).item() == 40


def test_a_class_without_images_is_named() -> None:
    pool = Pool()
    pool.add(rows(1, 2), torch.tensor([0, 3]))
    with pytest.raises(DataError, match="class 1, 7, expected"):
        pool.draw_of(torch.tensor([0, 1, 7]), rng())


def test_the_loss_of_each_batch_is_kept() -> None:
    pool, copy = Pool(), Pool()
    pool.add(rows(1), loss=torch.tensor(0.5))
    pool.add(rows(2))
    copy.load_shards([pool.shard(0), pool.shard(1)])
    assert pool.losses == copy.losses == [0.5, None]
