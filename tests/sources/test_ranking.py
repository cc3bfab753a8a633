"""The subset of foreign images that a teacher is least sure of."""

import pytest
import torch
from torch import nn

from vestige.core.types import InputSpec
from vestige.errors import ContractError, DataError, RecipeError
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource
from vestige.sources.ranking import UncertainRows, most_uncertain
from vestige.teachers.white_box import WhiteBoxTeacher

CPU = torch.device("cpu")


def teacher() -> WhiteBoxTeacher:
    """Logits (x, 0): the entropy falls with the absolute value of x."""
    net = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [0.0]]))
    return WhiteBoxTeacher(net)


def numbers(*values: float) -> TensorSource:
    return TensorSource(torch.tensor(values)[:, None], origin="foreign", name="numbers")


@pytest.mark.parametrize("batch_size", [2, 512])
def test_the_surest_rows_are_left_out(batch_size):
    source = numbers(5, -0.1, 9, 0, -7, 1)
    kept = most_uncertain(teacher(), source, 3, device=CPU, batch_size=batch_size)
    assert kept.tolist() == [1, 3, 5]


def test_draws_come_from_the_subset_alone_and_are_on_record():
    rows = UncertainRows(numbers(5, -0.1, 9, 0, -7, 1), 3)
    rows.rank(teacher(), CPU)
    drawn = rows.draw(200, torch.Generator().manual_seed(0))
    assert {round(value, 3) for value in drawn.flatten().tolist()} == {-0.1, 0.0, 1.0}
    assert rows.selection.seen.tolist() == [1] * 6
    assert rows.selection.kept.tolist() == [0, 1, 0, 1, 0, 1]


def test_every_row_is_asked_once():
    asked = teacher()
    UncertainRows(numbers(5, -0.1, 9), 2).rank(asked, CPU)
    assert asked.queries == 3


def test_what_cannot_be_a_subset_is_refused():
    with pytest.raises(DataError, match="a subset of 4 of the 3 images of 'numbers'"):
        most_uncertain(teacher(), numbers(1, 2, 3), 4, device=CPU)
    with pytest.raises(RecipeError, match="which have no numbers"):
        UncertainRows(NoiseSource(InputSpec("vector", (1,))), 3)
    with pytest.raises(ContractError, match="call rank first"):
        UncertainRows(numbers(1, 2), 1).rows(torch.tensor([0]))
