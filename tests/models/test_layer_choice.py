from itertools import pairwise

import pytest

from vestige.errors import RecipeError
from vestige.models.layer_choice import choose_layers


@pytest.mark.parametrize(
    ("have", "want", "numbers"),
    [
        # As create_student_model.py of Distil-Whisper has them.
        (32, 2, (0, 31)),
        (6, 4, (0, 1, 3, 5)),
        (12, 6, (0, 2, 4, 6, 8, 11)),
        (12, 3, (0, 5, 11)),
        (4, 1, (3,)),
        (1, 1, (0,)),
    ],
)
def test_spaced_layers_are_those_of_the_reference(have, want, numbers):
    assert choose_layers(have, want) == numbers


def test_whatever_the_sizes_the_layers_are_apart_and_end_with_the_last():
    for have in range(1, 60):
        assert choose_layers(have, have) == tuple(range(have))
        for want in range(2, have + 1):
            numbers = choose_layers(have, want)
            assert (len(numbers), numbers[0], numbers[-1]) == (want, 0, have - 1)
            gaps = {second - first for first, second in pairwise(numbers)}
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_the_first_layers_are_the_lowest():
    assert choose_layers(12, 3, "first") == (0, 1, 2)
    assert choose_layers(3, 3, "first") == choose_layers(3, 3, "spaced")


@pytest.mark.parametrize("want", [0, -1, 5])
@pytest.mark.parametrize("choice", ["spaced", "first"])
def test_a_student_is_not_deeper_than_its_teacher(want, choice):
    with pytest.raises(RecipeError, match=f"got {want} layers .* expected 1 to 4"):
        choose_layers(4, want, choice)


def test_another_choice_is_refused():
    with pytest.raises(RecipeError, match="expected 'spaced' or 'first'"):
        choose_layers(4, 2, "last")
