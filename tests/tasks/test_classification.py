import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core.types import Access, InputSpec, Prediction
from vestige.errors import DataError, ShapeError
from vestige.tasks.classification import Classification

SPEC = InputSpec("embedding", (3,))


class Identity(nn.Module):
    """Its inputs are its logits; wrapped as many libraries wrap them."""

    def __init__(self, wrap: type = Prediction) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, inputs: Tensor) -> object:
        return (inputs, "more") if self.wrap is tuple else self.wrap(inputs)


@pytest.fixture
def task() -> Classification:
    return Classification(SPEC, 3)


LOGITS = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [2, 0, 0], [0, 2, 0]])
LABELS = torch.tensor([0, 1, 1, 1, 1])


def test_accuracy_and_loss_are_those_of_the_definition(task: Classification) -> None:
    scores = task.evaluate(Identity(), (LOGITS, LABELS))
    right, wrong = 2 - math.log(math.e**2 + 2), 0 - math.log(math.e**2 + 2)
    assert scores == {
        "accuracy": 0.6,
        "loss": pytest.approx(-(3 * right + 2 * wrong) / 5, rel=1e-6),
    }


def test_loss_is_a_mean_over_inputs_whatever_the_batches(task: Classification) -> None:
    inputs, labels = torch.randn(23, 3), torch.randint(3, (23,))
    whole = functional.cross_entropy(inputs, labels).item()
    for batch_size in (1, 5, 23, 100):
        scores = task.evaluate(Identity(tuple), (inputs, labels), batch_size=batch_size)
        assert scores["loss"] == pytest.approx(whole, rel=1e-6)
        assert scores["accuracy"] == int((inputs.argmax(1) == labels).sum()) / 23


def test_report_counts_by_class(task: Classification) -> None:
    report = task.report(Identity(), (LOGITS, LABELS), batch_size=2)
    assert report.confusion.tolist() == [[1, 0, 0], [1, 2, 1], [0, 0, 0]]
    assert report.per_class[:2].tolist() == [1.0, 0.5]
    assert math.isnan(report.per_class[2].item())


def test_agreement(task: Classification) -> None:
    swapped = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        swapped.weight.copy_(torch.eye(3)[[1, 0, 2]])
    assert task.agreement(Identity(), Identity(), LOGITS, batch_size=2) == 1.0
    assert task.agreement(Identity(), swapped, LOGITS, batch_size=2) == 0.2


def test_evaluation_leaves_the_network_as_it_was(tiny_student: nn.Sequential) -> None:
    tiny_student.append(nn.Dropout(0.5)).train()
    tiny_student[1].eval()  # a frozen BatchNorm inside a network that trains
    before = copy.deepcopy(tiny_student.state_dict())
    flags = [module.training for module in tiny_student.modules()]
    task = Classification(InputSpec.image(1, 8, 8), 3)
    data = torch.randn(20, 1, 8, 8), torch.randint(3, (20,))
    first, second = task.evaluate(tiny_student, data), task.evaluate(tiny_student, data)
    task.report(tiny_student, data)
    task.agreement(tiny_student, tiny_student, data[0])
    assert first == second  # dropout was off
    assert [module.training for module in tiny_student.modules()] == flags
    after = tiny_student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tiny_student(data[0]).sum().backward()  # and it can still be trained


