"""What a source of inputs maximises: the disagreement of student and teacher."""

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.errors import RecipeError
from vestige.losses.distill import kl_divergence, l1_logits


def disagreement_loss(
    student: Float[Tensor, "batch classes *positions"],
    teacher: Float[Tensor, "batch classes *positions"],
    *,
    kind: str = "l1",
) -> Float[Tensor, " batch"]:
    """How much the student differs from the teacher; the source maximises it, the student not.

    The sign is fixed here once: positive means that the student differs, so a source adds the
    NEGATIVE of this to its loss.

    Args:
        student: logits (B, K) or (B, K, H, W), with gradient to the inputs.
        teacher: logits of the same shape, NOT detached: the inputs are moved through both
            networks. Detaching it would optimise another objective.
        kind: "l1" is the mean absolute difference of logits (DFAD); "kl" is the KL divergence
            from teacher to student at temperature 1, summed over classes (ZSKT, DFQ).

    Returns:
        (B,), at least 0; mean over positions if there are any.

    Raises:
        RecipeError: unknown kind.
        ShapeError: the shapes differ.
    """
    if kind == "l1":
        return l1_logits(student, teacher)
    if kind == "kl":
        return kl_divergence(student, teacher)
    raise RecipeError(f"got disagreement {kind!r}, expected 'l1' or 'kl'; 'l1' is the usual one")


def log_form(disagreement: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """log(D + 1), DFAD's form of the disagreement for dense prediction.

    Its gradient is the gradient of D divided by (D + 1): the direction stays, and the step
    shrinks as D grows, which keeps the generator from running away. Apply it to the batch mean,
    not per sample, or samples are weighted against each other.

    Args:
        disagreement: scalar D, at least 0, with gradient.

    Returns:
        Scalar, at least 0, with gradient; the source minimises its negative.
    """
    return torch.log1p(disagreement)
