"""Who holds which examples: labels dealt out to clients, and the clients' own test parts.

A partitioner takes labels and gives one tensor of row numbers for each client; no row is given
twice. All are deterministic by the state of the generator, on any machine with the same NumPy.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from vestige.errors import DataError, ShapeError

Partition = Literal["dirichlet-by-class", "dirichlet-by-client", "shards", "quantity", "even"]
TestMode = Literal["owned", "same-mix"]
_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]

# What each partitioner uses beside the number of clients, and what stands in where it is not given.
_USED: Mapping[str, Mapping[str, float | None]] = {
    "dirichlet-by-class": {"alpha": 0.1, "share": 1.0, "least": 10},
    "dirichlet-by-client": {"alpha": 0.3, "least": 0, "each": None, "size_sigma": None},
    "shards": {"shards": 2},
    "quantity": {"alpha": 0.5, "least": 1},
    "even": {"each": None},
}
_TRIES = 10_000
# Scores of one chunk of draws take 32 MiB.
_CHUNK = 2**22


class PartitionConfig(BaseModel):
    """How examples are dealt out to clients.

    A field that the partitioner does not use is refused. One that it uses and that is not given
    takes the value that is said here.

    Attributes:
        name: "dirichlet-by-class" splits each class over the clients (the protocol of FedGen);
            "dirichlet-by-client" gives each client a mix of classes of its own (FedDyn, FedFTG);
            "shards" cuts the examples, sorted by class, into pieces (McMahan et al., 2017);
            "quantity" makes clients of different size and the same mix; "even" makes them alike.
            The same `alpha` means another skew in each of the three that have one.
        clients: N.
        alpha: of the symmetric Dirichlet distribution; lower is more skewed. By class 0.1 (the
            reference code of FedGen), by client 0.3 (the script of FedFTG), quantity 0.5 (our
            choice).
        share: by class, the part of the examples that is dealt out, in (0, 1]; 1.0 (our choice;
            the reference code takes 0.5 of MNIST and 0.1 of EMNIST). Classes are cut to a common
            limit, too, so that less may be given, see `dirichlet_by_class`.
        least: examples that every client has in the end. By class 10 (the reference code), reached
            by drawing anew; by client 0 and quantity 1 (our choice), given before the rest is
            drawn. 0 allows clients without any.
        each: by client and even, examples of a client, on average where sizes differ; not given,
            all examples are dealt out.
        size_sigma: by client, standard deviation of the logarithm of a client's size; not given,
            all are of one size.
        shards: pieces for each client; 2 (McMahan et al.). Fewer means fewer classes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Partition = "dirichlet-by-class"
    clients: int = Field(20, ge=1)
    alpha: float | None = Field(None, gt=0)
    share: float | None = Field(None, gt=0, le=1)
    least: int | None = Field(None, ge=0)
    each: int | None = Field(None, ge=1)
    size_sigma: float | None = Field(None, gt=0)
    shards: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        name = given.get("name", "dirichlet-by-class")
        if name not in get_args(Partition):
            return given
        used = _USED[name]
        known = {field for fields in _USED.values() for field in fields}
        extra = sorted(key for key in known - used.keys() if given.get(key) is not None)
        if extra:
            raise ValueError(
                f"got {', '.join(extra)} for the partition {name!r}, which uses "
                f"{', '.join(used)} and no more; leave the others out or choose another partition"
            )
        missing = {key: value for key, value in used.items() if given.get(key) is None}
        return {**given, **{key: value for key, value in missing.items() if value is not None}}

    def deal(self, labels: Tensor, num_classes: int, rng: torch.Generator) -> list[Tensor]:
        """The rows of each client.

        Args:
            labels: (N,), int64, in [0, num_classes).
            num_classes: C.
            rng: on the CPU.

        Returns:
            For each client, rows in ascending order, int64, on the CPU; no row twice, not all rows
            where the settings leave some out.

        Raises:
            DataError: there are too few examples for these settings.
            ShapeError: the labels are not as above.
        """
        _checked(labels, num_classes)
        match self.name:
            case "dirichlet-by-class":
                return dirichlet_by_class(
                    labels,
                    self.clients,
                    rng,
                    alpha=cast(float, self.alpha),
                    share=cast(float, self.share),
                    least=cast(int, self.least),
                )
            case "dirichlet-by-client":
                return dirichlet_by_client(
                    labels,
                    self.clients,
                    rng,
                    alpha=cast(float, self.alpha),
                    least=cast(int, self.least),
                    each=self.each,
                    size_sigma=self.size_sigma,
                )
            case "shards":
                return shards(labels, self.clients, rng, shards=cast(int, self.shards))
            case "quantity":
                return quantity(
                    labels,
                    self.clients,
                    rng,
                    alpha=cast(float, self.alpha),
                    least=cast(int, self.least),
                )
            case "even":
                return even(labels, self.clients, rng, each=self.each)


