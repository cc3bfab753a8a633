"""How far a student's logits are from its teacher's, one number per sample."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vestige.errors import RecipeError, ShapeError


def l1_logits(
    student: Float[Tensor, "batch classes *positions"],
    teacher: Float[Tensor, "batch classes *positions"],
) -> Float[Tensor, " batch"]:
    """Mean absolute difference of raw logits (DFAD's discrepancy D; arXiv 1912.11006).

    Args:
        student: logits (B, K) or (B, K, H, W), with gradient.
        teacher: logits of the same shape; gradient flows here too, so detach in a student step.

    Returns:
        (B,), at least 0; mean over classes and positions. Its batch mean is torch's
        `l1_loss(student, teacher)`. Where both agree exactly the gradient is 0.

    Raises:
        ShapeError: the shapes differ (they are never broadcast) or have no class dimension.
    """
    check_same_shape(student, teacher)
    # F.l1_loss rather than (s - t).abs(): autocast then computes it in float32.
    return F.l1_loss(student, teacher, reduction="none").flatten(1).mean(1)


def kl_divergence(
    student: Float[Tensor, "batch classes *positions"],
    teacher: Float[Tensor, "batch classes *positions"],
    *,
    temperature: float = 1.0,
    reduction: str = "batch",
) -> Float[Tensor, " batch"]:
    """KL(softmax(teacher / temperature) || softmax(student / temperature)) * temperature^2.

    The square keeps the size of the gradient independent of the temperature (Hinton et al.,
    arXiv 1503.02531).

    Args:
        student: finite logits (B, K) or (B, K, H, W), class axis 1, with gradient.
        teacher: logits of the same shape; gradient flows here too, so detach in a student step.
        temperature: above 0; higher compares the small probabilities as well.
        reduction: "batch" sums over classes (the batch mean is torch's `batchmean`); "element"
            also divides by K, as in ZSKT, whose other weights are tuned to that.

    Returns:
        (B,), at least 0 up to rounding; mean over positions if there are any.

    Raises:
        RecipeError: unknown reduction, or a temperature that is not above 0.
        ShapeError: the shapes differ or have no class dimension.
    """
    if reduction not in ("batch", "element"):
        raise RecipeError(
            f"got reduction {reduction!r}, expected 'batch' or 'element'; 'batch' is the usual KL"
        )
    if not temperature > 0:
        raise RecipeError(
            f"got temperature {temperature}, expected a value above 0; 1 leaves the logits alone"
        )
    check_same_shape(student, teacher)
    divergence = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        reduction="none",
        log_target=True,
    )
    divergence = divergence.sum(1) if reduction == "batch" else divergence.mean(1)
    return divergence.unsqueeze(-1).flatten(1).mean(1) * temperature**2


def soft_label_divergence(
    student: Float[Tensor, "batch classes"],
    soft_labels: Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " batch"]:
    """KL(soft labels || softmax(student / temperature)) * temperature^2.

    `kl_divergence` for a teacher of whom only probabilities are known; with one-hot soft labels and
    temperature 1 it is the cross-entropy.

    Args:
        student: finite logits (B, K), with gradient.
        soft_labels: (B, K), rows that sum to 1, zeros allowed, made at the same temperature;
            gradient flows here too, so detach in a student step.
        temperature: above 0; higher compares the small probabilities as well.

    Returns:
        (B,), at least 0 up to rounding; sum over classes.

    Raises:
        RecipeError: a temperature that is not above 0.
        ShapeError: the shapes differ.
    """
    if not temperature > 0:
        raise RecipeError(
            f"got temperature {temperature}, expected a value above 0; 1 leaves the logits alone"
        )
    check_same_shape(student, soft_labels)
    log_probs = F.log_softmax(student / temperature, 1)
    return F.kl_div(log_probs, soft_labels, reduction="none").sum(1) * temperature**2


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse logits that would be broadcast.

    Raises:
        ShapeError: the shapes differ or have no class dimension.
    """
    if student.shape != teacher.shape or student.dim() < 2:
        raise ShapeError(
            f"got student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)}, "
            "expected one shape (B, K) or (B, K, ...); check that both networks have the same "
            "number of classes and, for dense prediction, the same output resolution"
        )
