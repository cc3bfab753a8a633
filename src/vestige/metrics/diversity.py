"""How different the inputs of a pool are, to a network that knows what matters in them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core import modes
from vestige.core.types import predict
from vestige.errors import DataError, RecipeError, ShapeError
from vestige.models.probes import FeatureProbe, penultimate_layer


@dataclass(frozen=True)
class Diversity:
    """What `measure` found.

    Attributes:
        inputs: how many were looked at.
        pairwise_distance: mean cosine distance of the features of two of them, in [0, 2]; 0 where
            all point one way, 1 where they have nothing in common on average.
        class_share: share of the classes that at least one of them has, in (0, 1].
        effective_classes: exp of the entropy of the classes, from 1 (one class) to K (all equally
            often).
        repeats: share of the compared inputs whose nearest other one is closer than `threshold`.
        compared: how many were compared for that, each with each.
        threshold: cosine distance.
    """

    inputs: int
    pairwise_distance: float
    class_share: float
    effective_classes: float
    repeats: float
    compared: int
    threshold: float


def measure(
    network: nn.Module,
    batches: Iterable[Tensor],
    rng: torch.Generator,
    *,
    labels: Int[Tensor, " inputs"] | None = None,
    layer: str | None = None,
    threshold: float = 0.005,
    limit: int = 10_000,
) -> Diversity:
    """Diversity of inputs to a network, in one pass over them and in memory that `limit` bounds.

    Args:
        network: a classifier; asked in eval mode without gradient, its flags are restored. A judge
            that did not make the inputs tells more than the teacher that they were fitted to.
        batches: inputs (B, ...) in the network's normalised space, on any device, such as the parts
            of a pool; all that they give are counted.
        rng: on the CPU; draws which inputs are compared, where there are more than `limit`.
        labels: what each was made for, in the order of the batches. None takes what the network
            says, which also tells when inputs miss the class that they were made for.
        layer: what enters it are the features, averaged over positions. None takes the last layer,
            see `penultimate_layer`.
        threshold: cosine distance below which two inputs count as one, in (0, 2]. 0.005 is our
            choice: of real digits and their teacher 1 % have such a neighbour, at 0.02 half have.
        limit: most inputs that are compared, at least 2; the time grows with its square.

    Raises:
        DataError: fewer than two inputs, or a feature that is not finite.
        RecipeError: the threshold or the limit is out of range.
        ShapeError: the number of labels is not that of inputs, or a label is no class.
        TeacherError: the network has no such layer.
    """
    if not 0 < threshold <= 2 or limit < 2:
        raise RecipeError(
            f"got threshold {threshold} and limit {limit}, expected a threshold in (0, 2] and a "
            "limit of at least 2; 0.005 and 10000 are usual"
        )
    probe = FeatureProbe(network, [layer or penultimate_layer(network)], of="input")
    device = next(network.parameters()).device
    sums, counts, sample = _Sums(), torch.zeros(0, dtype=torch.int64), _Sample(limit, rng)
    with torch.no_grad(), modes.evaluating(network), probe:
        for batch in batches:
            logits = predict(network, batch.to(device)).logits
            # Not every device has float64.
            features = probe.instance_means().float().cpu()
            sums.add(features)
            sample.add(features)
            said = torch.bincount(logits.argmax(1).cpu(), minlength=logits.shape[1])
            counts = said if not len(counts) else counts + said
    distance = float(sums.distance())
    if labels is not None:
        counts = _counted(labels, sums.count, len(counts))
    nearest = nearest_distance(sample.rows())
    return Diversity(
        inputs=sums.count,
        pairwise_distance=distance,
        class_share=float((counts > 0).double().mean()),
        effective_classes=effective_number(counts),
        repeats=float((nearest < threshold).double().mean()),
        compared=len(nearest),
        threshold=threshold,
    )


def pairwise_distance(features: Float[Tensor, "inputs width"]) -> Float[Tensor, ""]:
    """Mean cosine distance over all pairs of two different rows.

    Exact without the matrix of pairs: the cosines of all pairs add up to the squared norm of the
    sum of the unit vectors, less the rows' own.

    Args:
        features: (N, D), at least two rows. A row of zeros has no direction and counts as distance
            1 to every other.

    Returns:
        Scalar (), float64, in [0, N / (N - 1)]; no gradient.

    Raises:
        DataError: fewer than two rows, or a feature that is not finite.
    """
    sums = _Sums()
    sums.add(features)
    return sums.distance()


def nearest_distance(
    features: Float[Tensor, "inputs width"], *, chunk: int = 1024
) -> Float[Tensor, " inputs"]:
    """Cosine distance of each row to the nearest other one.

    Args:
        features: (N, D), at least two rows; a row of zeros has distance 1 to every other.
        chunk: rows compared with all at a time, so memory grows with N and not with its square.

    Returns:
        (N,), float32, in [0, 2], up to rounding of 1e-6; no gradient.

    Raises:
        DataError: fewer than two rows.
    """
    _at_least_two(len(features))
    units = F.normalize(features.detach().float(), dim=1)
    nearest = []
    for start in range(0, len(units), chunk):
        cosines = units[start : start + chunk] @ units.T
        # A row is no neighbour of its own.
        cosines.diagonal(start).fill_(-torch.inf)
        nearest.append(1 - cosines.amax(1))
    return torch.cat(nearest)


def effective_number(counts: Int[Tensor, " classes"]) -> float:
    """How many equally frequent classes would be as mixed: exp of the entropy of the shares.

    Args:
        counts: (K,), at least 0, one of them above.

    Returns:
        In [1, K].
    """
    shares = counts.double() / counts.sum()
    return float(torch.special.entr(shares).sum().exp())


class _Sums:
    """What the mean distance needs of all rows, without keeping them."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = torch.zeros((), dtype=torch.float64)
        self._squares = 0.0

    def add(self, features: Tensor) -> None:
        """Rows (B, D)."""
        if not torch.isfinite(features).all():
            raise DataError(
                "got features that are not finite, expected numbers; check the inputs, and the "
                "network's weights"
            )
        units = F.normalize(features.detach().double(), dim=1)
        self._sum = self._sum + units.sum(0).cpu()
        self._squares += float(units.square().sum())
        self.count += len(units)

    def distance(self) -> Tensor:
        """Mean over pairs of two different rows, ()."""
        _at_least_two(self.count)
        cosines = self._sum.square().sum() - self._squares
        return 1 - cosines / (self.count * (self.count - 1))


