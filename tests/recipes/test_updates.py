"""Settings with which methods make equally many updates of the student, whatever they call them."""

from typing import Any

import pytest
from pydantic import BaseModel, Field, create_model

from vestige.core.types import Requires
from vestige.methods.dfad import DFAD
from vestige.recipes.catalog import METHODS
from vestige.recipes.updates import student_updates, with_updates


def method(per_round: str, **settings: Any) -> type:
    """One whose student makes `per_round` updates, an expression of the settings."""
    model = create_model(
        "Config", rounds=(int, 10), **{key: (type(value), value) for key, value in settings.items()}
    )
    members = {
        "Config": model,
        "requires": Requires(),
        "run": None,
        "parts": None,
        "result": None,
        "passes": lambda self, cfg: {"student_step": float(eval(per_round, dict(cfg)))},
    }
    return type("Made", (), members)


def turned(made: type, wanted: float, **config: Any) -> dict[str, Any]:
    found = with_updates(made, config, wanted)
    told = student_updates(made, found)
    return {**found, "updates": told}


def test_updates_are_steps_of_a_round_times_rounds():
    config = {"rounds": 3, "iterations": 7, "student_steps": 5}
    assert student_updates("dfad", config) == 105
    assert student_updates("dfad", {**config, "iterations": "many"}) is None
    assert student_updates(method("1", size=2), {}) == 10


def test_iterations_come_before_steps_within_them():
    made = method("iterations * student_steps", student_steps=5, iterations=20)
    found = turned(made, 500)
    assert found == {"rounds": 10, "iterations": 10, "student_steps": 5, "updates": 500}


def test_a_name_that_nobody_knows_is_found_by_what_it_does():
    made = method("2 * kd_epochs", batch_size=64, flip=True, kd_epochs=30)
    assert turned(made, 300) == {"rounds": 10, "kd_epochs": 15, "updates": 300}


def test_rounds_move_a_little_if_only_that_makes_them_equal():
    # As ZSKT beside a method of 1500 updates: 12.5 iterations of 10 steps in 12 rounds.
    made = method("iterations * student_steps", iterations=50, student_steps=10)
    found = turned(made, 1500, rounds=12)
    assert (found["rounds"], found["iterations"], found["student_steps"]) == (10, 15, 10)
    assert found["updates"] == 1500


def test_rounds_do_not_move_far_and_the_nearest_number_is_taken():
    # 151 is prime: one round, or 151.
    found = turned(method("steps", steps=20), 151, rounds=12)
    assert (found["rounds"], found["steps"], found["updates"]) == (12, 13, 156)


def test_without_anything_else_the_rounds_are_turned():
    assert turned(method("3"), 1500) == {"rounds": 500, "updates": 1500}
    assert turned(method("7"), 100) == {"rounds": 14, "updates": 98}


def test_nothing_is_turned_where_nothing_is_wanted_or_known():
    assert with_updates("dfad", {"rounds": 2}, None) == {"rounds": 2}
    assert with_updates("dfad", {"rounds": 2}, 0) == {"rounds": 2}
    silent = type("Silent", (method("1"),), {"passes": lambda self, cfg: {}})
    assert with_updates(silent, {"rounds": 2}, 50) == {"rounds": 2}


def test_what_the_updates_follow_from_is_written_out():
    # Otherwise a suggestion for what is left open would change them again.
    config = DFAD.Config(iterations=4, rounds=2)
    found = with_updates("dfad", {"iterations": 4, "rounds": 2}, 2 * 4 * 5)
    assert found == {"rounds": 2, "iterations": 4, "student_steps": config.student_steps}


class Bounded(BaseModel):
    rounds: int = 5
    iterations: int = Field(8, le=10)
    student_steps: int = 3


def test_a_limit_of_a_setting_is_left_to_the_check_of_the_recipe():
    made = type(
        "Limited",
        (method("1"),),
        {
            "Config": Bounded,
            "passes": lambda self, cfg: {"student_step": float(cfg.iterations * cfg.student_steps)},
        },
    )
    # 12 iterations are too many; with 6 rounds 10 are enough.
    found = turned(made, 180)
    assert (found["rounds"], found["iterations"], found["updates"]) == (6, 10, 180)


# Where clients train, what is equal is their rounds and steps.
ALONE = [name for name in METHODS.names() if "clients" not in METHODS.get(name).requires.sources]


@pytest.mark.parametrize("name", ALONE)
def test_every_method_can_be_given_as_many_updates_as_another(name):
    config = METHODS.get(name).Config().model_dump()
    found = with_updates(name, {**config, "rounds": 12}, 1500)
    assert student_updates(name, found) == 1500
    assert found["rounds"] in range(6, 25)


def test_rounds_of_another_loop_than_the_students_do_not_count():
    # Of ZeroGen they are those in which texts are written; its student learns in epochs.
    config = {"samples": 100, "held_share": 0.1, "batch_size": 9, "epochs": 3}
    assert student_updates("zerogen", {**config, "rounds": 500}) == 30
    more = with_updates("zerogen", config, 60)
    assert (more["samples"], student_updates("zerogen", more)) == (200, 60)
