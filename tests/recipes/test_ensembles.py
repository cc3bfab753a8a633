"""A recipe may name several networks as one teacher."""

import pytest

from vestige.core.types import Access
from vestige.errors import RecipeError, TeacherError
from vestige.models.probes import batchnorm_layers
from vestige.recipes.build import build
from vestige.recipes.loading import load_recipe, validate
from vestige.recipes.run import run_recipe
from vestige.teachers.ensemble import BlackBoxEnsemble, Ensemble

DIGITS = "builtin:digits-convnet"


def recipe(**changes):
    small = load_recipe("dfad", preset="smoke").model_dump(mode="json")
    return {
        **small,
        "data": "digits",
        "input": None,
        "num_classes": None,
        "arms": {},
        "headline": None,
        "baseline": None,
        "reference": None,
        "teacher": {"ensemble": [DIGITS, DIGITS], "combine": "probabilities", "weights": [1, 3]},
        **changes,
    }


def test_an_ensemble_teaches_and_each_member_is_counted(tmp_path):
    job = build(validate(recipe()))
    (teacher,) = job.trainer.teachers
    assert isinstance(teacher, Ensemble)
    assert teacher.module.shares == (0.25, 0.75)
    # Two members of three BatchNorm layers each.
    assert len(batchnorm_layers(teacher)) == 6
    alone = run_recipe(validate(recipe(teacher=DIGITS)), tmp_path / "alone", report=False)
    both = run_recipe(validate(recipe()), tmp_path / "both", report=False)
    assert both["teacher_queries"] == 2 * alone["teacher_queries"]
    assert both["teacher"]["parameters"] == 2 * alone["teacher"]["parameters"]
    # The same network twice is the same teacher.
    assert both["teacher"]["score"] == alone["teacher"]["score"]


def test_a_hidden_ensemble_hides_every_member():
    from vestige.recipes.resolve import resolve_teacher, shown

    hidden = validate(recipe()).model_copy(update={"access": Access.LABELS, "query_budget": 7})
    box = shown(resolve_teacher(hidden.teacher, hidden).module, hidden)
    assert isinstance(box, BlackBoxEnsemble)
    assert [(one.access, one.budget) for one in box.members] == [(Access.LABELS, 7)] * 2


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"ensemble": [DIGITS, "builtin:nothing"]}, r"teacher\.ensemble\.1: got 'builtin:nothing'"),
        ({"ensemble": [{"modle": "convnet"}]}, r"teacher\.ensemble\.0\.modle: no such key"),
        ({"ensemble": [DIGITS], "model": "convnet"}, "give exactly one of"),
    ],
)
def test_mistakes_in_members_are_told_with_their_number(teacher, message):
    with pytest.raises(RecipeError, match=message):
        validate(recipe(teacher=teacher))


def test_weights_that_do_not_fit_are_refused():
    wrong = {"ensemble": [DIGITS, DIGITS], "weights": [1]}
    with pytest.raises(TeacherError, match="ensemble of 2, expected one positive"):
        build(validate(recipe(teacher=wrong)))
