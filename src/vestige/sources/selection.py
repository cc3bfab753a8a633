"""Which of many given inputs a student should learn from: scores, thresholds, shares of a heap."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core import modes
from vestige.core.protocols import Source
from vestige.core.rows import RowSource, Selection
from vestige.core.types import Batch, Inputs, predict
from vestige.errors import ContractError, RecipeError

logger = logging.getLogger(__name__)

ScoreName = Literal["confidence", "energy", "logit-norm"]
# Rounding of an exponential mean of equal numbers.
_ROUNDING = 1e-6
# Share of a batch that is kept where the thresholds keep next to nothing; and how many rows a
# batch needs for statistics.
_AT_LEAST, _FEWEST = 0.1, 2


@dataclass(frozen=True)
class Votes:
    """What teacher and student together say of some rows.

    Attributes:
        classes: (B,) int64, the class with the most votes.
        confidence: (B,), its probability.
        score: (B,), what rows are chosen by; at least 0.
    """

    classes: Int[Tensor, " batch"]
    confidence: Float[Tensor, " batch"]
    score: Float[Tensor, " batch"]


def votes(
    teacher: Float[Tensor, "batch classes"],
    student: Float[Tensor, "batch classes"] | None,
    *,
    teacher_share: float,
    score: ScoreName = "confidence",
) -> Votes:
    """Mix the predictions of both networks and score each row.

    Args:
        teacher: logits (B, K).
        student: logits (B, K); None where its share is 0.
        teacher_share: a in [0, 1] of p = a p_T + (1 - a) p_S.
        score: "confidence" is the largest of p; "energy" mixes log(1 + sum_k exp(logit_k)) of both,
            "logit-norm" the lengths of both centred logits: junk that a network is sure of by the
            softmax often has small logits.

    Returns:
        Without gradient.

    Raises:
        RecipeError: unknown score, or a share out of [0, 1].
        ContractError: the student has a share and no logits.
    """
    if score not in ("confidence", "energy", "logit-norm"):
        raise RecipeError(
            f"got score {score!r}, expected 'confidence', 'energy' or 'logit-norm'; the first is "
            "the usual one"
        )
    if not 0 <= teacher_share <= 1:
        raise RecipeError(f"got a teacher's share of {teacher_share}, expected a value in [0, 1]")
    logits = [(teacher.detach(), teacher_share)]
    if teacher_share < 1:
        if student is None:
            raise ContractError("got no logits of a student whose vote counts; ask it first")
        logits.append((student.detach(), 1 - teacher_share))
    probs = sum((share * F.softmax(one, 1) for one, share in logits), torch.zeros(()))
    confidence, classes = probs.max(1)
    if score == "energy":
        chosen = sum(
            (share * F.softplus(one.logsumexp(1)) for one, share in logits), torch.zeros(())
        )
    elif score == "logit-norm":
        centred = ((one - one.mean(1, keepdim=True), share) for one, share in logits)
        chosen = sum((share * one.norm(dim=1) for one, share in centred), torch.zeros(()))
    else:
        chosen = confidence
    return Votes(classes, confidence, chosen)


def top_shares(
    found: Votes, *, share: float, per_class: bool = True, quota: float = 0.0, floor: float = 0.0
) -> Bool[Tensor, " batch"]:
    """The best rows of a heap.

    Args:
        found: of all rows.
        share: r in (0, 1], kept of each class, rounded up.
        per_class: False keeps that share of all rows, whatever their class.
        quota: most rows kept of one class, in multiples of an even part of the r * B kept ones
            over the classes that were voted for; 0 is no limit.
        floor: least confidence.

    Returns:
        (B,) True for kept; never empty: where the floor takes all, the best tenth is kept.

    Raises:
        RecipeError: the share or the quota is out of its range.
    """
    if not 0 < share <= 1 or quota < 0:
        raise RecipeError(
            f"got share {share} and quota {quota}, expected a share in (0, 1] and a quota of at "
            "least 0"
        )
    classes = found.classes if per_class else torch.zeros_like(found.classes)
    counts = torch.bincount(classes)
    allowed = (share * counts).ceil()
    keep = _rank(found.score, classes) < allowed[classes]
    if quota:
        even = share * len(found.classes) / (torch.bincount(found.classes) > 0).sum()
        keep = _at_most(keep, found, (quota * even).ceil())
    return _never_empty(keep & (found.confidence >= floor), found.score)


def shuffled(rows: int, count: int, rng: torch.Generator) -> Int[Tensor, " count"]:
    """`count` numbers below `rows` at random, each as often as any other, or once more."""
    decks = [
        torch.randperm(rows, generator=rng, device=rng.device) for _ in range(-(-count // rows))
    ]
    return torch.cat(decks)[:count]


class InstanceSelector:
    """Keeps those rows of a batch that teacher and student are surer of than is usual for a class.

    The vote is p = a p_T + (1 - a) p_S. A row of class k = argmax p is kept where its score is at
    least `strictness` times m_k, the mean score of earlier rows of that class, and p_k at least
    `floor` / K. Where fewer than two are left, the best tenth (at least two) is kept.

    `student_batch` is the hook of a plug-in, and composes with plug-ins: it drops rows, and
    multiplies weights onto those that the batch has.

    Attributes:
        teacher_share: a, set by whoever runs it.
    """

    def __init__(
        self,
        student: nn.Module,
        num_classes: int,
        *,
        momentum: float = 0.99,
        strictness: float = 1.0,
        floor: float = 1.2,
        warm_rows: int = 50,
        score: ScoreName = "confidence",
        soft: bool = True,
        quota: float = 0.0,
    ) -> None:
        """Starts without having seen a row.

        Args:
            student: votes, in eval mode and without gradient.
            num_classes: K.
            momentum: of m_k, an exponential mean over the batches that hold class k, and a plain
                mean of these while they are fewer than 1 / (1 - momentum).
            strictness: rho; higher keeps less.
            floor: of the probability, in units of 1 / K.
            warm_rows: m_k counts as 1 / K for the score "confidence", as 0 for others, until so
                many rows of class k were seen.
            score: see `votes`.
            soft: weigh kept rows by their score, with mean 1; False weighs all by 1.
            quota: most rows of one class that a batch keeps, in multiples of B / K and rounded up;
                the best of them. 0 is no limit.
        """
        self.teacher_share = 1.0
        self._student = student
        self._momentum, self._strictness = momentum, strictness
        self._least = floor / num_classes
        self._start = 1 / num_classes if score == "confidence" else 0.0
        self._warm, self._score, self._soft = warm_rows, score, soft
        self._quota = quota / num_classes
        self._means = torch.zeros(num_classes)
        self._updates = torch.zeros(num_classes)
        self._seen = torch.zeros(num_classes)

    def student_batch(self, batch: Batch, record: Selection | None = None) -> Batch:
        """The rows worth learning from, weighted; without `extra["row"]`.

        Args:
            batch: with `inputs` and the teacher's logits as `extra["teacher"]`.
            record: is told of the look, if the batch holds row numbers as `extra["row"]`.
        """
        found = self.look(batch)
        keep = self.kept(found)
        self._learn(found)
        if record is not None and "row" in batch.extra:
            record.note(batch.extra["row"], keep)
        extra = {name: value for name, value in batch.extra.items() if name != "row"}
        return self.weighted(replace(batch, extra=extra).rows(keep), found.score[keep])

    def weighted(self, batch: Batch, scores: Float[Tensor, " batch"]) -> Batch:
        """The batch weighted by its scores, with mean 1, if weights are soft."""
        return batch.weighted(mean_one(scores)) if self._soft else batch

    def look(self, batch: Batch) -> Votes:
        """The votes on a batch with `inputs` and `extra["teacher"]`."""
        if "teacher" not in batch.extra:
            raise ContractError(
                "got a batch without the teacher's answers, expected its logits as extra['teacher']"
            )
        answer = None
        if self.teacher_share < 1:
            with torch.no_grad(), modes.evaluating(self._student):
                answer = predict(self._student, batch.inputs).logits
        return votes(
            batch.extra["teacher"],
            answer,
            teacher_share=self.teacher_share,
            score=self._score,
        )

    def look_through(self, batches: Iterable[Batch]) -> Votes:
        """The votes on all rows of several batches, in order."""
        found = [self.look(batch) for batch in batches]
        return Votes(
            torch.cat([one.classes for one in found]),
            torch.cat([one.confidence for one in found]),
            torch.cat([one.score for one in found]),
        )

    def kept(self, found: Votes) -> Bool[Tensor, " batch"]:
        """Which rows are kept, (B,), by what was learned of earlier batches; changes nothing."""
        asked = self._strictness * self.thresholds().to(found.score)[found.classes]
        keep = found.score >= asked - _ROUNDING * asked.abs()
        keep &= found.confidence >= self._least
        if self._quota:
            keep = _at_most(keep, found, math.ceil(self._quota * len(keep)))
        return _never_empty(keep, found.score)

    def thresholds(self) -> Float[Tensor, " classes"]:
        """m_k of all classes, (K,)."""
        return torch.where(self._seen < self._warm, self._start, self._means)

    def _learn(self, found: Votes) -> None:
        device, classes = found.score.device, found.classes
        means, updates, seen = (x.to(device) for x in (self._means, self._updates, self._seen))
        counts = torch.zeros_like(seen).index_add_(0, classes, torch.ones_like(found.score))
        sums = torch.zeros_like(means).index_add_(0, classes, found.score)
        there = counts > 0
        updates = updates + there
        rate = torch.maximum(1 / updates.clamp_min(1), updates.new_tensor(1 - self._momentum))
        now = sums / counts.clamp_min(1)
        self._means = torch.where(there, means + rate * (now - means), means)
        self._updates, self._seen = updates, seen + counts

    def state_dict(self) -> Mapping[str, Any]:
        """Means and counts of the classes."""
        return {"means": self._means, "updates": self._updates, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._means, self._updates = state["means"], state["updates"]
        self._seen = state["seen"]


class ChosenBatches:
    """Batches of a source's rows that are worth learning from, and a record of all looks.

    Attributes:
        record: how often each row was looked at and kept.
    """

    def __init__(
        self,
        source: Source,
        selector: InstanceSelector,
        answered: Callable[[Inputs, torch.Generator | None], Batch],
        *,
        batch_size: int,
    ) -> None:
        """Draws nothing.

        Args:
            source: with numbered rows.
            selector: chooses.
            answered: makes the batch that is learned from, or looked at where no generator is
                given: augmented if there is one, with the teacher's logits as `extra["teacher"]`.
            batch_size: rows that are looked at together.

        Raises:
            RecipeError: the rows of the source have no numbers.
        """
        if not isinstance(source, RowSource):
            raise RecipeError(
                f"got {type(source).__name__} {source.name!r}, whose rows have no numbers, as the "
                "images to choose from, expected images that somebody handed in; take a folder, a "
                "set or a tensor"
            )
        if batch_size > len(source):
            logger.warning(
                "batch_size is %d and %r holds %d rows, so every batch holds some twice; lower "
                "batch_size",
                batch_size,
                source.name,
                len(source),
            )
        self.record = Selection(len(source))
        self._source, self._selector, self._answered = source, selector, answered
        self._size = batch_size

    def drawn(self, count: int, rng: torch.Generator, *, select: bool = True) -> Iterator[Batch]:
        """`count` batches at random, of each what the selector keeps; all without `select`."""
        rows = len(self._source)
        for _ in range(count):
            index = torch.randint(rows, (self._size,), generator=rng, device=rng.device)
            batch = self._answered(self._source.rows(index), rng)
            if select:
                batch = replace(batch, extra={**batch.extra, "row": index})
                yield self._selector.student_batch(batch, self.record)
            else:
                self.record.note(index, torch.ones_like(index, dtype=torch.bool))
                yield batch

    def best(
        self, count: int, looks: int, rng: torch.Generator, choose: Callable[[Votes], Tensor]
    ) -> Iterator[Batch]:
        """`count` batches of the rows that `choose` keeps of `looks` batches, without augmentation.

        Each kept row turns up as often as any other, or once more.
        """
        looked = shuffled(len(self._source), looks * self._size, rng)
        parts = map(self._source.rows, looked.split(self._size))
        found = self._selector.look_through(self._answered(inputs, None) for inputs in parts)
        keep = choose(found)
        self.record.note(looked, keep)
        chosen, scores = looked[keep], found.score[keep]
        for order in shuffled(len(chosen), count * self._size, rng).split(self._size):
            batch = self._answered(self._source.rows(chosen[order]), rng)
            yield self._selector.weighted(batch, scores[order])


def mean_one(weights: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Weights (B,) of at least 0, divided by their mean; all 1 where all are 0."""
    mean = weights.mean()
    return torch.where(mean > 0, weights / mean, torch.ones_like(weights))


def _rank(score: Tensor, classes: Tensor) -> Tensor:
    """How many rows of its class come before each row, the best first and equal ones in order."""
    order = score.argsort(descending=True, stable=True)
    order = order[classes[order].argsort(stable=True)]
    counts = torch.bincount(classes)
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(score), device=score.device) - starts[classes[order]]
    return torch.empty_like(places).scatter_(0, order, places)


def _at_most(keep: Tensor, found: Votes, count: Tensor | int) -> Tensor:
    """Of the rows that are kept the best `count` of each class."""
    # The others rank behind all of them.
    score = torch.where(keep, found.score, found.score - found.score.max() - 1)
    return keep & (_rank(score, found.classes) < count)


def _never_empty(keep: Tensor, score: Tensor) -> Tensor:
    """`keep`, and the best rows besides where it holds fewer than two."""
    count = min(len(score), max(_FEWEST, math.ceil(_AT_LEAST * len(score))))
    best = torch.zeros_like(keep).scatter_(0, score.topk(count).indices, True)
    # A mask, since reading the number off the device would make every step wait for it.
    return keep | (best & (keep.sum() < _FEWEST))
