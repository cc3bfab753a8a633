"""What a source of inputs maximises: the disagreement of student and teacher."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vestige.errors import RecipeError
from vestige.losses.distill import check_same_shape, kl_divergence, l1_logits

# Outside of this range probabilities count as equal to its ends.
_LEAST, _MOST = 0.01, 0.99


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


def patch_loss(
    logits: Float[Tensor, "batch 1 rows columns"], *, given: bool
) -> Float[Tensor, " batch"]:
    """Binary cross entropy of patch logits, SUMMED over patches (MosaicKD, arXiv 2110.15094).

    The discriminator minimises it with the truth; the generator minimises it for its own images
    with `given=True`.

    Args:
        logits: of a patch discriminator, (B, 1, h, w), above 0 for "given", with gradient.
        given: whether the patches are to count as given images' or as made ones.

    Returns:
        (B,), at least 0; h * w * log 2 for logits of 0. A sum grows with the image and shrinks with
        the discriminator's stride, so whoever weights it must say for how many patches.
    """
    losses = F.softplus(-logits if given else logits)
    return losses.flatten(1).sum(1)


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


def decision_aware_disagreement(
    student: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"]
) -> Float[Tensor, " batch"]:
    """Disagreement where both still name the same class (CMI, arXiv 2105.08584, section 3.3).

    An input whose class the two dispute already is left alone, so pushing does not flip labels.

    Args:
        student: logits (B, K), with gradient to the inputs.
        teacher: logits (B, K), NOT detached: the inputs are moved through both networks.

    Returns:
        (B,), at least 0: KL(softmax(teacher) || softmax(student)) at temperature 1, summed over
        classes, where the arg-max of both is the same, else exactly 0 with gradient 0. The choice
        is a constant. The source adds the NEGATIVE of its mean to its loss.

    Raises:
        ShapeError: the shapes differ.
    """
    divergence = kl_divergence(student, teacher)
    return divergence * (student.argmax(1) == teacher.argmax(1))


def js_disagreement(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    *,
    temperature: float = 3.0,
    reduction: str = "batch",
) -> Float[Tensor, " batch"]:
    """The symmetric distance J that DeepInversion's code calls Jensen-Shannon (arXiv 1912.08795).

    With P and Q the softened predictions and M their mean, all clamped to [0.01, 0.99] after M was
    formed: J = (KL(M || P) + KL(M || Q)) / 2. These are the arguments of the textbook form in the
    reverse order, as the code has it. A clamped probability has no gradient, so for many classes,
    most below 0.01, little of it is left.

    Args:
        student: logits (B, K), with gradient.
        teacher: logits (B, K); gradient flows here too. PRE-DFKD and Retain detach it, ADI does
            not.
        temperature: above 0.
        reduction: "batch" sums over classes; "element" divides by K, as PRE-DFKD and Retain do.

    Returns:
        (B,), 0 for equal logits; ADI minimises 1 - clamp(mean, 0, 1).

    Raises:
        RecipeError: unknown reduction, or a temperature that is not above 0.
        ShapeError: the shapes differ.
    """
    if reduction not in ("batch", "element"):
        raise RecipeError(f"got reduction {reduction!r}, expected 'batch' or 'element'")
    if not temperature > 0:
        raise RecipeError(f"got temperature {temperature}, expected a value above 0; 3 is usual")
    check_same_shape(student, teacher)
    p, q = (F.softmax(logits / temperature, 1) for logits in (student, teacher))
    m = (p + q) / 2
    p, q, m = (probs.clamp(_LEAST, _MOST) for probs in (p, q, m))
    distance = m * (m.log() - (p.log() + q.log()) / 2)
    return distance.sum(1) if reduction == "batch" else distance.mean(1)
