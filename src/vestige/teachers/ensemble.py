"""Several networks with the same classes as one teacher."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core import parallel
from vestige.core.protocols import KeepsAnswers, Teacher
from vestige.core.types import Access, Prediction, count_rows
from vestige.errors import AccessError, ShapeError, TeacherError
from vestige.teachers.black_box import BlackBoxTeacher
from vestige.teachers.white_box import WhiteBoxTeacher

Combine = Literal["logits", "probabilities"]


def combine_logits(answers: Sequence[Tensor], combine: Combine, shares: Sequence[float]) -> Tensor:
    """One answer out of several.

    Args:
        answers: logits of each member, all (B, K), (B, K, H, W) or (B, T, V); gradient flows.
        combine: "logits" is their weighted mean; "probabilities" the logarithm of the weighted
            mean of their softmax, so that the softmax of the result is that mean.
        shares: one weight per member, which sum to 1.

    Returns:
        The same shape, in at least float32 for "probabilities".

    Raises:
        ShapeError: the answers differ in shape.
    """
    shapes = [tuple(answer.shape) for answer in answers]
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ShapeError(
                f"got answers of shape {shape} from member {index} of an ensemble, expected "
                f"{shapes[0]} as from member 0; all members must know the same classes"
            )
    if combine == "logits":
        return torch.stack([share * a for share, a in zip(shares, answers, strict=True)]).sum(0)
    dim = 2 if answers[0].dim() == 3 else 1
    logs = [
        functional.log_softmax(answer, dim, dtype=torch.promote_types(answer.dtype, torch.float32))
        + math.log(share)
        for share, answer in zip(shares, answers, strict=True)
    ]
    return torch.logsumexp(torch.stack(logs), 0)


class CombinedNetwork(nn.Module):
    """Several networks that answer together, as one network.

    Args:
        members: from inputs to what `Prediction.of` understands; all with the same classes.
        combine: see `combine_logits`.
        weights: one positive number per member, scaled to sum to 1; None weighs all alike.

    Raises:
        TeacherError: no members, another number of weights, or weights that are not positive.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        combine: Combine = "logits",
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.shares = _shares(members, combine, weights)
        self.combine = combine
        self.members = nn.ModuleList(members)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Combined logits for inputs (B, ...), taken as the members take them."""
        answers = [Prediction.of(member(*inputs, **named)).logits for member in self.members]
        return combine_logits(answers, self.combine, self.shares)


class Ensemble(WhiteBoxTeacher):
    """A white-box teacher out of several networks; arguments and errors as `CombinedNetwork`.

    Its members are its sub-modules, so probes see the BatchNorm layers of all of them.

    Attributes:
        queries: rows that the members were asked so far; one input asks every member.
        gradients: likewise of `WhiteBoxTeacher`.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        combine: Combine = "logits",
        weights: Sequence[float] | None = None,
    ) -> None:
        for index, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise AccessError(
                    f"got {type(member).__name__} as member {index} of an Ensemble, expected a "
                    "network; take BlackBoxEnsemble for members that only answer"
                )
        super().__init__(CombinedNetwork(members, combine=combine, weights=weights))
        self._size = len(members)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Prediction:
        """Prediction for inputs (B, ...), attached to them."""
        answer = super().forward(*inputs, **named)
        rows = parallel.rows_of_all(count_rows(inputs[0] if inputs else named))
        self.queries += (self._size - 1) * rows
        self.gradients += (self._size - 1) * (rows if answer.logits.requires_grad else 0)
        return answer


class BlackBoxEnsemble:
    """Several teachers that only answer, as one.

    With access "scores" the answers are combined as in `combine_logits`. With access "labels" the
    members vote with their weights, and the answer is the winner, the lowest class of a tie, as
    one-hot.

    Args:
        members: black boxes, each with a budget of its own; or white boxes beside those that show
            scores, which then show no more than these.
        combine: see `combine_logits`; votes are counted the same either way.
        weights: as for `CombinedNetwork`.

    Attributes:
        access: the least access level of the members.
        queries: rows that the members were asked through this ensemble.

    Raises:
        TeacherError: as `CombinedNetwork`.
        AccessError: some members show labels only and others do not.
    """

    def __init__(
        self,
        members: Sequence[Teacher],
        *,
        combine: Combine = "logits",
        weights: Sequence[float] | None = None,
    ) -> None:
        self._shares = _shares(members, combine, weights)
        self._combine = combine
        self.members = list(members)
        votes = [member.access is Access.LABELS for member in members]
        if any(votes) and not all(votes):
            raise AccessError(
                f"got members with the access {[str(one.access) for one in members]}, expected "
                "labels of all or scores of all; votes and scores cannot be averaged"
            )
        self.access = Access.LABELS if all(votes) else Access.SCORES
        self.queries = 0

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Prediction:
        """Answers to inputs (B, ...), without gradient.

        Raises:
            QueryBudgetExceeded: B is more than what is left to a member; no member was asked.
        """
        count = parallel.rows_of_all(len(inputs))
        for member in self.members:
            if isinstance(member, BlackBoxTeacher):
                member.check_budget(count)
        answers = []
        for member in self.members:
            before = getattr(member, "queries", None)
            answers.append(member(inputs).logits)
            # A member's own count, which knows of what was paid for in vain.
            self.queries += count if before is None else getattr(member, "queries", 0) - before
        if self.access is Access.SCORES:
            return Prediction(combine_logits(answers, self._combine, self._shares))
        votes = combine_logits(answers, "logits", self._shares)
        winners = functional.one_hot(votes.argmax(1), votes.shape[1])
        return Prediction(winners.movedim(-1, 1).float())

    def keep_answers(self, path: Path, *, resume: bool) -> None:
        """As of `BlackBoxTeacher`, one file per member beside `path`."""
        for index, member in enumerate(self.members):
            if isinstance(member, KeepsAnswers):
                member.keep_answers(path.with_name(f"{path.name}-{index}"), resume=resume)

    def checkpointed(self) -> None:
        """As of `BlackBoxTeacher`."""
        for member in self.members:
            if isinstance(member, KeepsAnswers):
                member.checkpointed()

    def state_dict(self) -> dict[str, Any]:
        """The numbers of queries so far, its own and each member's."""
        asked = [getattr(member, "queries", 0) for member in self.members]
        return {"queries": self.queries, "members": asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.queries = int(state["queries"])
        for member, queries in zip(self.members, state["members"], strict=True):
            if hasattr(member, "queries"):
                member.queries = int(queries)


def _shares(
    members: Sequence[Any], combine: str, weights: Sequence[float] | None
) -> tuple[float, ...]:
    if combine not in get_args(Combine):
        raise TeacherError(
            f"got combine '{combine}' for an ensemble, expected {' or '.join(get_args(Combine))}"
        )
    if not members:
        raise TeacherError("got an ensemble without members, expected at least one; name them")
    given = [1.0] * len(members) if weights is None else [float(value) for value in weights]
    if len(given) != len(members) or not all(0 < value < float("inf") for value in given):
        raise TeacherError(
            f"got the weights {given} for an ensemble of {len(members)}, expected one positive "
            "number per member; leave out members that shall not count"
        )
    return tuple(value / sum(given) for value in given)
