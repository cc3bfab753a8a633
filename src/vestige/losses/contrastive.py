"""Tell every input from all others: the contrastive terms."""

import torch
from jaxtyping import Bool, Float
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


def nt_xent(
    first: Float[Tensor, "rows width"],
    second: Float[Tensor, "rows width"],
    *,
    temperature: float,
    keys: tuple[Float[Tensor, "all width"], Float[Tensor, "all width"]] | None = None,
    same: Bool[Tensor, "rows all"] | None = None,
) -> Float[Tensor, " rows"]:
    """Cross entropy of finding each row's other view among all other rows of both views.

    The NT-Xent of SimCLR (arXiv 2002.05709): every row of both views asks, its own entry is left
    out, its other view is the answer. Rows are compared as they are, so normalise them before.

    Args:
        first: one view, (B, d), with gradient.
        second: the other view of the same inputs, in the same order, with gradient.
        temperature: above 0; lower tells nearer neighbours apart.
        keys: both views (N, d) of all inputs, those asked about first; None are `first` and
            `second` themselves.
        same: (B, N), inputs that are not to be told apart: both views of j are no negatives of i.

    Returns:
        (B,), at least 0, the mean over the two views: log(2N - 1) where all similarities are equal.

    Raises:
        RecipeError: the temperature is not above 0.
        ShapeError: the shapes do not fit.
    """
    if not temperature > 0:
        raise RecipeError(f"got temperature {temperature}, expected a value above 0; 0.5 is usual")
    all_first, all_second = (first, second) if keys is None else keys
    shapes = [tuple(values.shape) for values in (first, second, all_first, all_second)]
    count, total = len(first), len(all_first)
    if (
        shapes[0] != shapes[1]
        or shapes[2] != shapes[3]
        or shapes[0][1] != shapes[2][1]
        or total < count
        or (same is not None and same.shape != (count, total))
    ):
        raise ShapeError(
            f"got views {shapes[0]} and {shapes[1]}, keys {shapes[2]} and {shapes[3]} and same "
            f"{None if same is None else tuple(same.shape)}, expected (B, d) twice, (N, d) twice "
            "with N >= B, and (B, N)"
        )
    own = torch.eye(count, total, dtype=torch.bool, device=first.device)
    others = torch.zeros_like(own) if same is None else same & ~own
    hidden = torch.cat([own | others, others], 1)
    answers = torch.arange(total, total + count, device=first.device)

    def asked(queries: Tensor, alike: Tensor, wanted: Tensor) -> Tensor:
        similar = queries @ torch.cat([alike, wanted]).t() / temperature
        similar = similar.masked_fill(hidden, -torch.inf)
        return F.cross_entropy(similar, answers, reduction="none")

    return (asked(first, all_first, all_second) + asked(second, all_second, all_first)) / 2
