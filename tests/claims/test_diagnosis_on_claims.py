"""In the published runs the diagnosis, made without data, tells the good from the bad."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"
RESULTS = sorted(FOLDER.glob("*.json"))
ARMS = [
    pytest.param(arm, id=f"{path.stem}/{name}")
    for path in RESULTS
    for name, arm in json.loads(path.read_text())["arms"].items()
]


@pytest.mark.parametrize("arm", ARMS)
def test_runs_are_warned_about_exactly_where_the_student_is_poor(arm):
    # Between the best of the poor arms and the poorest of the good ones lie more than 40 points.
    assert bool(arm["findings"]) == (arm["mean"] < 0.75)


def test_there_are_arms_of_both_kinds():
    means = [arm.values[0]["mean"] for arm in ARMS]
    assert min(means) < 0.5
    assert max(means) > 0.9