class _Sample:
    """At most `limit` of all rows, each subset as likely as any other."""

    def __init__(self, limit: int, rng: torch.Generator) -> None:
        self._limit = limit
        self._rng = rng
        self._keys = torch.zeros(0)
        self._rows: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Rows (B, D); those with the smallest of random keys stay, in their order."""
        keys = torch.cat([self._keys, torch.rand(len(features), generator=self._rng)])
        rows = features if self._rows is None else torch.cat([self._rows, features])
        if len(rows) > self._limit:
            kept = keys.topk(self._limit, largest=False).indices.sort().values
            keys, rows = keys[kept], rows[kept]
        self._keys, self._rows = keys, rows

    def rows(self) -> Tensor:
        """What stayed, (min(limit, N), D)."""
        return torch.zeros(0, 1) if self._rows is None else self._rows


def _counted(labels: Tensor, inputs: int, classes: int) -> Tensor:
    if labels.shape != (inputs,) or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ShapeError(
            f"got labels of shape {tuple(labels.shape)} for {inputs} inputs and {classes} classes, "
            f"expected one from 0 to {classes - 1} for each"
        )
    return torch.bincount(labels.cpu(), minlength=classes)


def _at_least_two(count: int) -> None:
    if count < 2:
        raise DataError(f"got {count} inputs, expected at least two, which can differ")
