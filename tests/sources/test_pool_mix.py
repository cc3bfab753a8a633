import pytest
import torch

from vestige.core.types import InputSpec
from vestige.errors import DataError
from vestige.sources.noise import NoiseSource
from vestige.sources.pool import Pool
from vestige.sources.pool_mix import PoolMix


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool(*values: float) -> Pool:
    made = Pool()
    if values:
        made.add(torch.tensor(values).view(-1, 1))
    return made


def test_every_row_of_both_is_equally_likely():
    mix = PoolMix(pool(0), pool(1, 2, 3))
    assert len(mix) == 4
    counts = torch.bincount(mix.draw(8000, rng())[:, 0].long())
    # Expected 2,000 each with deviation 39: six deviations.
    assert ((counts - 2000).abs() < 234).all()


def test_alone_it_is_the_pool_itself():
    own = pool(1, 2, 3)
    assert torch.equal(PoolMix(own).draw(20, rng()), own.draw(20, rng()))


def test_before_the_first_image_only_earlier_ones_come():
    assert PoolMix(pool(), pool(7)).draw(5, rng())[:, 0].tolist() == [7.0] * 5


def test_without_any_image_it_says_so():
    with pytest.raises(DataError, match="empty pool"):
        PoolMix(pool()).draw(1, rng())


def test_a_source_without_end_has_no_share():
    with pytest.raises(DataError, match="has no end"):
        PoolMix(pool(), NoiseSource(InputSpec.image(1, 8, 8)))
