"""What good inputs look like: smooth, and to the teacher clear, balanced, strongly activating."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vestige.core import parallel
from vestige.errors import RecipeError, ShapeError


def one_hot_loss(
    logits: Float[Tensor, "batch classes *positions"],
    labels: Int[Tensor, "batch *positions"] | None = None,
) -> Float[Tensor, " batch"]:
    """Cross-entropy of the teacher's logits with one class (DAFL, arXiv 1904.01186).

    Args:
        logits: of the teacher, (B, K) or (B, K, H, W), class axis 1, with gradient to the inputs.
        labels: the class that each input is made for (DeepInversion, CMI); None takes the argmax
            of the logits (DAFL).

    Returns:
        (B,), at least 0; with the argmax at most log K (uniform). Mean over positions if there are
        any. The argmax is a constant: no gradient flows through the choice of the class.
    """
    labels = logits.argmax(1) if labels is None else labels
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses.unsqueeze(-1).flatten(1).mean(1)


def entropy_loss(logits: Float[Tensor, "batch classes *positions"]) -> Float[Tensor, " batch"]:
    """Entropy of each prediction: how unsure the teacher is of an input (MosaicKD, 2110.15094).

    Unlike `one_hot_loss` its gradient does not depend on which class is ahead.

    Args:
        logits: of the teacher, (B, K) or (B, K, H, W), class axis 1, with gradient to the inputs.

    Returns:
        (B,), in nats, from 0 (one class) to log K (uniform); mean over positions if there are any.
    """
    log_probs = F.log_softmax(logits, 1)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    return entropy.unsqueeze(-1).flatten(1).mean(1)


def class_balance_loss(
    logits: Float[Tensor, "batch classes *positions"], *, base: float = math.e
) -> Float[Tensor, ""]:
    """Negative entropy of the mean prediction, sum_k pbar_k log pbar_k (DAFL, arXiv 1904.01186).

    Args:
        logits: of the teacher, (B, K) or (B, K, H, W), class axis 1, with gradient to the inputs.
        base: of the logarithm, above 1. DAFL's and PRE-DFKD's code use 10, DataFree uses e; the
            weight that goes with one is log(10) = 2.3 times too small or large for the other.

    Returns:
        Scalar (), from -log K (pbar uniform) to 0 (one class only); pbar is the mean over batch
        and positions, the sum runs over classes. It is a statement about a batch, so there is no
        per-sample form.

    Raises:
        RecipeError: `base` is not above 1.
    """
    if not base > 1:
        raise RecipeError(f"got base {base}, expected a value above 1; 10 and e are usual")
    log_probs = F.log_softmax(logits, 1).movedim(1, -1).flatten(0, -2)
    # In log space: p log p through softmax has a NaN gradient once a class underflows to 0.
    log_mean = parallel.batch_log_mean_exp(log_probs)
    return (log_mean.exp() * log_mean).sum() / math.log(base)


def activation_loss(features: Float[Tensor, "batch *rest"]) -> Float[Tensor, " batch"]:
    """Negative mean absolute feature: real inputs activate a trained teacher strongly (DAFL).

    Args:
        features: of the teacher before its last layer, (B, F) or (B, F, ...), with gradient.

    Returns:
        (B,), at most 0; mean over everything but the batch.
    """
    return -features.abs().flatten(1).mean(1)


def total_variation(
    images: Float[Tensor, "batch channels height width"], *, form: str = "l2"
) -> Float[Tensor, ""]:
    """How much neighbouring pixels differ: to the right, below and on both diagonals.

    Args:
        images: (B, C, H, W) of at least 2 x 2 pixels, with gradient; normalised or not.
        form: "l2" adds the Euclidean norms of the four differences over the whole batch
            (DeepInversion's code for CIFAR, arXiv 1912.08795); "l1" adds their mean absolute
            values (DataFree), which does not grow with batch and size.

    Returns:
        Scalar (), at least 0; 0 with gradient 0 for images of one colour.

    Raises:
        RecipeError: unknown form.
        ShapeError: no images, or fewer than 2 x 2 pixels.
    """
    if form not in ("l1", "l2"):
        raise RecipeError(f"got form {form!r}, expected 'l1' or 'l2'")
    if images.dim() != 4 or min(images.shape[2:]) < 2:
        raise ShapeError(
            f"got images {tuple(images.shape)}, expected (B, C, H, W) of at least 2 x 2 pixels"
        )
    differences = (
        images[..., :, :-1] - images[..., :, 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., :-1, :-1] - images[..., 1:, 1:],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    if form == "l1":
        means = torch.stack([one.abs().mean((1, 2, 3)) for one in differences], 1)
        return parallel.batch_mean(means).sum()
    # vector_norm has the gradient 0 at 0, where the square root of a sum of squares has NaN.
    norms = torch.stack([torch.linalg.vector_norm(one, dim=(1, 2, 3)) for one in differences], 1)
    total: Tensor = torch.linalg.vector_norm(parallel.batch_rows(norms), dim=0).sum()
    return total
