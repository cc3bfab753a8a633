import math

import pytest
import torch
from torch import nn

from vestige.core.protocols import Stateful
from vestige.core.types import Access, predict
from vestige.errors import AccessError, QueryBudgetExceeded, ShapeError, TeacherError
from vestige.models.probes import BatchNormProbe
from vestige.teachers.black_box import BlackBoxTeacher
from vestige.teachers.ensemble import BlackBoxEnsemble, Ensemble
from vestige.teachers.white_box import WhiteBoxTeacher


class Says(nn.Module):
    """Answers each input with the same logits."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(inputs), -1) + 0 * inputs.sum()


X = torch.zeros(3, 2)
# Probabilities 1/4, 3/4 and 3/5, 2/5.
FIRST, SECOND = Says(0.0, math.log(3)), Says(math.log(3), math.log(2))


def test_logits_are_averaged() -> None:
    answer = Ensemble([FIRST, SECOND])(X).logits
    expected = torch.tensor([math.log(3) / 2, (math.log(3) + math.log(2)) / 2])
    torch.testing.assert_close(answer, expected.expand(3, 2))


def test_probabilities_are_averaged() -> None:
    answer = Ensemble([FIRST, SECOND], combine="probabilities")(X).logits
    expected = torch.tensor([(1 / 4 + 3 / 5) / 2, (3 / 4 + 2 / 5) / 2])
    torch.testing.assert_close(answer.softmax(1), expected.expand(3, 2))
    # The logarithm of probabilities, not just something with the same softmax.
    torch.testing.assert_close(answer.exp().sum(1), torch.ones(3))


def test_weights_are_shares() -> None:
    twice = Ensemble([FIRST, SECOND], combine="probabilities", weights=[6, 2])(X).logits
    expected = torch.tensor([0.75 / 4 + 0.25 * 3 / 5, 0.75 * 3 / 4 + 0.25 * 2 / 5])
    torch.testing.assert_close(twice.exp(), expected.expand(3, 2))
    logits = Ensemble([FIRST, SECOND], weights=[1, 3])(X).logits
    torch.testing.assert_close(logits[0, 0].item(), 0.75 * math.log(3))


def test_one_member_is_itself(tiny_teacher: nn.Sequential) -> None:
    inputs = torch.randn(4, 1, 8, 8)
    assert torch.equal(Ensemble([tiny_teacher])(inputs).logits, tiny_teacher(inputs))


def test_large_logits_do_not_overflow() -> None:
    answer = Ensemble([Says(1e4, 0.0), Says(0.0, 0.0)], combine="probabilities")(X).logits
    torch.testing.assert_close(answer[0].exp(), torch.tensor([0.75, 0.25]))


def test_classes_are_found_in_maps_and_in_sequences() -> None:
    for shape, dim in (((2, 3, 4, 5), 1), ((2, 4, 3), 2)):
        logits = torch.randn(shape)
        network = nn.Sequential()  # answers with its input
        other = nn.Threshold(0.0, 1.0)
        answer = Ensemble([network, other], combine="probabilities")(logits).logits
        expected = (logits.softmax(dim) + other(logits).softmax(dim)) / 2
        torch.testing.assert_close(answer.exp(), expected)


def test_it_is_a_frozen_white_box_with_gradient_to_its_inputs(tiny_teacher, tiny_student) -> None:
    ensemble = Ensemble([tiny_teacher.train(), WhiteBoxTeacher(tiny_student)])
    assert ensemble.access is Access.WHITE_BOX
    assert not any(module.training for module in ensemble.modules())
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())
    inputs = torch.randn(2, 1, 8, 8, requires_grad=True)
    ensemble(inputs).logits.sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0


def test_probes_see_the_statistics_of_every_member(tiny_teacher, tiny_student) -> None:
    ensemble = Ensemble([tiny_teacher, tiny_student])
    with BatchNormProbe(ensemble) as probe:
        ensemble(torch.randn(4, 1, 8, 8))
    assert [stats.mean.shape for stats in probe.observed()] == [(8,), (3,)]
    assert torch.equal(probe.stored()[0].mean, tiny_teacher[1].running_mean)


def test_every_member_is_asked_and_counted() -> None:
    ensemble = Ensemble([FIRST, SECOND, FIRST])
    ensemble(X)
    ensemble(X[:1])
    assert ensemble.queries == 3 * 4
    assert ensemble.gradients == 0
    ensemble(torch.randn(2, 1, 8, 8, requires_grad=True))
    assert (ensemble.queries, ensemble.gradients) == (3 * 4 + 3 * 2, 3 * 2)


def test_members_with_other_classes_are_told_by_number() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 3\) from member 1 .* expected \(3, 2\)"):
        Ensemble([FIRST, Says(1.0, 2.0, 3.0)])(X)


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([], {}, "without members"),
        ([FIRST], {"weights": [1.0, 2.0]}, "ensemble of 1, expected one positive"),
        ([FIRST, SECOND], {"weights": [1.0, 0.0]}, "leave out members"),
        ([FIRST, SECOND], {"weights": [1.0, math.nan]}, "expected one positive"),
        ([FIRST], {"combine": "mean"}, "combine 'mean' .* expected logits or probabilities"),
        ([BlackBoxTeacher(FIRST)], {}, "take BlackBoxEnsemble"),
    ],
)
def test_wrong_settings_are_refused(members, options, message) -> None:
    with pytest.raises(TeacherError, match=message):
        Ensemble(members, **options)


def test_black_boxes_answer_together_and_are_counted_each() -> None:
    members = [BlackBoxTeacher(FIRST), BlackBoxTeacher(SECOND)]
    ensemble = BlackBoxEnsemble(members, combine="probabilities")
    assert ensemble.access is Access.SCORES
    white = Ensemble([FIRST, SECOND], combine="probabilities")
    torch.testing.assert_close(predict(ensemble, X).logits, white(X).logits)
    assert (ensemble.queries, [member.queries for member in members]) == (6, [3, 3])


def test_no_member_is_asked_when_the_budget_of_one_is_spent() -> None:
    members = [BlackBoxTeacher(FIRST), BlackBoxTeacher(SECOND, budget=4)]
    ensemble = BlackBoxEnsemble(members)
    ensemble(X)
    with pytest.raises(QueryBudgetExceeded, match="at most 1: 3 of 4 are used"):
        ensemble(X)
    assert (ensemble.queries, [member.queries for member in members]) == (6, [3, 3])


def test_labels_are_votes() -> None:
    low, high = Says(1.0, 0.0, 0.0), Says(0.0, 0.0, 9.0)

    def vote(*members: nn.Module, weights=None) -> list[float]:
        boxes = [BlackBoxTeacher(member, access=Access.LABELS) for member in members]
        ensemble = BlackBoxEnsemble(boxes, weights=weights)
        assert ensemble.access is Access.LABELS
        return ensemble(X).logits[0].tolist()

    assert vote(low, low, high) == [1.0, 0.0, 0.0]  # the certain one has one vote, too
    assert vote(low, low, high, weights=[1, 1, 3]) == [0.0, 0.0, 1.0]
    assert vote(high, low) == [1.0, 0.0, 0.0]  # a tie
    mixed = [BlackBoxTeacher(low, access=Access.LABELS), BlackBoxTeacher(low)]
    with pytest.raises(AccessError, match="labels of all or scores of all"):
        BlackBoxEnsemble(mixed)


def test_counts_survive_a_resume() -> None:
    old, new = (
        BlackBoxEnsemble([BlackBoxTeacher(FIRST, budget=4), WhiteBoxTeacher(SECOND)])
        for _ in range(2)
    )
    old(X)
    assert isinstance(old, Stateful)
    new.load_state_dict(old.state_dict())
    assert new.queries == 6
    with pytest.raises(QueryBudgetExceeded):
        new(X)
