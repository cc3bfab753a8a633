import pytest
import torch

from vestige.core.protocols import Stateful
from vestige.errors import ContractError, ShapeError
from vestige.sources.memory_bank import MemoryBank


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1).expand(-1, 2).clone()


def content(bank: MemoryBank) -> list[float]:
    """All that can be drawn, each as often as it is there."""
    return sorted(bank.draw(10_000, rng())[:, 0].tolist())


@pytest.mark.parametrize("size", [1, 3, 4, 10, 13, 20, 25])
def test_the_newest_rows_stay_whether_or_not_pushes_divide_the_capacity(size):
    bank, pushed = MemoryBank(10, 2), []
    # Beyond three rounds of the ring; also exactly full, where CMI's code draws nothing.
    for start in range(1, 40, size):
        values = list(range(start, start + size))
        bank.push(rows(*values))
        pushed += values
        assert len(bank) == min(len(pushed), 10)
        assert content(bank) == pushed[-10:]


def test_pushes_of_different_sizes_go_round_exactly():
    bank, pushed, value = MemoryBank(7, 2), [], 0
    for size in (2, 3, 1, 4, 9, 0, 2, 7, 8, 5):
        values = list(range(value, value + size))
        bank.push(rows(*values))
        pushed, value = pushed + values, value + size
        assert content(bank) == pushed[-7:]


def test_rows_that_were_never_pushed_are_never_drawn():
    bank = MemoryBank(1000, 2)
    # The space doubles: 3, 6, 12, 24, of which some is always empty.
    for start in range(1, 20, 3):
        bank.push(rows(start, start + 1, start + 2))
        drawn = bank.draw(1000, rng())
        assert drawn.shape == (start + 2, 2)
        assert sorted(drawn[:, 0].tolist()) == list(range(1, start + 3))
        assert torch.equal(drawn[:, 0], drawn[:, 1])


def test_an_empty_bank_has_no_rows():
    bank = MemoryBank(4, 3)
    assert len(bank) == 0
    assert bank.draw(5, rng()).shape == (0, 3)
    bank.push(torch.zeros(0, 3))
    assert bank.draw(5, rng()).shape == (0, 3)


def test_drawing_is_uniform_without_replacement_and_decided_by_the_generator():
    bank, counts = MemoryBank(6, 2), torch.zeros(6)
    bank.push(rows(*range(6)))
    draws = rng(1)
    for _ in range(1200):
        drawn = bank.draw(2, draws)[:, 0].long()
        assert drawn[0] != drawn[1]
        counts[drawn] += 1
    # 400 each with standard deviation 16: five of them.
    assert (counts - 400).abs().max() < 82
    before = torch.get_rng_state()
    assert torch.equal(bank.draw(5, rng(3)), bank.draw(5, rng(3)))
    assert not torch.equal(bank.draw(5, rng(3)), bank.draw(5, rng(4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_is_close_and_full_precision_exact():
    features = torch.randn(50, 8, generator=rng())
    halves, singles = MemoryBank(50, 8), MemoryBank(50, 8, dtype=torch.float32)
    for bank in (halves, singles):
        bank.push(features)
    order = torch.randperm(50, generator=rng(1))
    assert torch.equal(singles.draw(50, rng(1)), features[order])
    found = halves.draw(50, rng(1))
    assert found.dtype == torch.float32
    # Ten bits and rounding; below 6e-5, where halves have fewer, by their least step.
    assert ((found - features[order]).abs() <= features[order].abs() / 2000 + 6e-8).all()
    assert not torch.equal(found, features[order])
    assert halves.state_dict()["rows"].dtype == torch.float16


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_far_out_stay_finite_whatever_they_are_made_of(kept, given):
    bank = MemoryBank(4, 2, dtype=kept)
    largest = torch.finfo(given).max
    bank.push(torch.tensor([[largest, -largest], [1.5, -2.0]], dtype=given))
    far, near = bank.draw(2, rng()).sort(0, descending=True).values.unbind()
    assert torch.isfinite(far).all()
    assert far[0] >= 60_000
    assert near[1] <= -60_000
    assert (far[1], near[0]) == (-2.0, 1.5)


def test_rows_are_copies_without_gradient():
    bank = MemoryBank(4, 2, dtype=torch.float32)
    bank.push(rows(1, 1).requires_grad_() * 1)
    source = rows(2, 2)
    bank.push(source)
    source.zero_()
    drawn = bank.draw(4, rng())
    assert not drawn.requires_grad
    drawn.zero_()
    assert content(bank) == [1, 1, 2, 2]


@pytest.mark.parametrize("before", [0, 3, 5, 12])
def test_a_bank_goes_on_as_before_from_its_state(before):
    bank, other = MemoryBank(5, 2), MemoryBank(5, 2)
    assert isinstance(bank, Stateful)
    # One by one, so that there is space for rows that were not pushed yet.
    for value in range(before):
        bank.push(rows(value))
    other.push(rows(99))
    state = bank.state_dict()
    assert before == 0 or state["rows"].shape == (min(before, 5), 2)
    other.load_state_dict(state)
    for one in (bank, other):
        one.push(rows(20, 21))
    assert len(bank) == len(other) == min(before + 2, 5)
    assert torch.equal(bank.draw(5, rng()), other.draw(5, rng()))


def test_the_state_of_an_untouched_bank_empties_another():
    bank = MemoryBank(5, 2)
    bank.push(rows(1, 2))
    bank.load_state_dict(MemoryBank(5, 2).state_dict())
    assert len(bank) == 0
    assert len(bank.draw(3, rng())) == 0


def test_a_loaded_bank_does_not_share_memory_with_its_state():
    bank, other = MemoryBank(2, 2), MemoryBank(2, 2)
    bank.push(rows(1, 2))
    other.load_state_dict(bank.state_dict())
    bank.push(rows(3, 4))
    assert content(other) == [1, 2]


@pytest.mark.parametrize("capacity", [3, 8])
def test_the_state_of_a_bank_of_another_capacity_is_refused(capacity):
    bank = MemoryBank(5, 2)
    bank.push(rows(*range(12)))
    with pytest.raises(ShapeError, match=r"got 12 pushed .*\(5, 2\) are kept, expected .*capacity"):
        MemoryBank(capacity, 2).load_state_dict(bank.state_dict())


def test_mistakes_are_refused():
    for capacity, width in ((0, 2), (2, 0)):
        with pytest.raises(ContractError, match=f"capacity {capacity} and width {width}, expected"):
            MemoryBank(capacity, width)
    for wrong in (torch.zeros(3, 4), torch.zeros(2), torch.zeros(3, 2, 1)):
        with pytest.raises(ShapeError, match=r"got rows .*expected \(N, 2\)"):
            MemoryBank(5, 2).push(wrong)
    other = MemoryBank(5, 3)
    other.push(torch.zeros(1, 3))
    with pytest.raises(ShapeError, match=r"expected \(1, 2\)"):
        MemoryBank(5, 2).load_state_dict(other.state_dict())
