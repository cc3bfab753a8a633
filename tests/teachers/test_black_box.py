import pytest
import torch
from torch import Tensor, nn

from vestige.core.protocols import Stateful
from vestige.core.types import Access
from vestige.errors import AccessError, QueryBudgetExceeded, ShapeError, TeacherError
from vestige.teachers.black_box import BlackBoxTeacher


class Counting:
    """An API: remembers how many rows it was really asked."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        self.rows += len(inputs)
        return inputs * 2


def test_budget_is_met_exactly_and_never_passed() -> None:
    api = Counting()
    teacher = BlackBoxTeacher(api, budget=10)
    teacher(torch.ones(4, 3))
    teacher(torch.ones(6, 3))  # the tenth query is still allowed
    assert teacher.queries == api.rows == 10
    with pytest.raises(QueryBudgetExceeded, match="batch of 1 queries, expected at most 0"):
        teacher(torch.ones(1, 3))
    assert teacher.queries == api.rows == 10


def test_a_batch_that_is_too_large_is_not_asked_in_part() -> None:
    api = Counting()
    teacher = BlackBoxTeacher(api, budget=10)
    teacher(torch.ones(7, 3))
    with pytest.raises(QueryBudgetExceeded, match=r"batch of 4 .* at most 3: 7 of 10 are used"):
        teacher(torch.ones(4, 3))
    assert api.rows == 7
    teacher(torch.ones(3, 3))
    assert api.rows == 10


def test_the_count_survives_a_resume() -> None:
    teacher, resumed = (BlackBoxTeacher(Counting(), budget=5) for _ in range(2))
    teacher(torch.ones(3, 3))
    assert isinstance(teacher, Stateful)
    resumed.load_state_dict(teacher.state_dict())
    assert resumed.queries == 3
    with pytest.raises(QueryBudgetExceeded):
        resumed(torch.ones(3, 3))


def test_a_lost_answer_is_charged() -> None:
    def lost(inputs: Tensor) -> Tensor:
        raise ConnectionError("gone")

    teacher = BlackBoxTeacher(lost)
    with pytest.raises(ConnectionError):
        teacher(torch.ones(2, 3))
    assert teacher.queries == 2


def test_scores_come_without_gradient(tiny_teacher: nn.Sequential) -> None:
    expected = tiny_teacher.eval()(inputs := torch.randn(5, 1, 8, 8))
    teacher = BlackBoxTeacher(tiny_teacher.requires_grad_(True).train())
    answer = teacher(inputs.requires_grad_()).logits
    assert not answer.requires_grad
    torch.testing.assert_close(answer, expected)  # in eval mode
    assert torch.is_grad_enabled()


def test_labels_show_the_best_class_only(tiny_teacher: nn.Sequential) -> None:
    inputs = torch.randn(20, 1, 8, 8)
    scores = BlackBoxTeacher(tiny_teacher)(inputs).logits
    labels = BlackBoxTeacher(tiny_teacher, access=Access.LABELS)(inputs).logits
    assert labels.shape == scores.shape and labels.dtype == torch.float32
    assert torch.equal(labels.argmax(1), scores.argmax(1))
    assert set(labels.unique().tolist()) == {0.0, 1.0} and torch.equal(
        labels.sum(1), torch.ones(20)
    )


def test_dense_labels_keep_the_class_dimension_second() -> None:
    scores = torch.randn(2, 4, 3, 5)
    labels = BlackBoxTeacher(lambda x: x, access=Access.LABELS)(scores).logits
    assert labels.shape == scores.shape and torch.equal(labels.argmax(1), scores.argmax(1))


def test_a_model_that_names_classes() -> None:
    teacher = BlackBoxTeacher(lambda x: x.argmax(1), access=Access.LABELS, num_classes=4)
    assert teacher(torch.eye(4)[[2, 0]]).logits.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    with pytest.raises(ShapeError, match="access='labels'"):
        BlackBoxTeacher(lambda x: x.argmax(1))(torch.eye(4))


def test_the_network_is_not_to_be_had(tiny_teacher: nn.Sequential) -> None:
    with pytest.raises(AccessError, match="access 'labels', expected access 'white_box'"):
        _ = BlackBoxTeacher(tiny_teacher, access=Access.LABELS).module


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(AccessError, match="white_box"):
        BlackBoxTeacher(Counting(), access=Access.WHITE_BOX)
    with pytest.raises(TeacherError, match="budget=0"):
        BlackBoxTeacher(Counting(), budget=0)
