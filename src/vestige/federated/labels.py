"""Which classes the clients have: shares of a vote, priors, and labels drawn by them."""

import torch
from torch import Tensor

from vestige.errors import ContractError, ShapeError


def class_shares(counts: Tensor, smoothing: float = 0.0) -> Tensor:
    """How much each client's word counts for each class: (n_k(y) + s) / sum_j (n_j(y) + s).

    Args:
        counts: n, examples of each class at each client, (K, C), at least 0.
        smoothing: s. Above 0, a client has a say on classes that it has never seen.

    Returns:
        (K, C), float32, on the device of `counts`. Columns sum to 1; the column of a class that no
        client has is 0 without smoothing, and 1 / K with it.

    Raises:
        ShapeError: the counts are no (K, C).
    """
    if counts.dim() != 2:
        raise ShapeError(
            f"got counts of shape {tuple(counts.shape)}, expected (clients, classes); stack the "
            "counts of all clients"
        )
    smoothed = counts.double() + smoothing
    total = smoothed.sum(0)
    # A class without any count keeps its zeros.
    return (smoothed / total.where(total > 0, 1.0)).float()


def label_prior(counts: Tensor) -> Tensor:
    """Share of each class in the examples of all clients.

    Args:
        counts: (K, C), at least 0.

    Returns:
        (C,), float32, sums to 1; all 0 where there is no example.
    """
    pooled = counts.double().sum(0)
    return (pooled / pooled.sum().clamp_min(1)).float()


def quota_labels(prior: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Labels whose histogram is the prior's, in random order; only the order is drawn.

    The quotas are those of the largest remainders: each is `count * prior` rounded up or down, and
    they sum to `count`. A class with less than one label to come may get none.

    Args:
        prior: (C,), at least 0; its sum is taken for 1.
        count: n, how many labels.
        rng: draws the order.

    Returns:
        (n,), int64, on the device of `rng`.

    Raises:
        ContractError: the prior is 0 everywhere.
    """
    shares = prior.detach().double().cpu()
    if not shares.sum() > 0:
        raise ContractError(
            "got a prior of 0 for every class, expected one with examples; draw no labels in a "
            "round that has none"
        )
    exact = shares / shares.sum() * count
    quotas = exact.floor().long()
    # Stable, so that equal remainders go by the number of the class, on every machine.
    order = (exact - quotas).sort(descending=True, stable=True).indices
    quotas[order[: count - int(quotas.sum())]] += 1
    labels = torch.repeat_interleave(torch.arange(len(quotas)), quotas).to(rng.device)
    return labels[torch.randperm(count, generator=rng, device=rng.device)]


def uniform_labels(allowed: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Labels drawn independently, each allowed class as likely as any other.

    Args:
        allowed: (C,), bool.
        count: n, how many labels.
        rng: draws them.

    Returns:
        (n,), int64, on the device of `rng`.

    Raises:
        ContractError: no class is allowed.
    """
    classes = allowed.nonzero().flatten().to(rng.device)
    if not len(classes):
        raise ContractError(
            f"got no class of {len(allowed)} to draw labels of, expected at least one; draw no "
            "labels in a round that has none"
        )
    return classes[torch.randint(len(classes), (count,), generator=rng, device=rng.device)]