def dirichlet_by_class(
    labels: Tensor,
    clients: int,
    rng: torch.Generator,
    *,
    alpha: float = 0.1,
    share: float = 1.0,
    least: int = 10,
) -> list[Tensor]:
    """Each class split over the clients by a Dirichlet draw of its own: the protocol of FedGen.

    A client is full at L = share * N / clients examples. Of each class, in random order, at most L
    examples and at most its `share` are kept, cut by the cumulated draw among clients that are not
    full. All is drawn anew until every client has `least`. The reference code rounds the cuts down,
    which gives the last client one example of almost every class; here they go to the nearest.

    Args:
        labels: (N,), int64.
        clients: how many.
        rng: on the CPU.
        alpha: above 0; lower gives a class to fewer clients.
        share: in (0, 1].
        least: of each client.

    Returns:
        As `PartitionConfig.deal`.

    Raises:
        DataError: `least` cannot be reached, or was not in 10,000 draws.
    """
    draws = _numpy(rng)
    totals = np.bincount(_array(labels))
    limit = int(share * len(labels) / clients)
    kept = np.minimum(limit, (share * totals).astype(np.int64))
    if (held := int(kept.sum())) < clients * least:
        raise DataError(
            f"got {len(labels)} examples for {clients} clients, of which {held} can be dealt out "
            f"(share {share}, at most {limit} of a class), expected {least} for each client; take "
            "fewer clients, or lower least or raise share"
        )
    for _ in range(_TRIES):
        counts = np.zeros((clients, len(kept)), dtype=np.int64)
        for label in draws.permutation(np.flatnonzero(kept)):
            log_shares = _log_dirichlet(alpha, (clients,), draws)
            log_shares[counts.sum(1) >= limit] = -np.inf
            counts[:, label] = _cut(np.exp(log_shares - log_shares.max()), int(kept[label]))
        if counts.sum(1).min() >= least:
            return _parts(_owners(labels, counts, draws), clients)
    raise DataError(
        f"got no draw in {_TRIES:,} in which each of {clients} clients has {least} examples "
        f"(alpha {alpha}), expected one; raise alpha, lower least or take fewer clients"
    )


def dirichlet_by_client(
    labels: Tensor,
    clients: int,
    rng: torch.Generator,
    *,
    alpha: float = 0.3,
    least: int = 0,
    each: int | None = None,
    size_sigma: float | None = None,
) -> list[Tensor]:
    """Each client with a mix of classes drawn for it: the protocol of FedDyn and FedFTG.

    Again and again a client that is not full, each with the same chance, takes an example of a
    class drawn from its mix, among classes that are left. Where all examples are dealt out, the
    last to be full take what remains, whatever their mix.

    Args:
        labels: (N,), int64.
        clients: how many.
        rng: on the CPU.
        alpha: above 0; lower gives a client fewer classes.
        least: of each client, before the rest is divided.
        each: examples of a client on average; None deals out all.
        size_sigma: above 0, of log-normal sizes; None makes them equal, up to one.

    Returns:
        As `PartitionConfig.deal`.

    Raises:
        DataError: there are fewer examples than asked for.
    """
    draws = _numpy(rng)
    total = len(labels) if each is None else each * clients
    _enough(len(labels), total, f"{each} for each of {clients} clients")
    _enough(total, clients * least, f"at least {least} for each of {clients} clients")
    if size_sigma is None:
        sizes = _equal(total, clients)
    else:
        weights = np.exp(size_sigma * draws.standard_normal(clients))
        sizes = least + _cut(weights, total - clients * least)
    totals = np.bincount(_array(labels))
    turns = _turns(sizes, draws)
    chosen = _chosen(turns, _log_dirichlet(alpha, (clients, len(totals)), draws), totals, draws)
    # The n-th turn that chose a class takes the n-th of its shuffled examples.
    rows = _by_class(labels, draws)
    order = np.argsort(chosen, kind="stable")
    taken = np.bincount(chosen, minlength=len(totals))
    owners = np.full(len(labels), -1, dtype=np.int64)
    owners[rows[np.repeat(_starts(totals), taken) + _places(taken)]] = turns[order]
    return _parts(owners, clients)


