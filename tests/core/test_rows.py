import pytest
import torch

from vestige.core.rows import RowSource, Selection
from vestige.errors import ContractError
from vestige.sources.images import TensorSource


def test_a_row_that_is_looked_at_twice_counts_twice() -> None:
    selection = Selection(4)
    selection.note(torch.tensor([1, 1, 3]), torch.tensor([True, False, True]))
    assert selection.seen.tolist() == [0, 2, 0, 1]
    assert selection.kept.tolist() == [0, 1, 0, 1]


def test_counts_come_back_from_a_checkpoint() -> None:
    selection, other = Selection(3), Selection(3)
    selection.note(torch.tensor([0, 2]), torch.tensor([False, True]))
    other.load_state_dict(selection.state_dict())
    other.note(torch.tensor([2]), torch.tensor([True]))
    assert other.seen.tolist() == [1, 0, 2]
    assert other.kept.tolist() == [0, 0, 2]


def test_weights_are_no_choice() -> None:
    with pytest.raises(ContractError, match="one truth value per row"):
        Selection(3).note(torch.tensor([0]), torch.tensor([0.5]))


def test_rows_of_a_tensor_are_what_was_handed_in() -> None:
    inputs = torch.arange(12.0).view(4, 3)
    source = TensorSource(inputs, origin="foreign", name="numbers")
    assert isinstance(source, RowSource)
    assert torch.equal(source.rows(torch.tensor([3, 0])), inputs[[3, 0]])
