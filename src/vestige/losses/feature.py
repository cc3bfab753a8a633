"""Terms on what happens inside the networks."""

import math
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
    # Unlike that of a mean, the gradient of a sum is never written out.
    energy = features.square().sum(1) / features.shape[1]
    return F.normalize(energy.flatten(1), dim=1)


def attention_transfer_loss(
    student: Sequence[Float[Tensor, "batch ..."]], teacher: Sequence[Float[Tensor, "batch ..."]]
) -> Float[Tensor, " batch"]:
    """How differently two networks look at an input (ZSKT, arXiv 1905.09768, eq. 4).

    Args:
        student: features of its layers, each (B, C, H, W), with gradient. The number of channels
            may differ from the teacher's, the number of positions may not.
        teacher: likewise and in the same order, or their attention maps (B, positions), which do
            not change while the inputs stay; gradient flows here too, so take it without in a
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
    for index, (own, other) in enumerate(zip(student, teacher, strict=True)):
        fits = (
            own.shape[2:] == other.shape[2:]
            if other.dim() > 2
            else _positions(own) == other[0].numel()
        )
        if own.shape[0] != other.shape[0] or not fits:
            raise ShapeError(
                f"got at layer {index} student features {tuple(own.shape)} and teacher features "
                f"{tuple(other.shape)}, expected the same batch, height and width; name layers of "
                "equal resolution or set attention_weight: 0"
            )
    # All layers side by side: small maps take less time than the calls about them.
    own = torch.cat([attention_map(features) for features in student], dim=1)
    other = torch.cat([x if x.dim() == 2 else attention_map(x) for x in teacher], dim=1)
    of_layers = [own.new_full((n,), 1 / n) for n in map(_positions, student)]
    return (own - other).square() @ torch.cat(of_layers)


def channel_weights(classifier: Float[Tensor, "classes channels"]) -> Float[Tensor, " channels"]:
    """How much a linear classifier looks at each of the features that enter it.

    Args:
        classifier: weights (K, d) of the last layer.

    Returns:
        (d,), Euclidean lengths of the columns, divided by their mean; no gradient. All 1 where the
        columns are equally long, also where all are 0.
    """
    lengths = classifier.detach().norm(dim=0)
    mean = lengths.mean()
    return torch.where(mean > 0, lengths / mean.clamp_min(1e-30), torch.ones_like(lengths))


def weighted_feature_loss(
    student: Float[Tensor, "batch channels"],
    teacher: Float[Tensor, "batch channels"],
    *,
    channels: Float[Tensor, " channels"] | None = None,
) -> Float[Tensor, " batch"]:
    """Squared distance of the directions of two feature vectors.

    Args:
        student: penultimate features, projected to the teacher's width, (B, d), with gradient.
        teacher: (B, d); taken as a constant.
        channels: weight (d,) of each channel, multiplied onto the difference before it is squared;
            None weighs all by 1.

    Returns:
        (B,), sum over channels, in [0, 4] without `channels`: 0 where both vectors point in one
        direction, whatever their lengths.

    Raises:
        ShapeError: the shapes differ (they are never broadcast), or there are not d weights.
    """
    width = None if channels is None else len(channels)
    if student.shape != teacher.shape or width not in (None, student.shape[1]):
        raise ShapeError(
            f"got student features {tuple(student.shape)}, teacher features "
            f"{tuple(teacher.shape)} and {width} channel weights, expected one shape (B, d) and d "
            "weights; project the student's features to the teacher's width"
        )
    difference = F.normalize(student, dim=1) - F.normalize(teacher.detach(), dim=1)
    return (difference if channels is None else difference * channels).square().sum(1)


def classifier_alignment_loss(
    student: tuple[Float[Tensor, "classes channels"], Float[Tensor, " classes"] | None],
    teacher: tuple[Float[Tensor, "classes channels"], Float[Tensor, " classes"] | None],
) -> Float[Tensor, ""]:
    """Mean squared difference of two linear classifiers.

    Args:
        student: weights (K, d) and biases (K,), with gradient.
        teacher: likewise; taken as constants. Biases that only one of them has count as 0.

    Returns:
        Scalar: mean over the K * d weights, plus mean over the K biases.

    Raises:
        ShapeError: the weights differ in shape.
    """
    if student[0].shape != teacher[0].shape:
        raise ShapeError(
            f"got weights {tuple(student[0].shape)} and {tuple(teacher[0].shape)}, expected one "
            "shape (K, d); let the student's classifier act on features of the teacher's width"
        )
    distance = (student[0] - teacher[0].detach()).square().mean()
    own, other = student[1], None if teacher[1] is None else teacher[1].detach()
    if own is None and other is None:
        return distance
    bias = other if own is None else own if other is None else own - other
    return distance if bias is None else distance + bias.square().mean()


def _positions(features: Tensor) -> int:
    return math.prod(features.shape[2:])
