"""Which layers of a deep teacher a shallower student starts from."""

from typing import Literal, get_args

from vestige.errors import RecipeError

Choice = Literal["spaced", "first"]


def choose_layers(have: int, want: int, choice: Choice = "spaced") -> tuple[int, ...]:
    """Numbers of the teacher's layers that become the student's, in order.

    Args:
        have: layers of the teacher.
        want: layers of the student.
        choice: "spaced" spreads them evenly over the teacher's and always takes the last one (the
            first and the last where there are two or more; truncated as in Distil-Whisper's
            create_student_model.py: 6 to 4 gives 0, 1, 3, 5); "first" takes the lowest.

    Raises:
        RecipeError: the student would be deeper than the teacher, or have no layer; or another
            choice.
    """
    if choice not in get_args(Choice):
        raise RecipeError(
            f"got choose={choice!r}, expected 'spaced' or 'first'; correct what the student is "
            "made with"
        )
    if not 1 <= want <= have:
        raise RecipeError(
            f"got {want} layers for a student of a teacher with {have}, expected 1 to {have}"
        )
    if choice == "first":
        return tuple(range(want))
    if want == 1:
        return (have - 1,)
    # In whole numbers: a float just below the next layer would truncate to the one before.
    return tuple(index * (have - 1) // (want - 1) for index in range(want))
