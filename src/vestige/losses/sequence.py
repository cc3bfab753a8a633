"""Losses over the tokens of sequences, of which only some count."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


def token_cross_entropy(
    logits: Float[Tensor, "batch tokens vocabulary"],
    targets: Int[Tensor, "batch tokens"],
    counted: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of the tokens that count, in nats.

    Args:
        logits: gradient flows.
        targets: token numbers; what stands where nothing counts does not matter.
        counted: which count.

    Returns:
        (B,), sum over the counted tokens of each row; not divided by their number.
    """
    negative = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return torch.where(counted, negative, 0.0).sum(1)


def token_kl(
    student: Float[Tensor, "batch tokens vocabulary"],
    teacher: Float[Tensor, "batch tokens vocabulary"],
    counted: Bool[Tensor, "batch tokens"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " batch"]:
    """KL(softmax(t / T) || softmax(s / T)) of the tokens that count, in nats, not times T^2.

    Args:
        student: logits; gradient flows.
        teacher: logits; none is needed.
        counted: which count.
        temperature: T; higher compares small probabilities more.

    Returns:
        (B,), sum over vocabulary and the counted tokens of each row; not divided by their number.
    """
    log_s = (student / temperature).log_softmax(-1)
    log_t = (teacher / temperature).log_softmax(-1)
    divergence = functional.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    return torch.where(counted, divergence, 0.0).sum(1)
