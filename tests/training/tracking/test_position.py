"""How far a run is, and how long something takes, in words."""

import pytest

from vestige.training.tracking import Event
from vestige.training.tracking import position as position_module
from vestige.training.tracking.position import Position, duration


def round_event(number: int, step: int, rounds: int = 4, loop: str = "distill") -> Event:
    data = {"loop": loop, "round": number, "rounds": rounds, "step": step, "seconds": 1.0}
    return Event("round", {**data, "agreement": 0.5})


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(position_module.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_follows_from_the_pace_of_the_rounds(clock):
    position = Position()
    position.follow(Event("start", {"resumed": False, "step": 0}))
    clock[0] += 50  # set-up says nothing about the pace
    position.follow(round_event(1, 10))
    assert position.left_s is None
    clock[0] += 3
    position.follow(round_event(2, 20))
    assert position.left_s == pytest.approx(6)
    clock[0] += 2
    assert position.left_s == pytest.approx(4)


def test_a_resumed_run_is_timed_from_where_it_began(clock):
    position = Position()
    position.follow(Event("start", {"resumed": True, "step": 20}))
    position.follow(round_event(3, 30, rounds=10))
    clock[0] += 2
    position.follow(round_event(4, 40, rounds=10))
    assert position.left_s == pytest.approx(12)
    assert position.share == pytest.approx(0.4)


def test_the_share_moves_within_a_round():
    position = Position()
    position.follow(Event("start", {"resumed": False, "step": 0}))
    assert position.share == 0
    position.follow(round_event(1, 10))
    position.follow(Event("step", {"step": 15, "terms": {}}))
    assert position.share == pytest.approx(1.5 / 4)
    position.follow(Event("step", {"step": 99, "terms": {}}))
    assert position.share == pytest.approx(2 / 4)
    position.follow(Event("end", {"step": 40, "seconds": 2.0}))
    assert position.share == 1


def test_the_score_that_counts_is_told_by_its_name():
    position = Position()
    assert position.judged == ""
    scores = {"loss": 0.25, "miou": 0.6175}
    position.follow(Event("evaluation", {"step": 1, "scores": scores, "metric": "miou"}))
    assert position.judged == "test mIoU 61.8 %"
    position.follow(Event("evaluation", {"step": 2, "scores": scores, "metric": "loss"}))
    assert position.judged == "test loss 0.25"
    # From a callback of one's own that knows only scores.
    position.follow(Event("evaluation", {"step": 3, "scores": {"accuracy": 0.5}}))
    assert position.judged == "test accuracy 50.0 %"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (12, "12 s"), (89, "89 s"), (90, "2 min"), (7199, "120 min"), (7200, "2.0 h")],
)
def test_a_duration_is_told_in_the_unit_that_fits(seconds, words):
    assert duration(seconds) == words
