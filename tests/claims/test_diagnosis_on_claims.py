"""In the published runs the diagnosis, made without data, tells the good from the bad."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"
RESULTS = sorted(FOLDER.glob("*.json"))
# A pool alone has no student that could be poor.
ARMS = [
    pytest.param(arm, id=f"{path.stem}/{name}")
    for path in RESULTS
    for name, arm in json.loads(path.read_text())["arms"].items()
    if arm["mean"] is not None
]
# Their students learned well what they were given, of all classes; it is unlike the teacher's data.
BLIND = {"dafl/digits/dafl", "deepinversion/digits/no-statistics"}


@pytest.mark.parametrize("arm", ARMS)
def test_runs_are_warned_about_exactly_where_the_student_is_poor(arm, request):
    # Between the best of the poor arms and the poorest of the good ones lie more than 25 points.
    expected = arm["mean"] < 0.75 and request.node.callspec.id not in BLIND
    assert bool(arm["findings"]) == expected


def test_there_are_arms_of_both_kinds():
    means = [arm.values[0]["mean"] for arm in ARMS]
    assert min(means) < 0.5
    assert max(means) > 0.9


def test_what_it_is_blind_to_is_poor():
    means = {arm.id: arm.values[0]["mean"] for arm in ARMS}
    assert all(means[name] < 0.75 for name in BLIND)
