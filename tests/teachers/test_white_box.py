import copy

import pytest
import torch
from torch import nn

from vestige.core.types import Access, Prediction
from vestige.errors import TeacherError
from vestige.teachers.white_box import WhiteBoxTeacher


def test_it_is_frozen_but_passes_gradient_to_its_inputs(tiny_student: nn.Sequential) -> None:
    teacher = WhiteBoxTeacher(tiny_student.train())
    inputs = torch.randn(4, 1, 8, 8, requires_grad=True)
    prediction = teacher(inputs)
    assert isinstance(prediction, Prediction)
    prediction.logits.square().sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in teacher.parameters())
    assert not any(weight.requires_grad for weight in teacher.parameters())
    assert teacher.access is Access.WHITE_BOX and teacher.module is tiny_student


def test_nothing_puts_it_into_training_mode(tiny_teacher: nn.Sequential) -> None:
    teacher = WhiteBoxTeacher(tiny_teacher.train())
    before = copy.deepcopy(teacher.state_dict())
    assert teacher.train() is teacher
    nn.ModuleDict({"teacher": teacher, "student": nn.Linear(2, 2)}).train()
    teacher(torch.randn(16, 1, 8, 8))
    assert not any(module.training for module in teacher.modules())
    after = teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["5.weight", "1.running_var"])
def test_broken_weights_are_named(tiny_teacher: nn.Sequential, value: float, name: str) -> None:
    tiny_teacher.state_dict()[name].view(-1)[1] = value
    with pytest.raises(TeacherError, match=rf"1 NaN or infinite values of \d+ in '{name}'"):
        WhiteBoxTeacher(tiny_teacher)


def test_rows_that_are_asked_and_rows_that_lead_back_to_the_inputs_are_counted(
    tiny_teacher: nn.Sequential,
) -> None:
    teacher = WhiteBoxTeacher(tiny_teacher)
    inputs = torch.randn(4, 1, 8, 8)
    teacher(inputs)
    assert (teacher.queries, teacher.gradients) == (4, 0)
    teacher(inputs[:3].requires_grad_())
    assert (teacher.queries, teacher.gradients) == (7, 3)
    with torch.no_grad():
        teacher(inputs.requires_grad_())
    assert (teacher.queries, teacher.gradients) == (11, 3)
