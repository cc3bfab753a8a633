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
BLIND = {
    "all-methods/digits/dafl",
    "dafl/digits/dafl",
    "deepinversion/digits/no-statistics",
    "deepinversion/mnist/no-statistics",
    "dfad/mnist/cmi",
    "pre-dfkd/digits/no-replay",
    "pre-dfkd/digits/replay",
}


@pytest.mark.parametrize("arm", [one for one in ARMS if one.values[0]["mean"] > 0.9])
def test_no_run_with_a_good_student_is_warned_about(arm):
    assert not arm["findings"]


@pytest.mark.parametrize("arm", [one for one in ARMS if one.values[0]["mean"] < 0.75])
def test_runs_with_a_poor_student_are_warned_about_but_for_the_known_ones(arm, request):
    assert bool(arm["findings"]) == (request.node.callspec.id not in BLIND)


def test_there_are_arms_of_both_kinds():
    means = [arm.values[0]["mean"] for arm in ARMS]
    assert min(means) < 0.5
    assert max(means) > 0.9


def test_what_it_is_blind_to_is_published():
    means = {arm.id: arm.values[0]["mean"] for arm in ARMS}
    assert all(means[name] < 0.75 for name in BLIND)
