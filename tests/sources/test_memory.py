import pytest
import torch

from vestige.core.protocols import Stateful
from vestige.errors import ContractError
from vestige.sources.memory import ReservoirMemory, RingMemory


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1).expand(-1, 2).clone()


def content(memory: RingMemory) -> set[float]:
    """Everything that can be drawn."""
    return set(memory.draw(500, rng())[:, 0].tolist())


def test_only_the_newest_rows_stay():
    memory = RingMemory(5)
    assert len(memory) == 0
    kept: list[float] = []
    for start in range(0, 24, 3):
        values = [float(start + index) for index in range(3)]
        memory.push(rows(*values))
        kept = [*kept, *values][-5:]
        assert len(memory) == len(kept)
        # 500 draws from at most 5 rows: one is missed with probability below 1e-47.
        assert content(memory) == set(kept)


def test_of_more_rows_than_fit_the_last_ones_stay():
    memory = RingMemory(3)
    memory.push(rows(*range(10)))
    assert len(memory) == 3
    assert content(memory) == {7.0, 8.0, 9.0}
    memory.push(rows(10))
    assert content(memory) == {8.0, 9.0, 10.0}


def test_rows_that_were_never_written_are_never_drawn():
    memory = RingMemory(100)
    memory.push(rows(1, 2))
    assert content(memory) == {1.0, 2.0}


def test_drawing_is_uniform_and_decided_by_the_generator():
    memory = RingMemory(4)
    memory.push(rows(0, 1, 2, 3))
    drawn = memory.draw(4000, rng(1))
    assert drawn.shape == (4000, 2)
    counts = torch.bincount(drawn[:, 0].long(), minlength=4)
    # 1000 each with deviation 27: five of them.
    assert ((counts - 1000).abs() < 137).all()
    assert torch.equal(drawn, memory.draw(4000, rng(1)))
    assert not torch.equal(drawn, memory.draw(4000, rng(2)))


def test_rows_are_copies_without_gradient():
    memory, pushed = RingMemory(4), rows(1, 2).requires_grad_()
    memory.push(pushed * 1)
    assert not memory.draw(2, rng()).requires_grad
    source = rows(5, 5, 5, 5)
    memory.push(source)
    source.zero_()
    drawn = memory.draw(3, rng())
    drawn.zero_()
    assert content(memory) == {5.0}


def test_what_is_drawn_depends_on_the_state_alone():
    memory, other = RingMemory(5), RingMemory(5)
    assert isinstance(memory, Stateful)
    memory.push(rows(*range(7)))
    other.push(rows(9, 9))
    state = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in memory.state_dict().items()
    }
    other.load_state_dict(state)
    for memories in (memory, other):
        memories.push(rows(20, 21))
    assert torch.equal(memory.draw(50, rng()), other.draw(50, rng()))


def test_an_empty_state_goes_forth_and_back():
    memory = RingMemory(2)
    memory.push(rows(1))
    memory.load_state_dict(RingMemory(2).state_dict())
    assert len(memory) == 0
    with pytest.raises(ContractError, match="push first"):
        memory.draw(1, rng())


def test_mistakes_are_refused():
    with pytest.raises(ContractError, match="capacity 0"):
        RingMemory(0)
    with pytest.raises(ContractError, match="empty memory"):
        RingMemory(1).draw(1, rng())


def test_a_reservoir_keeps_early_and_late_rows_alike():
    kept = torch.zeros(40)
    for seed in range(400):
        memory, draws = ReservoirMemory(10), rng(seed)
        for start in range(0, 40, 8):
            memory.push(rows(*range(start, start + 8)), draws)
        assert len(memory) == 10
        kept += torch.bincount(memory.state_dict()["rows"][:, 0].long(), minlength=40)
    # Each of 40 rows stays with probability 1/4: 100 of 400, standard deviation 8.7.
    assert kept.sum() == 4000
    assert (kept - 100).abs().max() < 4 * 8.7


def test_a_reservoir_that_is_not_full_keeps_all():
    memory = ReservoirMemory(5)
    memory.push(rows(0, 1), rng())
    memory.push(rows(2), rng())
    assert memory.state_dict()["rows"][:, 0].tolist() == [0.0, 1.0, 2.0]


def test_a_reservoir_goes_on_as_before_from_its_state():
    memory, draws = ReservoirMemory(4), rng(1)
    memory.push(rows(*range(9)), draws)
    other = ReservoirMemory(4)
    other.load_state_dict(memory.state_dict())
    at = draws.get_state()
    memory.push(rows(*range(9, 20)), draws)
    draws.set_state(at)
    other.push(rows(*range(9, 20)), draws)
    torch.testing.assert_close(memory.state_dict()["rows"], other.state_dict()["rows"])
