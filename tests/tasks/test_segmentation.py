import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core.protocols import JudgesInDetail, ShowsAnswers
from vestige.core.types import Access, InputSpec, Prediction
from vestige.errors import DataError, ShapeError, TeacherError
from vestige.tasks._colours import class_colours
from vestige.tasks.segmentation import Segmentation

SPEC = InputSpec.image(3, 2, 3)
# One input of 2x3 pixels and three classes: rows are of the true classes below.
TRUTH = torch.tensor([[[0, 0, 1], [1, 2, 255]]])
SAID = torch.tensor([[[0, 1, 1], [1, 1, 0]]])


def says(answers: Tensor, strength: float = 2.0) -> Tensor:
    """Logits whose largest is of `answers`."""
    return functional.one_hot(answers, 3).permute(0, 3, 1, 2).float() * strength


class Identity(nn.Module):
    """Its inputs are its logits; wrapped as networks for segmentation wrap them."""

    def __init__(self, wrap: str = "tensor") -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, inputs: Tensor) -> object:
        return {"out": inputs, "aux": inputs[:, :1]} if self.wrap == "out" else inputs


@pytest.fixture
def task() -> Segmentation:
    return Segmentation(SPEC, 3)


def test_scores_are_those_of_the_definition(task: Segmentation) -> None:
    scores = task.evaluate(Identity(), (says(SAID), TRUTH))
    # Class 0: 1 of 2 found, nothing else taken for it; 1: 2 found, 4 taken for it; 2: none found.
    assert scores["miou"] == pytest.approx((1 / 2 + 2 / 4 + 0 / 1) / 3)
    # The ignored pixel was answered with 0 and counts nowhere.
    assert scores["pixel_accuracy"] == 3 / 5
    right, wrong = 2 - math.log(math.e**2 + 2), -math.log(math.e**2 + 2)
    assert scores["loss"] == pytest.approx(-(3 * right + 2 * wrong) / 5)


def test_a_class_that_is_nowhere_is_left_out_of_the_mean() -> None:
    task = Segmentation(SPEC, 3)
    truth = torch.tensor([[[0, 0, 1], [1, 1, 1]]])
    said = torch.tensor([[[0, 1, 1], [1, 1, 1]]])
    assert task.evaluate(Identity(), (says(said), truth))["miou"] == pytest.approx((0.5 + 0.8) / 2)
    # One that is only answered has an empty intersection, not an empty union.
    said[0, 0, 0] = 2
    assert task.evaluate(Identity(), (says(said), truth))["miou"] == pytest.approx((0 + 0.8) / 3)


