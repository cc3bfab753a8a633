"""How well a word's embedding is told from the words around it."""

from jaxtyping import Bool, Float
from torch import Tensor

from vestige.errors import ShapeError


def masked_embedding_loss(
    guessed: Float[Tensor, "batch places width"],
    words: Float[Tensor, "batch places width"],
    masked: Bool[Tensor, "batch places"],
) -> Float[Tensor, " batch"]:
    """Squared distance of guessed embeddings to those of the words that were masked (AS-DFD).

    Args:
        guessed: for every place, with gradient.
        words: of which the masked ones are the truth; gradient flows here too, so detach them where
            they are not to follow.
        masked: which places count; at least one in each row.

    Returns:
        (B,), sum over the width, mean over a row's masked places; 0 for a row without any.

    Raises:
        ShapeError: the shapes differ.
    """
    if guessed.shape != words.shape or masked.shape != words.shape[:2]:
        raise ShapeError(
            f"got guesses {tuple(guessed.shape)} for words {tuple(words.shape)} and places "
            f"{tuple(masked.shape)}, expected (B, l, d) twice and (B, l)"
        )
    distance = (guessed - words).square().sum(2)
    counted = masked.to(distance.dtype)
    return (distance * counted).sum(1) / counted.sum(1).clamp_min(1)
