"""Tell every input from all others: the contrastive term of model inversion."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vestige.errors import RecipeError, ShapeError


def info_nce(
    queries: Float[Tensor, "rows width"],
    keys: Float[Tensor, "all width"],
    *,
    temperature: float,
) -> Float[Tensor, " rows"]:
    """Cross entropy of finding each query's own key among all keys (CMI, arXiv 2105.08584, eq. 5).

    The key of query i is row i of `keys`; the further keys belong to nobody and are negatives of
    all. Rows are compared as they are, so normalise them before: `ProjectionHead` does.

    Args:
        queries: (B, d), with gradient.
        keys: (M, d) with M >= B; gradient flows here too, so detach what is a constant.
        temperature: above 0; lower tells nearer neighbours apart.

    Returns:
        (B,), at least 0: log M where all similarities are equal. Its gradient on the queries is
        that of the first B rows of a full (M, M) comparison, at a fraction of the work.

    Raises:
        RecipeError: the temperature is not above 0.
        ShapeError: widths differ, or there are fewer keys than queries.
    """
    if not temperature > 0:
        raise RecipeError(f"got temperature {temperature}, expected a value above 0; 0.1 is usual")
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1]:
        raise ShapeError(
            f"got queries {tuple(queries.shape)} and keys {tuple(keys.shape)}, expected (B, d) and "
            "(M, d); project both by one head"
        )
    if len(keys) < len(queries):
        raise ShapeError(
            f"got {len(queries)} queries and {len(keys)} keys, expected at least as many keys; row "
            "i of the keys is the partner of query i"
        )
    own = torch.arange(len(queries), device=queries.device)
    return F.cross_entropy(queries @ keys.t() / temperature, own, reduction="none")
