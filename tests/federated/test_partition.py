"""Partitions: who gets what, against the protocols' own words and slow versions of them."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from vestige.errors import DataError, ShapeError
from vestige.federated.partition import (
    PartitionConfig,
    class_counts,
    dirichlet_by_class,
    dirichlet_by_client,
    even,
    held_out,
    quantity,
    shards,
)

NAMES = ("dirichlet-by-class", "dirichlet-by-client", "shards", "quantity", "even")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits(count: int = 6000, classes: int = 10, *, seed: int = 7) -> Tensor:
    """Labels of every class about equally often, in random order."""
    return (torch.arange(count) % classes)[torch.randperm(count, generator=rng(seed))]


def counts_of(parts: list[Tensor], labels: Tensor, classes: int = 10) -> Tensor:
    return class_counts(parts, labels, classes)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_goes_to_one_client_at_most_and_the_seed_decides(name: str) -> None:
    labels = digits()
    cfg = PartitionConfig(name=name, clients=12)
    parts = cfg.deal(labels, 10, rng(1))
    rows = torch.cat(parts)
    assert len(parts) == 12 and rows.dtype == torch.int64
    assert len(rows.unique()) == len(rows) and 0 <= int(rows.min()) <= int(rows.max()) < 6000
    assert all(torch.equal(part, part.sort().values) for part in parts)
    # Only the protocol that cuts classes leaves rows out.
    assert (len(rows) == 6000) == (name != "dirichlet-by-class")
    again, other = cfg.deal(labels, 10, rng(1)), cfg.deal(labels, 10, rng(2))
    assert all(map(torch.equal, parts, again))
    assert not all(
        len(a) == len(b) and torch.equal(a, b) for a, b in zip(parts, other, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_global_generators_are_left_alone(name: str) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    PartitionConfig(name=name, clients=5).deal(digits(), 10, rng())
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("name", ["dirichlet-by-class", "dirichlet-by-client"])
def test_a_lower_alpha_gives_a_client_fewer_classes(name: str) -> None:
    labels = digits()

    def main_share(alpha: float) -> float:
        parts = PartitionConfig(name=name, clients=10, alpha=alpha).deal(labels, 10, rng())
        counts = counts_of(parts, labels).double()
        return float((counts.amax(1) / counts.sum(1)).mean())

    assert main_share(0.1) > main_share(1.0) + 0.15 > main_share(1000.0) + 0.3
    # Ten classes alike.
    assert main_share(1e6) == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 5.0])
def test_draws_are_dirichlet(alpha: float) -> None:
    # Two examples of one draw of K shares are of one kind with probability (a + 1) / (K a + 1).
    kinds, runs = 8, 400
    expected = (alpha + 1) / (kinds * alpha + 1)

    def pairs(counts: Tensor) -> Tensor:
        held, sizes = counts.double(), counts.double().sum(-1)
        return (held * (held - 1)).sum(-1) / (sizes * (sizes - 1))

    labels = torch.zeros(4000, dtype=torch.int64)
    by_class, sizes = (
        torch.tensor([[len(part) for part in draw(seed)] for seed in range(runs)])
        for draw in (
            lambda seed: dirichlet_by_class(labels, kinds, rng(seed), alpha=alpha, least=0),
            lambda seed: quantity(labels, kinds, rng(seed), alpha=alpha, least=0),
        )
    )
    # Far fewer examples than there are of each class, so that none is exhausted.
    several = digits(64_000, kinds)
    by_client = counts_of(
        dirichlet_by_client(several, runs, rng(), alpha=alpha, each=20), several, kinds
    )
    for found in map(pairs, (by_class, sizes, by_client)):
        error = float(found.std()) / runs**0.5
        # Cuts at whole examples of 500 move the share of pairs by less than 0.005.
        assert abs(float(found.mean()) - expected) < 4 * error + 0.005


def test_by_class_cuts_classes_and_fills_every_client() -> None:
    labels = torch.cat([torch.zeros(900), torch.ones(300), torch.full((1800,), 3)]).long()
    parts = dirichlet_by_class(labels, 10, rng(), alpha=0.5, share=0.5, least=10)
    counts = counts_of(parts, labels, 4)
    # L = 0.5 * 3000 / 10 = 150; of each class min(150, half of it).
    assert counts.sum(0).tolist() == [150, 150, 0, 150]
    assert int(counts.sum(1).min()) >= 10


def test_by_class_a_full_client_takes_no_further_class() -> None:
    # L = 120 and 60 of each class: at a tiny alpha one client takes a whole class, and is full
    # after two.
    labels = digits(1200, 20)
    counts = counts_of(
        dirichlet_by_class(labels, 10, rng(), alpha=1e-6, least=0), labels, classes=20
    )
    assert counts.sum(0).tolist() == [60] * 20 and counts.sum(1).tolist() == [120] * 10


def test_by_class_no_client_gets_what_rounding_leaves() -> None:
    labels = digits(60_000)
    last = first = 0
    for seed in range(30):
        counts = counts_of(dirichlet_by_class(labels, 20, rng(seed), alpha=0.05), labels)
        first += int((counts[0] > 0).sum())
        last += int((counts[-1] > 0).sum())
    # Rounded down, the last has 9 or 10 classes each time, and the first 3 to 4.
    assert last < 1.5 * first


def test_by_class_asks_for_what_can_be_dealt_out() -> None:
    with pytest.raises(DataError, match=r"of which 60 can be dealt out .* at most 6 of a class"):
        dirichlet_by_class(digits(600), 100, rng(), least=10)
    with pytest.raises(DataError, match="got no draw in 10,000"):
        dirichlet_by_class(digits(4000, 2), 20, rng(), alpha=1e-3, least=10)


def test_by_client_sizes_are_equal_or_log_normal() -> None:
    labels = digits(6003)
    equal = torch.tensor([len(p) for p in dirichlet_by_client(labels, 10, rng())])
    assert sorted(equal.tolist()) == [600] * 7 + [601] * 3
    each = dirichlet_by_client(labels, 10, rng(), each=50)
    assert [len(part) for part in each] == [50] * 10
    skewed = dirichlet_by_client(digits(400_000), 2000, rng(), size_sigma=0.5, alpha=10.0)
    sizes = torch.tensor([len(part) for part in skewed]).double()
    assert int(sizes.sum()) == 400_000
    # Standard error of a standard deviation of 2,000 values: 0.5 / sqrt(4000) = 0.008.
    assert float(sizes.log().std()) == pytest.approx(0.5, abs=0.03)
    floored = dirichlet_by_client(labels, 100, rng(), size_sigma=2.0, least=20)
    assert min(map(len, floored)) >= 20 and sum(map(len, floored)) == 6003


def slow_by_client(
    totals: list[int], sizes: list[int], alpha: float, draws: np.random.Generator
) -> np.ndarray:
    """The protocol turn by turn; to redraw while a class is exhausted is to draw without it."""
    mixes = draws.dirichlet([alpha] * len(totals), len(sizes))
    left, room = np.array(totals), np.array(sizes)
    counts = np.zeros((len(sizes), len(totals)))
    while room.any():
        client = draws.choice(np.flatnonzero(room))
        ends = np.cumsum(mixes[client] * (left > 0))
        label = int(np.searchsorted(ends, draws.random() * ends[-1], side="right"))
        counts[client, label] += 1
        left[label] -= 1
        room[client] -= 1
    return counts


def test_by_client_is_the_protocol_turn_by_turn() -> None:
    # Two classes are soon exhausted, and which of them first makes a difference.
    totals, runs = [5, 5, 30], 1200
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(totals))
    fast = np.stack(
        [
            counts_of(dirichlet_by_client(labels, 4, rng(seed), alpha=0.5), labels, 3).numpy()
            for seed in range(runs)
        ]
    )
    draws = np.random.default_rng(0)
    slow = np.stack([slow_by_client(totals, [10] * 4, 0.5, draws) for _ in range(runs)])
    # Clients are alike. Mean over runs of any figure, and the standard error of the difference.
    for label in range(3):
        for amount in range(11):
            one, two = ((found[:, :, label] == amount).mean(1) for found in (fast, slow))
            error = ((one.var() + two.var()) / runs) ** 0.5
            assert abs(one.mean() - two.mean()) < 4 * error + 1e-9
    # And how two classes of one client go together.
    one, two = ((found[:, :, 0] * found[:, :, 1]).mean(1) for found in (fast, slow))
    assert abs(one.mean() - two.mean()) < 4 * ((one.var() + two.var()) / runs) ** 0.5


def test_by_client_a_tiny_alpha_does_not_underflow() -> None:
    labels = digits(1000)
    counts = counts_of(dirichlet_by_client(labels, 10, rng(), alpha=1e-6), labels)
    # All is dealt out, and most clients get one class until it is gone.
    assert counts.sum(0).tolist() == [100] * 10 and counts.sum(1).tolist() == [100] * 10


def test_shards_are_runs_of_the_sorted_labels() -> None:
    labels = digits(1000)
    parts = shards(labels, 10, rng(), shards=2)
    counts = counts_of(parts, labels)
    # 20 shards of 50 examples of one class each.
    assert counts.sum(1).tolist() == [100] * 10
    assert bool(((counts % 50) == 0).all()) and int((counts > 0).sum(1).max()) <= 2
    one = counts_of(shards(labels, 10, rng(), shards=1), labels)
    assert sorted(one.argmax(1).tolist()) == list(range(10)) and int((one > 0).sum()) == 10
    with pytest.raises(DataError, match="one for each of 2 shards of 600 clients"):
        shards(labels, 600, rng(), shards=2)


def test_quantity_skews_sizes_and_not_classes() -> None:
    labels = digits(60_000)
    counts = counts_of(quantity(labels, 10, rng(), alpha=0.5), labels).double()
    sizes = counts.sum(1)
    assert int(sizes.sum()) == 60_000 and float(sizes.max()) > 3 * float(sizes.min())
    large = counts[sizes > 2000] / sizes[sizes > 2000, None]
    # Four standard errors of a share of 0.1 among 2,000.
    assert float((large - 0.1).abs().max()) < 4 * (0.09 / 2000) ** 0.5
    tiny = quantity(digits(600), 100, rng(), alpha=0.01, least=3)
    assert min(map(len, tiny)) == 3 and sum(map(len, tiny)) == 600


def test_even_gives_all_or_as_many_as_asked() -> None:
    labels = digits(1003)
    assert sorted(map(len, even(labels, 10, rng()))) == [100] * 7 + [101] * 3
    parts = even(labels, 10, rng(), each=30)
    assert [len(part) for part in parts] == [30] * 10
    # Drawn from all rows, not from the first.
    assert int(torch.cat(parts).max()) > 600
    with pytest.raises(DataError, match="200 for each of 10 clients"):
        even(labels, 10, rng(), each=200)


@pytest.mark.parametrize(
    "given",
    [
        {"name": "even", "alpha": 0.1},
        {"name": "even", "least": 0},
        {"name": "shards", "each": 10},
        {"name": "quantity", "shards": 2},
        {"name": "dirichlet-by-class", "each": 10},
        {"name": "dirichlet-by-class", "size_sigma": 0.3},
        {"name": "dirichlet-by-client", "share": 0.5},
        {"shards": 1},
    ],
)
def test_a_field_that_is_not_used_is_refused(given: Mapping[str, Any]) -> None:
    unused = next(key for key in given if key != "name")
    with pytest.raises(ValidationError, match=f"got {unused} for the partition"):
        PartitionConfig(**given)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_filled_in_and_survive_a_round_trip(name: str) -> None:
    cfg = PartitionConfig(name=name, clients=3)
    assert PartitionConfig(**cfg.model_dump()) == cfg
    kept = cfg.model_dump(exclude_none=True)
    assert PartitionConfig(**kept) == cfg
    if name == "dirichlet-by-class":
        assert kept == {"name": name, "clients": 3, "alpha": 0.1, "share": 1.0, "least": 10}
    with pytest.raises(ValidationError):
        PartitionConfig(name=name, clients=0)


@pytest.mark.parametrize("name", ["dirichlet-by-client", "quantity"])
def test_a_hundred_thousand_clients_take_seconds(name: str) -> None:
    start = time.perf_counter()
    parts = PartitionConfig(name=name, clients=100_000, least=0).deal(digits(60_000), 10, rng())
    assert len(parts) == 100_000 and sum(map(len, parts)) == 60_000
    assert min(map(len, parts)) == 0
    # 0.4 s here; one Python step for each client and class would take minutes.
    assert time.perf_counter() - start < 10


def test_strange_labels_are_refused() -> None:
    for labels in (
        torch.tensor([0, 10]),
        torch.tensor([-1, 0]),
        torch.rand(4),
        torch.eye(2).long(),
    ):
        with pytest.raises(ShapeError, match="int64 from 0 to 9"):
            PartitionConfig(name="even", clients=1).deal(labels, 10, rng())


def test_owned_test_parts_are_disjoint_and_of_owned_classes() -> None:
    test_labels = digits(1005)
    counts = torch.tensor([[1, 0, 9] + [0] * 7, [300, 5, 0] + [0] * 7, [0] * 10])
    parts = held_out(counts, test_labels, rng(), mode="owned")
    found = counts_of(parts, test_labels)
    # floor(101 / 3) and floor(100 / 3), however many a client has.
    assert found.tolist() == [[33, 0, 33] + [0] * 7, [33, 33, 0] + [0] * 7, [0] * 10]
    rows = torch.cat(parts)
    assert len(rows.unique()) == len(rows)
    with pytest.raises(DataError, match="leave it out or choose 'same-mix'"):
        held_out(counts, test_labels, rng(), mode="owned", each=5)


def test_same_mix_test_parts_have_the_mix_of_training() -> None:
    labels, test_labels = digits(6000), digits(2000, seed=8)
    counts = counts_of(dirichlet_by_client(labels, 10, rng(), alpha=0.3), labels)
    parts = held_out(counts, test_labels, rng(), each=60)
    found = counts_of(parts, test_labels)
    assert found.sum(1).tolist() == [60] * 10
    # Largest remainder: off by less than one example in each class.
    exact = 60 * counts / counts.sum(1, keepdim=True)
    assert float((found - exact).abs().max()) < 1
    assert bool((found[counts == 0] == 0).all())
    # All clients together hold every class evenly, so there is enough of each.
    rows = torch.cat(parts)
    assert len(rows.unique()) == len(rows) == 600


def test_same_mix_shares_test_examples_only_where_it_must_and_evenly() -> None:
    test_labels = torch.tensor([0] * 10 + [1] * 100)
    counts = torch.tensor([[5, 0], [5, 0], [5, 0], [0, 5], [9, 1]])
    parts = held_out(counts, test_labels, rng(), each=6)
    assert [len(part) for part in parts] == [6] * 5
    assert all(len(part.unique()) == len(part) for part in parts)
    used = torch.bincount(torch.cat(parts), minlength=110)
    # 6 + 6 + 6 + 5 of the ten of class 0, each of them two or three times; of class 1 none twice.
    assert sorted(used[:10].tolist()) == [2] * 7 + [3] * 3 and int(used[10:].max()) == 1


def test_same_mix_is_smaller_where_a_class_is_short() -> None:
    test_labels = torch.tensor([0] * 4 + [1] * 50)
    counts = torch.tensor([[10, 10, 0], [10, 0, 0], [0, 0, 7], [0, 0, 0]])
    found = counts_of(held_out(counts, test_labels, rng(), each=40), test_labels, 3)
    # Class 2 is not in the test set; half of 8 is all that there is of class 0.
    assert found.tolist() == [[4, 4, 0], [4, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_test_parts_follow_the_seed_and_refuse_strange_counts() -> None:
    counts, labels = torch.ones(3, 10, dtype=torch.int64), digits(300)
    first, same, other = (held_out(counts, labels, rng(seed), each=20) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, same)) and not all(map(torch.equal, first, other))
    for wrong in (torch.ones(10, dtype=torch.int64), torch.ones(0, 10, dtype=torch.int64)):
        with pytest.raises(ShapeError, match="expected"):
            held_out(wrong, labels, rng())
