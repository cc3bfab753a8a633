import math

import pytest

from vestige.core.schedules import Schedule, cosine, multistep


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_falls_along_half_a_cosine(floor):
    factor = cosine(floor).factor
    assert factor(0) == 1
    assert factor(0.5) == pytest.approx((1 + floor) / 2)
    assert factor(1) == pytest.approx(floor)
    for share in (0.1, 0.37, 0.9):
        expected = floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2
        assert factor(share) == pytest.approx(expected)
    values = [factor(index / 50) for index in range(51)]
    assert values == sorted(values, reverse=True)


def test_cosine_stays_at_its_floor_beyond_the_end():
    assert cosine(0.2).factor(1.5) == pytest.approx(0.2)


def test_multistep_drops_at_each_milestone():
    factor = multistep((0.2, 0.4), 0.1).factor
    assert [factor(done / 500) for done in (0, 99, 100, 101, 199, 200, 500)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]
    )


@pytest.mark.parametrize("rounds", [3, 7, 10, 30, 500])
def test_a_milestone_is_met_in_its_round_whatever_the_rounding(rounds):
    # done / rounds and the share that was written down may differ in the last bit.
    for milestone in range(1, rounds):
        factor = multistep((milestone * (1 / rounds),)).factor
        assert factor((milestone - 1) / rounds) == 1
        assert factor(milestone / rounds) == pytest.approx(0.1)


def test_other_factors():
    assert multistep((0.5,), 0.3).factor(0.6) == pytest.approx(0.3)
    assert multistep(()).factor(1.0) == 1


def test_a_schedule_per_step_needs_its_length():
    assert cosine(per="step", steps=10).steps == 10
    assert multistep((0.5,), per="step", steps=4).per == "step"
    for steps in (0, -1):
        with pytest.raises(ValueError, match="expected the number of steps"):
            Schedule(lambda share: 1.0, "step", steps)