def test_the_matrix_is_one_over_all_inputs_whatever_the_batches(task: Segmentation) -> None:
    inputs, masks = torch.randn(23, 3, 2, 3), torch.randint(3, (23, 2, 3))
    masks[torch.rand(masks.shape) < 0.2] = 255
    truth, said = masks.numpy(), inputs.argmax(1).numpy()
    shares = []
    for label in range(3):
        both = ((truth == label) & (said == label)).sum()
        either = (((truth == label) | (said == label)) & (truth != 255)).sum()
        shares.append(both / either)
    for batch_size in (1, 5, 23, 100):
        scores = task.evaluate(Identity("out"), (inputs, masks), batch_size=batch_size)
        assert scores["miou"] == pytest.approx(np.mean(shares), rel=1e-12)
        loss = functional.cross_entropy(inputs, masks, ignore_index=255)
        assert scores["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_bytes_and_a_negative_index_to_ignore(task: Segmentation) -> None:
    inputs = torch.randn(4, 3, 2, 3)
    masks = torch.randint(3, (4, 2, 3))
    masks[:, 0] = 255
    as_bytes = task.evaluate(Identity(), (inputs, masks.to(torch.uint8)))
    assert as_bytes == task.evaluate(Identity(), (inputs, masks))
    negative = Segmentation(SPEC, 3, ignore_index=-1)
    masks[:, 0] = -1
    assert negative.evaluate(Identity(), (inputs, masks)) == as_bytes
    # 255 among bytes is not -1.
    with pytest.raises(DataError, match="values 255, expected 0 to 2, or -1"):
        negative.evaluate(Identity(), (inputs, masks.to(torch.uint8)))


def test_a_class_may_be_the_ignored_one() -> None:
    scores = Segmentation(SPEC, 3, ignore_index=0).evaluate(
        Identity(), (says(SAID), TRUTH.where(TRUTH != 255, 0))
    )
    assert scores["pixel_accuracy"] == 2 / 3
    assert scores["miou"] == pytest.approx((2 / 3 + 0) / 2)


def test_report_and_agreement(task: Segmentation) -> None:
    report = task.report(Identity(), (says(SAID), TRUTH))
    assert report.confusion.tolist() == [[1, 1, 0], [0, 2, 0], [0, 1, 0]]
    assert report.per_class.tolist() == [0.5, 0.5, 0.0]
    swapped = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        swapped.weight.copy_(torch.eye(3)[[1, 0, 2]][:, :, None, None])
    inputs = says(torch.tensor([[[0, 1, 2], [2, 2, 2]]]))
    assert task.agreement(Identity(), Identity(), inputs) == 1.0
    assert task.agreement(Identity(), swapped, inputs) == pytest.approx(4 / 6)


def test_details_are_plain_and_consistent(task: Segmentation) -> None:
    assert isinstance(task, JudgesInDetail)
    data = torch.cat([says(SAID), says(SAID)]), torch.cat([TRUTH, TRUTH])

    def teacher(inputs: Tensor) -> Prediction:
        return Prediction(says(TRUTH.where(TRUTH != 255, 0).expand(len(inputs), -1, -1)))

    teacher.access = Access.SCORES  # type: ignore[attr-defined]
    told = task.details(Identity(), teacher, data, batch_size=1)
    assert json.loads(json.dumps(told)) == told
    assert (told["inputs"], told["pixels"]) == (2, 10)
    assert told["pixels_per_class"] == [4, 4, 2]
    assert told["student"] == {
        "miou": pytest.approx(1 / 3),
        "pixel_accuracy": 0.6,
        "per_class": [0.5, 0.5, 0.0],
    }
    assert told["teacher"]["miou"] == 1.0
    assert told["agreement"] == {"share": 0.6}
    assert told["confusion"]["student"] == [[2, 2, 0], [0, 4, 0], [0, 2, 0]]
    assert told["confusion"]["teacher"] == [[4, 0, 0], [0, 4, 0], [0, 0, 2]]
    alone = task.details(Identity(), None, data)
    assert alone["teacher"] is None and alone["agreement"] is None
    assert alone["student"] == told["student"]


def test_details_of_a_class_that_is_nowhere_and_of_many_classes() -> None:
    spec = InputSpec.image(25, 1, 2)
    inputs = torch.zeros(1, 25, 1, 2)
    inputs[0, 3, 0, :] = 1
    told = Segmentation(spec, 25).details(Identity(), None, (inputs, torch.tensor([[[3, 4]]])))
    assert told["student"]["per_class"][:5] == [None, None, None, 0.5, 0.0]
    assert told["student"]["miou"] == 0.25 and told["confusion"] is None


def test_evaluation_leaves_the_network_as_it_was(task: Segmentation) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    network[1].eval()  # a frozen BatchNorm inside a network that trains
    before = copy.deepcopy(network.state_dict())
    data = torch.randn(5, 3, 2, 3), torch.randint(3, (5, 2, 3))
    assert task.evaluate(network, data) == task.evaluate(network, data)
    task.details(network, network, data)
    task.answers(network, network, data)
    task.check(network)
    assert [module.training for module in network.modules()] == [True, True, False, True]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


def test_half_precision_logits_are_judged_in_float32(task: Segmentation) -> None:
    inputs, masks = torch.randn(4, 3, 2, 3).half().float(), torch.randint(3, (4, 2, 3))
    half = nn.Identity()
    half.forward = lambda inputs: inputs.half()  # type: ignore[method-assign]
    assert task.evaluate(half, (inputs, masks)) == task.evaluate(Identity(), (inputs, masks))


@pytest.mark.parametrize(
    ("network", "got", "expected"),
    [
        (nn.Conv2d(3, 4, 1), "(2, 4, 2, 3) from Conv2d", "expected (2, 3, 2, 3)"),
        (nn.Flatten(), "(2, 18) from Flatten", "set num_classes"),
        (nn.AvgPool2d((1, 3)), "2x1 pixels from AvgPool2d, expected 2x3", "upsample its logits"),
    ],
)
def test_logits_of_another_shape_are_named(
    task: Segmentation, network: nn.Module, got: str, expected: str
) -> None:
    for ask in (
        lambda: task.evaluate(network, (torch.zeros(2, 3, 2, 3), TRUTH.expand(2, -1, -1))),
        lambda: task.check(network),
    ):
        with pytest.raises(ShapeError) as caught:
            ask()
        assert got in str(caught.value) and expected in str(caught.value)


def test_check_names_a_network_that_cannot_be_asked(task: Segmentation) -> None:
    with pytest.raises(ShapeError, match="cannot take inputs of shape"):
        task.check(nn.Conv2d(1, 3, 1))
    broken = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        broken.bias.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(TeacherError, match="NaN"):
        task.check(broken)


@pytest.mark.parametrize(
    ("masks", "error", "expected"),
    [
        (TRUTH[0], ShapeError, r"masks of shape \(2, 3\), expected \(1, 2, 3\)"),
        (torch.zeros(1, 4, 6, dtype=torch.long), ShapeError, r"expected \(1, 2, 3\)"),
        (torch.zeros(1), ShapeError, "a class for each pixel"),
        (TRUTH.float(), DataError, "dtype torch.float32"),
        (TRUTH.where(TRUTH != 2, 7).where(TRUTH != 0, 3), DataError, "values 3, 7, expected 0 to "),
        (TRUTH - 1, DataError, "values -1, 254"),
        (torch.full_like(TRUTH, 255), DataError, r"nothing but ignored pixels \(255\)"),
    ],
)
def test_masks_that_cannot_be_judged_are_named(
    task: Segmentation, masks: Tensor, error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        task.evaluate(Identity(), (says(SAID), masks))


def test_masks_with_strange_values_say_what_to_set(task: Segmentation) -> None:
    many = torch.arange(100, 130).view(5, 2, 3)
    with pytest.raises(DataError) as caught:
        task.evaluate(Identity(), (torch.zeros(5, 3, 2, 3), many))
    told = str(caught.value)
    assert "100, 101" in told and "109, ...," in told and "110" not in told
    assert "ignore_index" in told and "num_classes" in told


def test_what_is_no_task_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"shape \(7,\), expected \(C, H, W\)"):
        Segmentation(InputSpec("embedding", (7,)), 3)
    with pytest.raises(DataError, match="num_classes=1"):
        Segmentation(SPEC, 1)
    with pytest.raises(DataError, match="no inputs"):
        Segmentation(SPEC, 3).evaluate(Identity(), (torch.zeros(0, 3, 2, 3), TRUTH[:0]))
    with pytest.raises(ShapeError, match="as in the input spec"):
        Segmentation(SPEC, 3).evaluate(Identity(), (torch.zeros(1, 3, 4, 4), TRUTH))


def test_answers_are_columns_of_colours(task: Segmentation) -> None:
    assert isinstance(task, ShowsAnswers)
    inputs = says(SAID, strength=1.0)
    shown = task.answers(Identity(), Identity("out"), (inputs, TRUTH))
    assert list(shown) == ["input", "teacher", "student", "truth"]
    assert all(one.shape == (1, 3, 2, 3) for one in shown.values())
    assert all(one.min() >= 0 and one.max() <= 1 for one in shown.values())
    assert torch.equal(shown["input"], inputs)
    assert torch.equal(shown["teacher"], shown["student"])
    # Where answer and truth are the same so is the colour; elsewhere it is not.
    equal = (shown["student"] == shown["truth"]).all(1)
    assert torch.equal(equal, SAID == TRUTH)
    assert (shown["truth"].sum(1) == 0).tolist() == (TRUTH == 255).tolist()
    assert list(task.answers(Identity(), None, (inputs, TRUTH))) == ["input", "student", "truth"]


def test_answers_are_evenly_spaced_and_denormalised() -> None:
    spec = InputSpec.image(1, 2, 2, mean=(0.5,), std=(0.25,))
    level = torch.arange(12)[:, None, None, None].expand(-1, 1, 2, 2) / 20
    network = nn.Conv2d(1, 3, 1)
    masks = torch.zeros(12, 2, 2, dtype=torch.long)
    shown = Segmentation(spec, 3).answers(network, None, (spec.normalize(level), masks), count=4)
    assert shown["input"].shape == (4, 3, 2, 2)
    torch.testing.assert_close(shown["input"][:, 0, 0, 0], torch.tensor([0.0, 0.15, 0.3, 0.45]))
    few = Segmentation(spec, 3).answers(network, None, (spec.normalize(level), masks), count=40)
    assert len(few["truth"]) == 12
    with pytest.raises(DataError, match="count=0"):
        Segmentation(spec, 3).answers(network, None, (level, masks), count=0)


def test_colours_tell_the_classes_apart() -> None:
    colours = class_colours(256)
    assert len({tuple(colour) for colour in colours.tolist()}) == 256
    assert torch.equal(class_colours(5), colours[:5])
    assert torch.equal(class_colours(300)[256:], colours[:44])
    assert colours.amin() >= 0 and colours.amax() <= 1 and colours.sum(1).min() > 0.3
