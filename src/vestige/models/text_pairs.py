"""A teacher and a student of texts whose words mean the same to both."""

import torch
from torch import nn

from vestige.errors import RecipeError, TeacherError
from vestige.models.text import TextClassifier


def reading_alike(teacher: nn.Module, student: nn.Module) -> tuple[TextClassifier, TextClassifier]:
    """Both as networks that read embeddings of words in one space.

    Raises:
        TeacherError: the teacher is no transformer for texts.
        RecipeError: the student is none, or has embeddings of its own.
    """
    if not isinstance(teacher, TextClassifier):
        raise TeacherError(
            f"got a {type(teacher).__name__} as teacher, expected a transformer for texts "
            "(hf:FOLDER, or vestige.models.text.TextClassifier), whose words have embeddings"
        )
    if not isinstance(student, TextClassifier) or not torch.equal(
        student.embeddings.weight, teacher.embeddings.weight
    ):
        raise RecipeError(
            f"got a {type(student).__name__} as student whose words do not have the teacher's "
            "embeddings, in which texts are crafted; make it of the teacher "
            "(student: {name: layers-of-teacher, args: {layers: 2}}, or teacher.with_layers)"
        )
    return teacher, student
