import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from vestige.core import seeding


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.random()), random.random()


def test_a_stream_is_the_same_every_time_and_in_every_process():
    made = seeding.generator(3, "noise")
    first = torch.rand(4, generator=made)
    assert torch.equal(first, torch.rand(4, generator=seeding.generator(3, "noise")))
    code = "from vestige.core.seeding import derive; print(derive(3, 'noise'))"
    # Hash randomisation differs between processes, a stream must not.
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == seeding.derive(3, "noise")


def test_streams_differ_by_name_and_by_seed():
    seeds = {seeding.derive(seed, name) for seed in range(20) for name in ("a", "b", "1/a", "ab")}
    assert len(seeds) == 80
    # One stream without the separator.
    assert seeding.derive(1, "1a") != seeding.derive(11, "a")
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_stream_does_not_depend_on_what_others_drew():
    quiet = torch.rand(3, generator=seeding.generator(0, "a"))
    other, made = seeding.generator(0, "b"), seeding.generator(0, "a")
    torch.rand(100, generator=other)
    torch.rand(100)
    assert torch.equal(torch.rand(3, generator=made), quiet)


def test_neighbouring_seeds_are_not_related():
    values = torch.stack([torch.randn(50, generator=seeding.generator(s, "x")) for s in range(50)])
    correlation = torch.corrcoef(values) - torch.eye(50)
    # 1225 pairs of 50 draws: deviation 1/7 each, six of them.
    assert correlation.abs().max() < 6 / 7


def test_seed_globals_decides_all_global_generators():
    seeding.seed_globals(5)
    first = draws()
    seeding.seed_globals(5)
    assert draws() == first
    seeding.seed_globals(6)
    assert all(one != other for one, other in zip(draws(), first, strict=True))


def test_global_state_goes_forth_and_back():
    random.gauss(0, 1)
    np.random.normal()
    state = seeding.global_state()
    first = draws(), np.random.normal(), random.gauss(0, 1)
    seeding.set_global_state(state)
    assert (draws(), np.random.normal(), random.gauss(0, 1)) == first


@pytest.mark.parametrize("error", [False, True])
def test_preserved_leaves_the_global_generators_as_found(error):
    state = seeding.global_state()
    expected = draws()
    seeding.set_global_state(state)
    try:
        with seeding.preserved():
            draws()
            if error:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert draws() == expected


def test_seeded_gives_the_same_weights_whatever_was_built_before_and_restores():
    def weights(before: int) -> torch.Tensor:
        torch.manual_seed(before)
        with seeding.seeded(0, "student"):
            return nn.Linear(3, 3).weight

    assert torch.equal(weights(1), weights(2))
    with seeding.seeded(0, "generator"):
        assert not torch.equal(nn.Linear(3, 3).weight, weights(1))
    seeding.seed_globals(9)
    expected = draws()
    seeding.seed_globals(9)
    with seeding.seeded(0, "student"):
        draws()
    assert draws() == expected
