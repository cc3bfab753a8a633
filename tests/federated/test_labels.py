import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vestige.errors import ContractError, ShapeError
from vestige.federated.labels import class_shares, label_prior, quota_labels, uniform_labels


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shares_with_smoothing_are_the_published_example():
    shares = class_shares(torch.tensor([[9], [0]]), smoothing=1)
    torch.testing.assert_close(shares, torch.tensor([[10 / 11], [1 / 11]]))


def test_shares_of_a_class_sum_to_1_and_are_0_where_nobody_has_it():
    counts = torch.tensor([[3, 0, 5], [1, 0, 0], [0, 0, 7]])
    shares = class_shares(counts)
    torch.testing.assert_close(shares.sum(0), torch.tensor([1.0, 0.0, 1.0]))
    assert shares[1, 2] == 0 and shares[2, 0] == 0
    torch.testing.assert_close(shares[:, 0], torch.tensor([0.75, 0.25, 0.0]))
    # With smoothing nobody knows more than another about a class that nobody has.
    torch.testing.assert_close(class_shares(counts, 1)[:, 1], torch.full((3,), 1 / 3))


def test_large_counts_lose_no_digits():
    # 2^24 + 1 is no float32.
    counts = torch.tensor([[2**24 + 1], [2**24 + 1]])
    assert class_shares(counts).flatten().tolist() == [0.5, 0.5]


def test_counts_of_one_client_alone_are_refused():
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        class_shares(torch.tensor([1, 2, 3]))


def test_the_prior_pools_the_clients():
    counts = torch.tensor([[3, 0, 5], [1, 0, 0]])
    torch.testing.assert_close(label_prior(counts), torch.tensor([4 / 9, 0, 5 / 9]))
    assert not label_prior(torch.zeros(2, 3).long()).any()


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any), st.integers(0, 300))
def test_quotas_are_the_prior_to_within_one_label(counts, size):
    prior = label_prior(torch.tensor([counts]))
    labels = quota_labels(prior, size, rng())
    found = torch.bincount(labels, minlength=len(counts))
    assert len(labels) == size
    # One label, and the rounding of a float32 prior.
    assert ((found - prior.double() * size).abs() < 1 + 1e-4).all()
    assert not found[prior == 0].any()


def test_quotas_do_not_depend_on_the_seed_and_their_order_does():
    prior = torch.tensor([0.5, 0.3, 0.2])
    first, again, other = (quota_labels(prior, 50, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.bincount(first).tolist() == torch.bincount(other).tolist() == [25, 15, 10]
    assert not torch.equal(first, first.sort().values)


def test_uniform_labels_keep_to_the_allowed_classes():
    labels = uniform_labels(torch.tensor([True, False, True, True]), 3000, rng())
    counts = torch.bincount(labels, minlength=4)
    assert counts[1] == 0
    # Five deviations of a binomial with p = 1/3.
    assert (counts[[0, 2, 3]] - 1000).abs().max() < 5 * (3000 * 2 / 9) ** 0.5


def test_labels_of_no_class_are_refused():
    with pytest.raises(ContractError, match="prior of 0"):
        quota_labels(torch.zeros(3), 4, rng())
    with pytest.raises(ContractError, match="no class of 3"):
        uniform_labels(torch.zeros(3, dtype=torch.bool), 4, rng())