def shards(labels: Tensor, clients: int, rng: torch.Generator, *, shards: int = 2) -> list[Tensor]:
    """The examples sorted by class, cut into equal pieces, some for each client.

    Args:
        labels: (N,), int64.
        clients: how many.
        rng: on the CPU.
        shards: pieces for each client; their sizes differ by at most one.

    Returns:
        As `PartitionConfig.deal`.

    Raises:
        DataError: there are fewer examples than pieces.
    """
    draws = _numpy(rng)
    pieces = clients * shards
    _enough(len(labels), pieces, f"one for each of {shards} shards of {clients} clients")
    owner_of = draws.permutation(np.repeat(np.arange(clients), shards))
    owners = np.empty(len(labels), dtype=np.int64)
    owners[_by_class(labels, draws)] = np.repeat(owner_of, _equal(len(labels), pieces))
    return _parts(owners, clients)


def quantity(
    labels: Tensor, clients: int, rng: torch.Generator, *, alpha: float = 0.5, least: int = 1
) -> list[Tensor]:
    """Clients of different size whose classes are a fair sample of all.

    Args:
        labels: (N,), int64.
        clients: how many.
        rng: on the CPU.
        alpha: above 0, of the Dirichlet draw of the sizes; lower makes them differ more.
        least: of each client, before the rest is divided.

    Returns:
        As `PartitionConfig.deal`.

    Raises:
        DataError: there are fewer examples than `least` needs.
    """
    draws = _numpy(rng)
    _enough(len(labels), clients * least, f"at least {least} for each of {clients} clients")
    log_shares = _log_dirichlet(alpha, (clients,), draws)
    sizes = least + _cut(np.exp(log_shares - log_shares.max()), len(labels) - clients * least)
    return _parts(draws.permutation(np.repeat(np.arange(clients), sizes)), clients)


def even(
    labels: Tensor, clients: int, rng: torch.Generator, *, each: int | None = None
) -> list[Tensor]:
    """Clients of one size, up to one example, whose classes are a fair sample of all.

    Args:
        labels: (N,), int64.
        clients: how many.
        rng: on the CPU.
        each: examples of a client; None deals out all.

    Returns:
        As `PartitionConfig.deal`.

    Raises:
        DataError: there are fewer examples than asked for.
    """
    draws = _numpy(rng)
    total = len(labels) if each is None else each * clients
    _enough(len(labels), total, f"{each} for each of {clients} clients")
    owners = np.full(len(labels), -1, dtype=np.int64)
    owners[:total] = np.repeat(np.arange(clients), _equal(total, clients))
    return _parts(draws.permutation(owners), clients)


def class_counts(parts: list[Tensor], labels: Tensor, num_classes: int) -> Tensor:
    """Examples of each class at each client, (clients, C), int64.

    Args:
        parts: rows of each client.
        labels: (N,), int64, what the rows stand for.
        num_classes: C.
    """
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    rows = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    cells = owners * num_classes + _array(labels)[_array(rows)]
    return torch.from_numpy(
        np.bincount(cells, minlength=len(parts) * num_classes).reshape(len(parts), num_classes)
    )


