"""What the networks of several clients say together, and how varied a generator's outputs are."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vestige.errors import RecipeError, ShapeError
from vestige.losses.distill import check_same_shape, kl_divergence, l1_logits


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


def ensemble_discrepancy(
    student: Float[Tensor, "batch classes"],
    teachers: Float[Tensor, "members batch classes"],
    weights: Float[Tensor, "members batch"],
    *,
    kind: str = "kl",
) -> Float[Tensor, " batch"]:
    """How much a network differs from each member of an ensemble (FedFTG, arXiv 2203.09249).

    Args:
        student: logits (B, C), with gradient to the inputs.
        teachers: logits (K, B, C) of the members. With "kl" gradient flows through them as well,
            with "l1_logits" not, as in the reference code.
        weights: (K, B), of each member for each sample. A weight of 0 leaves a member without any
            influence.
        kind: "kl" is KL(softmax(student) || softmax(member)) in nats, "l1_logits" the mean absolute
            difference of logits.

    Returns:
        (B,), at least 0, the weighted sum over members. A generator adds the NEGATIVE of its mean.

    Raises:
        RecipeError: unknown kind.
        ShapeError: the shapes do not fit.
    """
    if kind not in ("kl", "l1_logits"):
        raise RecipeError(f"got discrepancy {kind!r}, expected 'kl' or 'l1_logits'")
    members = teachers.flatten(0, 1)
    repeated = student.expand_as(teachers).flatten(0, 1)
    if kind == "kl":
        # The student is the first argument of the divergence, which is here called the teacher.
        each = kl_divergence(members, repeated)
    else:
        each = l1_logits(repeated, members.detach())
    return (weights * each.view(weights.shape)).sum(0)


def ensemble_probabilities(
    teachers: Float[Tensor, "members batch classes"], weights: Float[Tensor, "members batch"]
) -> Float[Tensor, "batch classes"]:
    """Weighted sum over members of their softmax, (B, C).

    Args:
        teachers: logits (K, B, C).
        weights: (K, B); where they sum to 1 over the members, so does the result over the classes.
    """
    return (weights.unsqueeze(-1) * teachers.softmax(-1)).sum(0)


def soft_cross_entropy(
    logits: Float[Tensor, "batch classes"],
    target: Float[Tensor, "batch classes"],
    *,
    reduction: str = "batchmean",
) -> Float[Tensor, " batch"]:
    """Cross-entropy with probabilities instead of a class.

    It is KL(target || softmax(logits)) plus the entropy of the target, which is constant.

    Args:
        logits: (B, C), with gradient.
        target: (B, C), probabilities, no gradient.
        reduction: "batchmean" sums over the classes, as cross-entropy does; "mean" takes their
            mean, 1 / C of it, as FedFTG's code does, so that its learning rate is C times smaller
            than it reads.

    Returns:
        (B,), at least 0, in nats.

    Raises:
        RecipeError: unknown reduction.
        ShapeError: the shapes differ.
    """
    if reduction not in ("batchmean", "mean"):
        raise RecipeError(f"got reduction {reduction!r}, expected 'batchmean' or 'mean'")
    check_same_shape(logits, target)
    each = -(target * logits.log_softmax(1))
    return each.sum(1) if reduction == "batchmean" else each.mean(1)
