"""What the networks of several clients say together, and how varied a generator's outputs are."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vestige.errors import RecipeError, ShapeError


def latent_diversity_loss(
    latent: Float[Tensor, "batch latent"],
    outputs: Float[Tensor, "batch *output"],
    *,
    latent_distance: str = "mse",
) -> Float[Tensor, ""]:
    """exp(-(1 / B^2) sum_ij d(outputs_i, outputs_j) d(latent_i, latent_j)), minimised by variety.

    FedGen (arXiv 2105.10056) and FedFTG (arXiv 2203.09249) take the same form, the one on features
    and the other on flattened images. The sum goes over all pairs, those of a row with itself
    included.

    Args:
        latent: noise that the outputs were made from, (B, Z); gradient flows, if it has one.
        outputs: of a generator, (B, ...), with gradient; their distance is the mean absolute
            difference.
        latent_distance: "mse", the mean squared difference, or "l1", the mean absolute one.

    Returns:
        Scalar (), in (0, 1]; 1 where all outputs are equal, or all noise is.

    Raises:
        RecipeError: unknown distance.
        ShapeError: the rows are not as many.
    """
    if latent_distance not in ("mse", "l1"):
        raise RecipeError(
            f"got latent_distance {latent_distance!r}, expected 'mse' or 'l1'; 'mse' is the usual "
            "one"
        )
    if len(latent) != len(outputs):
        raise ShapeError(
            f"got {len(latent)} rows of noise and {len(outputs)} outputs, expected as many; hand "
            "in the noise that the outputs were made from"
        )
    differences = latent[:, None] - latent[None]
    squared = latent_distance == "mse"
    of_latent = (differences.square() if squared else differences.abs()).mean(2)
    flat = outputs.flatten(1)
    # Never holds the differences of all pairs, which would be B^2 images.
    of_outputs = torch.cdist(flat, flat, p=1) / flat.shape[1]
    return torch.exp(-(of_outputs * of_latent).mean())


def weighted_ensemble_ce(
    logits: Float[Tensor, "clients batch classes"],
    labels: Int[Tensor, " batch"],
    shares: Float[Tensor, "clients classes"],
    *,
    weighting: str = "per_sample",
) -> Float[Tensor, ""]:
    """Cross-entropy of every client's network, weighted by its share of the label and summed.

    Args:
        logits: of K networks on the same inputs, (K, B, C), with gradient.
        labels: (B,), in [0, C).
        shares: a_k(y), (K, C), no gradient.
        weighting: "per_sample" is sum_k mean_b a_k(y_b) CE_kb; "batch_mean" is
            sum_k mean_b a_k(y_b) mean_b CE_kb, what the public code of FedGen and FedFTG computes:
            one weight per client and batch is left, and a client judges classes that it never saw.

    Returns:
        Scalar (), in nats; sum over clients, mean over the batch.

    Raises:
        RecipeError: unknown weighting.
    """
    if weighting not in ("per_sample", "batch_mean"):
        raise RecipeError(
            f"got label weighting {weighting!r}, expected 'per_sample' or 'batch_mean'; "
            "'per_sample' weighs each sample by the clients who know its class"
        )
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none"
    ).view(logits.shape[:2])
    weights = shares[:, labels]
    if weighting == "batch_mean":
        return (weights.mean(1) * losses.mean(1)).sum()
    return (weights * losses).mean(1).sum()


def pooled_logits(
    logits: Float[Tensor, "clients batch classes"],
    labels: Int[Tensor, " batch"],
    shares: Float[Tensor, "clients classes"],
) -> Float[Tensor, "batch classes"]:
    """One answer of all clients: sum_k a_k(y_b) logits_kb.

    With shares that sum to 1 over clients, its cross-entropy is at most that of
    `weighted_ensemble_ce`, since log-sum-exp is convex.

    Args:
        logits: of K networks on the same inputs, (K, B, C), with gradient.
        labels: (B,), in [0, C).
        shares: a_k(y), (K, C), no gradient.

    Returns:
        Logits (B, C), with gradient.
    """
    return torch.einsum("kb,kbc->bc", shares[:, labels], logits)
