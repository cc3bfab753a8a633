import copy
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
