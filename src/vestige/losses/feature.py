"""Terms on what happens inside the networks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vestige.errors import ShapeError


def attention_map(
    features: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch positions"]:
    """Where a layer looks: mean over channels of the squares, normalised (arXiv 1612.03928).

    Args:
        features: of a convolutional layer, (B, C, H, W), with gradient.

    Returns:
        (B, H * W), each row of Euclidean length 1; a row of zeros where all features are 0.

    Raises:
        ShapeError: the features are no maps.
    """
    if features.dim() != 4:
        raise ShapeError(
            f"got features {tuple(features.shape)}, expected maps (B, C, H, W); name layers that "
            "come before the pooling"
        )
    return F.normalize(features.square().mean(1).flatten(1), dim=1)


def attention_transfer_loss(
    student: Sequence[Float[Tensor, "batch ..."]], teacher: Sequence[Float[Tensor, "batch ..."]]
) -> Float[Tensor, " batch"]:
    """How differently two networks look at an input (ZSKT, arXiv 1905.09768, eq. 4).

    Args:
        student: features of its layers, each (B, C, H, W), with gradient. The number of channels
            may differ from the teacher's, the number of positions may not.
        teacher: likewise and in the same order; gradient flows here too, so take it without in a
            student step.

    Returns:
        (B,), at least 0: sum over layers of the mean over positions of the squared difference of
        the attention maps.

    Raises:
        ShapeError: no layers, another number of layers, or a layer with other positions.
    """
    if not student or len(student) != len(teacher):
        raise ShapeError(
            f"got features of {len(student)} student and {len(teacher)} teacher layers, expected "
            "the same number, at least 1; name pairs of layers"
        )
    terms = []
    for index, (own, other) in enumerate(zip(student, teacher, strict=True)):
        if own.shape[0] != other.shape[0] or own.shape[2:] != other.shape[2:]:
            raise ShapeError(
                f"got at layer {index} student features {tuple(own.shape)} and teacher features "
                f"{tuple(other.shape)}, expected the same batch, height and width; name layers of "
                "equal resolution or set attention_weight: 0"
            )
        terms.append((attention_map(own) - attention_map(other)).square().mean(1))
    return torch.stack(terms).sum(0)