def test_flags_come_back_after_an_error(tiny_student: nn.Sequential) -> None:
    tiny_student[1].eval()
    flags = [module.training for module in tiny_student.modules()]
    with pytest.raises(ShapeError):
        Classification(InputSpec.image(1, 8, 8), 4).evaluate(
            tiny_student, (torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
        )
    assert [module.training for module in tiny_student.modules()] == flags
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_teacher_that_is_no_module_can_be_judged(task: Classification) -> None:
    class Oracle:
        access = Access.SCORES

        def __call__(self, inputs: Tensor) -> Prediction:
            return Prediction(inputs)

    assert task.evaluate(Oracle(), (LOGITS, LABELS))["accuracy"] == 0.6  # type: ignore[arg-type]


def test_shape_mistakes_say_what_to_do(task: Classification) -> None:
    with pytest.raises(ShapeError, match=r"\(5, 3\) from Identity, expected \(5, 4\).*num_classes"):
        Classification(SPEC, 4).evaluate(Identity(), (LOGITS, LABELS))
    with pytest.raises(ShapeError, match=r"\(5, 2\), expected \(N, 3\)"):
        task.evaluate(Identity(), (LOGITS[:, :2], LABELS))
    with pytest.raises(ShapeError, match=r"labels of shape \(4,\), expected \(5,\)"):
        task.evaluate(Identity(), (LOGITS, LABELS[:4]))


def test_label_mistakes_say_what_to_do(task: Classification) -> None:
    with pytest.raises(DataError, match="from 1 to 3, expected 0 to 2"):
        task.evaluate(Identity(), (LOGITS, torch.tensor([1, 2, 3, 1, 1])))
    with pytest.raises(DataError, match="from -1 to 1"):
        task.evaluate(Identity(), (LOGITS, torch.tensor([-1, 0, 1, 0, 0])))
    with pytest.raises(DataError, match=r"float32, expected int64"):
        task.evaluate(Identity(), (LOGITS, LABELS.float()))
    with pytest.raises(DataError, match="no inputs"):
        task.evaluate(Identity(), (LOGITS[:0], LABELS[:0]))
    with pytest.raises(DataError, match="num_classes=1"):
        Classification(SPEC, 1)


def test_small_integer_labels_are_labels(task: Classification) -> None:
    assert task.evaluate(Identity(), (LOGITS, LABELS.to(torch.uint8)))["accuracy"] == 0.6


class Column(nn.Module):
    """Answers the class that stands in one column of its inputs."""

    def __init__(self, column: int, classes: int) -> None:
        super().__init__()
        self.column, self.classes = column, classes

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.one_hot(inputs[:, self.column].long(), self.classes).float()


def test_details_tell_who_is_right_where() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    student = torch.tensor([0, 1, 0, 1, 2, 0, 1, 0])
    teacher = torch.tensor([0, 0, 1, 1, 2, 2, 1, 2])
    inputs = torch.stack([student, teacher, labels], 1).float()
    found = Classification(InputSpec("embedding", (3,)), 3).details(
        Column(0, 3), Column(1, 3), (inputs, labels), batch_size=3
    )
    assert json.loads(json.dumps(found)) == found
    assert found["inputs"] == 8 and found["inputs_per_class"] == [3, 4, 1]
    assert found["student"] == {"accuracy": 0.5, "per_class": [2 / 3, 0.5, 0.0]}
    assert found["teacher"] == {"accuracy": 5 / 8, "per_class": [2 / 3, 0.5, 1.0]}
    assert found["agreement"] == {
        "share": 0.5,  # inputs 0, 3, 4 and 6
        "both_right": 3,
        "student_alone_right": 1,
        "teacher_alone_right": 2,
        "same_wrong": 1,
        "different_wrong": 1,
    }
    assert found["confusion"]["student"] == [[2, 1, 0], [1, 2, 1], [1, 0, 0]]
    assert found["confused"][0] == {"class": 0, "taken_for": 1, "count": 1}
    assert sum(item["count"] for item in found["confused"]) == 4


def test_details_do_with_no_teacher_and_with_empty_classes(task: Classification) -> None:
    found = task.details(Identity(), None, (LOGITS, LABELS))
    assert found["teacher"] is None and found["agreement"] is None
    assert list(found["confusion"]) == ["student"]
    assert found["student"]["per_class"] == [1.0, 0.5, None]
    assert found["student"]["accuracy"] == task.evaluate(Identity(), (LOGITS, LABELS))["accuracy"]


@pytest.mark.parametrize(("classes", "drawn"), [(2, True), (20, True), (21, False), (1000, False)])
def test_the_confusion_of_many_classes_is_cut_to_the_most_frequent_mistakes(
    classes: int, drawn: bool
) -> None:
    labels = torch.arange(classes).repeat(2)
    # Every class is right once and taken for its neighbour once; class 0 for class 1 once more.
    answers = torch.cat([torch.arange(classes), (torch.arange(classes) + 1) % classes])
    labels, answers = torch.cat([labels, labels[:1]]), torch.cat([answers, torch.tensor([1])])
    inputs = answers[:, None].float()
    task = Classification(InputSpec("embedding", (1,)), classes)
    found = task.details(Column(0, classes), None, (inputs, labels))
    assert (found["confusion"] is not None) is drawn
    assert found["confused"][0] == {"class": 0, "taken_for": 1, "count": 2}
    assert len(found["confused"]) == min(classes, 10)
    assert len(found["student"]["per_class"]) == classes
