"""What a student forgets: agreement with earlier inputs then and now."""

import pytest
import torch
from torch import Tensor, nn

from vestige.core.types import Loss, Prediction
from vestige.training.checkpoint import decode, encode
from vestige.training.retention import Retention

CLASSES = 4


class Always(nn.Module):
    """Gives one class to everything; in train mode another, which nobody may ask for."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, inputs: Tensor) -> Tensor:
        answer = (self.answer + self.training) % CLASSES
        return torch.eye(CLASSES)[torch.full((len(inputs),), answer)]


def loss(classes: list[int], fresh: list[bool] | None = None) -> Loss:
    inputs = torch.tensor(classes, dtype=torch.float32)[:, None]
    teacher = Prediction(torch.eye(CLASSES)[torch.tensor(classes)])
    rows = None if fresh is None else torch.tensor(fresh)
    return Loss({}, torch.zeros(()), inputs, teacher, teacher, rows)


def followed(rounds: int, kept: Retention | None = None, start: int = 0) -> Retention:
    """A student that always gives the class of the round, inputs of which are all of that class."""
    kept = kept or Retention()
    for number in range(start, rounds):
        kept.observe(loss([number % CLASSES] * 6))
        kept.end_round(Always(number % CLASSES))
    return kept


def test_a_student_that_follows_the_stream_has_forgotten_the_other_classes():
    figures = followed(8).figures(Always(3))
    # The first 6 of 8 rounds: classes 0 1 2 3 0 1, of which it still knows one.
    assert figures == {
        "then": 1.0,
        "now": pytest.approx(1 / 6),
        "lost": pytest.approx(5 / 6),
        "rounds": 6,
    }


def test_the_student_is_asked_in_eval_mode_and_keeps_its_flags():
    student = Always(0).train()
    kept = Retention()
    for _ in range(4):
        kept.observe(loss([0, 0]))
        kept.end_round(student)
    figures = kept.figures(student)
    assert figures is not None and figures["then"] == figures["now"] == 1.0
    assert student.training


def test_replayed_rows_are_left_out():
    kept = Retention()
    for _ in range(4):
        kept.observe(loss([0, 1, 1], [True, False, False]))
        kept.end_round(Always(0))
        # A round that replays only is none to remember.
        kept.observe(loss([1], [False]))
        kept.end_round(Always(0))
    figures = kept.figures(Always(0))
    assert figures is not None and figures["then"] == 1.0


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_short_run_tells_nothing(rounds):
    assert followed(rounds).figures(Always(0)) is None


def test_the_rounds_of_a_long_run_lie_evenly_and_are_bounded():
    kept = followed(1000)
    figures = kept.figures(Always(0))
    assert figures is not None and 5 <= figures["rounds"] < 16
    large = Retention()
    for _ in range(40):
        inputs = torch.zeros(64, 3, 224, 224)
        large.observe(Loss({}, torch.zeros(()), inputs, Prediction(torch.zeros(64, CLASSES))))
        large.end_round(Always(0))
    tensors: dict[str, Tensor] = {}
    encode(large.state_dict(), tensors)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) < 20 * 2**20


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 40])
def test_a_resumed_run_keeps_what_an_uninterrupted_one_keeps(cut):
    tensors: dict[str, Tensor] = {}
    stored = encode(followed(cut).state_dict(), tensors)
    resumed = Retention()
    resumed.load_state_dict(decode(stored, tensors))
    whole, again = followed(60), followed(60, resumed, start=cut)
    assert whole.figures(Always(2)) == again.figures(Always(2))


def test_inputs_by_name_are_kept_too():
    kept = Retention()

    class Named(Always):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids)

    for _ in range(4):
        one = loss([0, 0])
        kept.observe(Loss({}, one.total, {"ids": one.inputs}, one.teacher, one.student))
        kept.end_round(Named(0))
    figures = kept.figures(Named(1))
    assert figures is not None and figures["lost"] == 1.0
