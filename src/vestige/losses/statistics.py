"""Distance between the statistics that inputs cause and those a teacher has stored."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.errors import RecipeError, ShapeError

# Variance that a channel is taken to have at least, as a share of its layer's mean.
_DEAD = 1e-3


class Stats(NamedTuple):
    """Mean and variance of one layer's input, per channel.

    Attributes:
        mean: (C,).
        var: (C,), biased when observed on a batch; as stored by torch otherwise.
    """

    mean: Tensor
    var: Tensor


def bn_statistics_loss(
    observed: Sequence[Stats], stored: Sequence[Stats], *, norm: str = "l2"
) -> Float[Tensor, ""]:
    """Distance between batch statistics of synthetic inputs and stored BatchNorm statistics.

    Args:
        observed: per layer mean and biased variance, each (C,), with gradient.
        stored: running mean and variance, each (C,), no gradient.
        norm: "l2" adds ||mean - mean||_2 + ||var - var||_2, neither squared nor divided by C
            (DeepInversion, arXiv 1912.08795, eq. 4); "mse" adds the mean squared differences, which
            fades near the target and weights wide layers no more than narrow ones. "relative" has
            no unit: root mean square over channels of the means' difference in stored deviations,
            plus that of the logarithm of the variances' ratio.

    Returns:
        Scalar (), at least 0; sum over layers, not divided by their number, but with "relative"
        their mean, so that one weight suits small and large networks. A layer whose statistics are
        met exactly adds 0 with gradient 0.

    Raises:
        RecipeError: unknown norm.
        ShapeError: no layers, a different number of layers, or a layer whose C differs.
    """
    if norm not in ("l2", "mse", "relative"):
        raise RecipeError(
            f"got norm {norm!r}, expected 'l2', 'mse' or 'relative'; 'l2' is the published one"
        )
    if not observed or len(observed) != len(stored):
        raise ShapeError(
            f"got statistics of {len(observed)} observed and {len(stored)} stored layers, expected "
            "the same number, at least 1; read both from one BatchNormProbe"
        )
    terms = []
    for index, (seen, kept) in enumerate(zip(observed, stored, strict=True)):
        if seen.mean.shape != kept.mean.shape or seen.var.shape != kept.var.shape:
            raise ShapeError(
                f"got at layer {index} an observed mean and variance of shapes "
                f"{tuple(seen.mean.shape)} and {tuple(seen.var.shape)}, expected the stored "
                f"{tuple(kept.mean.shape)} and {tuple(kept.var.shape)}; read both from one "
                "BatchNormProbe, in one order"
            )
        if norm == "relative":
            terms.append(_relative(seen, kept))
        else:
            terms.append(
                _distance(seen.mean, kept.mean, norm) + _distance(seen.var, kept.var, norm)
            )
    return torch.stack(terms).mean() if norm == "relative" else torch.stack(terms).sum()


def smoothed(
    observed: Sequence[Stats], earlier: Sequence[Stats] | None, momentum: float
) -> tuple[Stats, ...]:
    """Statistics of a batch mixed with those of the batches before it (Fast, arXiv 2112.06253).

    The stored statistics are those of a whole data set, and a small batch need not have them by
    itself: only together with what was made before.

    Args:
        observed: per layer mean and variance (C,), with gradient.
        earlier: an exponential mean of the batches before, as constants; None before there is one.
        momentum: share of `earlier`, in [0, 1).

    Returns:
        Per layer (1 - momentum) * observed + momentum * earlier, mean and variance alike, with
        gradient to `observed`; `observed` as it is without `earlier`.

    Raises:
        RecipeError: the momentum is not in [0, 1).
        ShapeError: a different number of layers.
    """
    if not 0 <= momentum < 1:
        raise RecipeError(f"got momentum {momentum}, expected a value in [0, 1); 0.9 is Fast's")
    if earlier is None:
        return tuple(observed)
    if len(observed) != len(earlier):
        raise ShapeError(
            f"got statistics of {len(observed)} observed and {len(earlier)} earlier layers, "
            "expected the same number"
        )
    return tuple(
        Stats(
            (1 - momentum) * seen.mean + momentum * before.mean.detach(),
            (1 - momentum) * seen.var + momentum * before.var.detach(),
        )
        for seen, before in zip(observed, earlier, strict=True)
    )


class Smoothing:
    """An exponential mean over batches of the statistics that they caused, see `smoothed`.

    Attributes:
        earlier: of the batches before, without gradient; None before the first.
    """

    def __init__(self, momentum: float) -> None:
        """Starts without any batch.

        Args:
            momentum: share of earlier batches, in [0, 1); 0.9 is usual.
        """
        self.momentum = momentum
        self.earlier: tuple[Stats, ...] | None = None
        self._latest: tuple[Stats, ...] | None = None

    def mixed(self, observed: Sequence[Stats]) -> tuple[Stats, ...]:
        """`observed`, with gradient, mixed with earlier batches; remembered for `update`."""
        mixed = smoothed(observed, self.earlier, self.momentum)
        self._latest = tuple(Stats(mean.detach(), var.detach()) for mean, var in mixed)
        return mixed

    def update(self) -> None:
        """Take in what was mixed last; call it once per batch, not once per iteration."""
        self.earlier, self._latest = self._latest or self.earlier, None

    def state_dict(self) -> Mapping[str, Any]:
        """Means and variances of the layers."""
        return {"earlier": None if self.earlier is None else [list(pair) for pair in self.earlier]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        kept = state["earlier"]
        self.earlier = None if kept is None else tuple(Stats(*pair) for pair in kept)


def _relative(seen: Stats, kept: Stats) -> Tensor:
    # Channels that died in training have no variance; a share of the layer's mean keeps them from
    # outweighing all others.
    floor = _DEAD * kept.var.mean() + torch.finfo(kept.var.dtype).tiny
    mean = (seen.mean - kept.mean) / (kept.var + floor).sqrt()
    var = torch.log((seen.var + floor) / (kept.var + floor))
    # Of many channels the root mean square; vector_norm has the gradient 0 at 0.
    size = len(kept.mean) ** 0.5
    distance: Tensor = (torch.linalg.vector_norm(mean) + torch.linalg.vector_norm(var)) / size
    return distance


def _distance(seen: Tensor, kept: Tensor, norm: str) -> Tensor:
    difference = seen - kept
    if norm == "mse":
        return difference.square().mean()
    # vector_norm defines its gradient at exactly 0 as 0, where sqrt(sum of squares) gives NaN; an
    # eps under the root would instead shift every value and flatten the gradient near the target.
    distance: Tensor = torch.linalg.vector_norm(difference)
    return distance