def held_out(
    counts: Tensor,
    test_labels: Tensor,
    rng: torch.Generator,
    *,
    mode: TestMode = "same-mix",
    each: int | None = None,
) -> list[Tensor]:
    """Each client's own part of the test examples, of classes that it holds.

    Args:
        counts: (clients, C), int64, examples of each class that a client trains on.
        test_labels: (M,), int64, in [0, C).
        rng: on the CPU; draws which example goes where.
        mode: "owned" gives a client floor(test examples of the class / clients) of each class that
            it holds, however little it holds of it (the protocol of FedGen); no example goes to
            two clients. "same-mix" gives the mix that the client trains on, of those classes that
            are in the test set, up to rounding. No example is given to a client twice, and none to
            two clients as long as there are enough of its class; then all are given to about as
            many clients.
        each: with "same-mix", examples of a client at most; fewer where a class has not enough to
            keep the mix. None takes 100 (our choice). "owned" has no such limit.

    Returns:
        For each client, rows of `test_labels` in ascending order, int64; empty for a client without
        examples.

    Raises:
        DataError: `each` is given with "owned".
        ShapeError: counts or labels are not as above.
    """
    if counts.dim() != 2 or not counts.shape[0]:
        raise ShapeError(
            f"got counts of shape {tuple(counts.shape)}, expected (clients, classes); see "
            "`class_counts`"
        )
    clients, num_classes = counts.shape
    _checked(test_labels, num_classes)
    draws = _numpy(rng)
    held = _array(counts)
    totals = np.bincount(_array(test_labels), minlength=num_classes)
    if mode == "same-mix":
        wanted = _same_mix(held, totals, 100 if each is None else each)
    elif each is not None:
        raise DataError(
            f"got each {each} with test parts of what is 'owned', which take what the protocol "
            "gives them; leave it out or choose 'same-mix'"
        )
    else:
        wanted = np.where(held > 0, totals // clients, 0)
    # Class by class the clients take turns at the shuffled examples; after the last comes the
    # first again.
    by_class = np.ascontiguousarray(wanted.T)
    begins = np.cumsum(by_class, axis=1) - by_class
    amounts = by_class.ravel()
    cell = np.repeat(np.arange(len(amounts)), amounts)
    place = begins.ravel()[cell] + _places(amounts)
    label, client = cell // clients, cell % clients
    rows = _by_class(test_labels, draws)[_starts(totals)[label] + place % totals[label]]
    order = np.lexsort((rows, client))
    sizes = wanted.sum(1).tolist()
    return list(torch.from_numpy(rows[order]).split(sizes))


def _same_mix(held: _Ints, totals: _Ints, each: int) -> _Ints:
    """Test examples (clients, C) in the mix of `held`, by largest remainder, in whole numbers."""
    held = np.where(totals > 0, held, 0)
    sums = held.sum(1)
    # The largest size at which no class is asked for more than it has.
    rooms = np.where(held > 0, totals * sums[:, None] // np.maximum(held, 1), each)
    sizes = np.where(sums > 0, np.minimum(each, rooms.min(1)), 0)
    product, divisor = held * sizes[:, None], np.maximum(sums, 1)[:, None]
    wanted, remainders = product // divisor, product % divisor
    missing = sizes - wanted.sum(1)
    ranks = (-remainders).argsort(1, kind="stable").argsort(1)
    return cast(_Ints, wanted + (ranks < missing[:, None]))


def _turns(sizes: _Ints, draws: np.random.Generator) -> _Ints:
    """Whose turn it is, (sum of sizes,): each time any client that is not full, at random.

    Each client takes its turns at the events of a Poisson process; since that has no memory, the
    next event is any client's with the same chance, and those that are full have left.
    """
    owners = np.repeat(np.arange(len(sizes)), sizes)
    waits = draws.standard_exponential(len(owners)).cumsum()
    before = np.concatenate([[0.0], waits])[_starts(sizes)]
    return owners[np.argsort(waits - before[owners], kind="stable")]


def _chosen(turns: _Ints, log_mixes: _Floats, totals: _Ints, draws: np.random.Generator) -> _Ints:
    """The class of each turn, (T,): from the client's mix, among classes that are not exhausted.

    All turns are drawn at once. A class that was drawn too often keeps its first turns, and the
    others are drawn again without it; what was drawn of other classes stays, as it would when
    drawing turn by turn. Each class is closed once at most.
    """
    is_open = totals > 0
    chosen = _drawn(turns, log_mixes, is_open, draws)
    while True:
        over = np.flatnonzero(np.bincount(chosen, minlength=len(totals)) > totals)
        if not len(over):
            return chosen
        places = [np.flatnonzero(chosen == label) for label in over]
        # The one that is exhausted first: what comes after it depends on that.
        label, turned = min(
            zip(over, places, strict=True), key=lambda one: one[1][totals[one[0]] - 1]
        )
        is_open[label] = False
        again = turned[totals[label] :]
        chosen[again] = _drawn(turns[again], log_mixes, is_open, draws)


def _drawn(
    turns: _Ints, log_mixes: _Floats, is_open: NDArray[np.bool_], draws: np.random.Generator
) -> _Ints:
    """One class for each turn, by the largest of perturbed logarithms: no share underflows."""
    classes = np.flatnonzero(is_open)
    open_mixes = log_mixes[:, classes]
    found = np.empty(len(turns), dtype=np.int64)
    step = max(1, _CHUNK // len(classes))
    for start in range(0, len(turns), step):
        rows = turns[start : start + step]
        scores = open_mixes[rows] + draws.gumbel(size=(len(rows), len(classes)))
        found[start : start + step] = classes[scores.argmax(1)]
    return found


def _log_dirichlet(alpha: float, shape: tuple[int, ...], draws: np.random.Generator) -> _Floats:
    """Logarithms of Dirichlet shares over the last axis, up to a constant.

    Gamma(a) = Gamma(a + 1) * U^(1 / a): of a small alpha the shares themselves underflow to 0.
    """
    uniform = 1.0 - draws.random(shape)
    return cast(_Floats, np.log(draws.standard_gamma(alpha + 1.0, shape)) + np.log(uniform) / alpha)


def _cut(weights: _Floats, total: int) -> _Ints:
    """`total` cut at the rounded cumulated shares: (clients,), int64; weight 0 gets nothing."""
    cumulated = np.cumsum(weights)
    # The last value is the divisor itself, so that all of `total` is given.
    ends: _Ints = np.rint(cumulated / cumulated[-1] * total).astype(np.int64)
    sizes: _Ints = np.diff(ends, prepend=0)
    return sizes


def _equal(total: int, parts: int) -> _Ints:
    """Sizes (parts,) that differ by at most one."""
    return total // parts + (np.arange(parts) < total % parts)


def _owners(labels: Tensor, counts: _Ints, draws: np.random.Generator) -> _Ints:
    """The client of each row, -1 for none: of each class `counts` (clients, C), at random."""
    clients, classes = counts.shape
    totals = np.bincount(_array(labels), minlength=classes)
    rows, starts = _by_class(labels, draws), _starts(totals)
    owners = np.full(len(labels), -1, dtype=np.int64)
    for label in range(classes):
        given = np.repeat(np.arange(clients), counts[:, label])
        owners[rows[starts[label] : starts[label] + len(given)]] = given
    return owners


def _parts(owners: _Ints, clients: int) -> list[Tensor]:
    """Rows of each client in ascending order; those of owner -1 go to nobody."""
    order = np.argsort(owners, kind="stable")
    sizes = np.bincount(owners + 1, minlength=clients + 1)
    return list(torch.from_numpy(order[sizes[0] :]).split(sizes[1:].tolist()))


def _by_class(labels: Tensor, draws: np.random.Generator) -> _Ints:
    """All rows sorted by class, shuffled within a class."""
    shuffled = draws.permutation(len(labels))
    return shuffled[np.argsort(_array(labels)[shuffled], kind="stable")]


def _starts(sizes: _Ints) -> _Ints:
    """Where each of several runs of these sizes begins."""
    return cast(_Ints, np.cumsum(sizes) - sizes)


def _places(sizes: _Ints) -> _Ints:
    """0, 1, ... within each of several runs of these sizes."""
    return cast(_Ints, np.arange(sizes.sum()) - np.repeat(_starts(sizes), sizes))


def _numpy(rng: torch.Generator) -> np.random.Generator:
    """A NumPy generator seeded by one draw: torch's own draws no gamma from a given generator."""
    return np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=rng)))


def _array(values: Tensor) -> _Ints:
    return cast(_Ints, values.cpu().numpy().astype(np.int64, copy=False))


def _checked(labels: Tensor, num_classes: int) -> None:
    fits = labels.dim() == 1 and labels.dtype == torch.int64
    if not fits or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes):
        raise ShapeError(
            f"got labels of shape {tuple(labels.shape)} and {labels.dtype}, expected (examples,) "
            f"int64 from 0 to {num_classes - 1}; check the data set's number of classes"
        )


def _enough(there: int, needed: int, what: str) -> None:
    if there < needed:
        raise DataError(
            f"got {there} examples, expected {needed}: {what}; take fewer clients or ask for less"
        )
