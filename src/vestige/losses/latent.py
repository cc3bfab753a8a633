"""What keeps the codes of a generator near a standard normal distribution."""

from jaxtyping import Float
from torch import Tensor

from vestige.errors import ShapeError


def standard_normal_divergence(
    mean: Float[Tensor, "batch latent"], log_variance: Float[Tensor, "batch latent"]
) -> Float[Tensor, " batch"]:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) of a diagonal Gaussian, in nats (arXiv 1312.6114).

    Args:
        mean: (B, Z), with gradient.
        log_variance: (B, Z), logarithm of the variance, with gradient.

    Returns:
        (B,), at least 0, summed over Z; 0 with gradient 0 at mean 0 and log-variance 0.

    Raises:
        ShapeError: the shapes differ.
    """
    if mean.shape != log_variance.shape:
        raise ShapeError(
            f"got mean {tuple(mean.shape)} and log-variance {tuple(log_variance.shape)}, expected "
            "the same shape (B, Z)"
        )
    # expm1: exp(v) - 1 of a small v loses all digits.
    return (mean.square() + log_variance.expm1() - log_variance).sum(1) / 2


def latent_moments_loss(latent: Float[Tensor, "batch latent"]) -> Float[Tensor, ""]:
    """How far a batch of codes is from mean 0 and variance 1 (PRE-DFKD, arXiv 2201.03019).

    Args:
        latent: (B, Z), at least 2 rows, with gradient.

    Returns:
        Scalar (): the squared distance of the batch's unbiased variance from 1 plus that of its
        mean from 0, each the mean over Z.

    Raises:
        ShapeError: fewer than 2 rows, which have no variance.
    """
    if len(latent) < 2:
        raise ShapeError(f"got {len(latent)} codes, expected at least 2: one has no variance")
    return (latent.var(0) - 1).square().mean() + latent.mean(0).square().mean()
