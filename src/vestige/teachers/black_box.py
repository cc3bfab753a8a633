"""A teacher that only answers questions, and counts them."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core import parallel
from vestige.core.types import Access, Prediction
from vestige.errors import AccessError, QueryBudgetExceeded, ShapeError, TeacherError
from vestige.teachers.journal import Journal


class BlackBoxTeacher:
    """Answers without gradient, within a budget of queries; one input is one query.

    Args:
        model: a network, which is put into eval mode, or any callable that takes inputs (B, ...)
            and returns what `Prediction.of` understands.
        access: Access.SCORES answers with the scores (B, K) as the model gives them;
            Access.LABELS only with the best class, as one-hot float32 (B, K), so that both
            levels have one shape and `argmax` reads the label of either.
        budget: queries that may be asked in all; None sets no limit.
        num_classes: K; only needed where `model` answers with class numbers (B,) itself.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        *,
        access: Access = Access.SCORES,
        budget: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        if access not in (Access.SCORES, Access.LABELS):
            raise AccessError(
                f"got access '{access}' for a black-box teacher, expected 'scores' or 'labels'; "
                "use WhiteBoxTeacher for full access"
            )
        if budget is not None and budget < 1:
            raise TeacherError(f"got budget={budget}, expected at least 1 query or None (no limit)")
        self.access = Access(access)
        self.budget = budget
        self.queries = 0
        self._num_classes = num_classes
        self._journal: Journal | None = None
        self._model = model.eval() if isinstance(model, nn.Module) else model

    @property
    def module(self) -> NoReturn:
        """Not to be had.

        Raises:
            AccessError: always.
        """
        raise AccessError(
            f"got a request for the network of a teacher with access '{self.access}', expected "
            "access 'white_box'; use a method that works with answers alone or WhiteBoxTeacher"
        )

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Prediction:
        """Answers to inputs (B, ...), without gradient, on the device of the inputs.

        Raises:
            QueryBudgetExceeded: B is more than what is left; nothing was asked or counted.
        """
        count = parallel.rows_of_all(len(inputs))
        journal, known = self._journal, None
        if journal is not None:
            known = journal.find(self.queries, inputs)
            if known is None:
                # Asked before the run was killed, and of no use for what it asks now.
                self.queries += journal.lost(self.queries)
        self.check_budget(count)
        before = self.queries
        # Counted before asking: an API charges a request whose answer is lost on the way, too.
        self.queries += count
        if known is not None:
            return Prediction(known.to(inputs.device))
        if journal is not None:
            journal.ask(before, count, inputs)
        answer = parallel.once(partial(self._ask, inputs.detach()))
        if journal is not None:
            journal.answered(before, inputs, answer)
        return Prediction(answer.to(inputs.device))

    def _ask(self, inputs: Tensor) -> Tensor:
        return self._scores(self._model(inputs.to(self._device(inputs))))

    def keep_answers(self, path: Path, *, resume: bool) -> None:
        """Keep answers in a file, so that steps which a kill makes be repeated are not asked twice.

        A question that is repeated in its place is answered from the file and counted as it was.
        One that is not, because the resumed run computes something else, is asked and counted
        again on top of what was spent. Several processes keep nothing.

        Args:
            path: of the file.
            resume: use what it holds; else it is emptied.
        """
        if self._journal is not None:
            self._journal.close()
        self._journal = Journal(path, resume=resume) if parallel.world() == 1 else None

    def checkpointed(self) -> None:
        """Answers from before the checkpoint before this one need not be kept."""
        if self._journal is not None:
            self._journal.checkpointed(self.queries)

    def check_budget(self, count: int) -> None:
        """Refuse `count` further queries if the budget does not hold them; asks nothing.

        Raises:
            QueryBudgetExceeded: `count` is more than what is left.
        """
        if self.budget is not None and self.queries + count > self.budget:
            raise QueryBudgetExceeded(
                f"got a batch of {count} queries, expected at most "
                f"{self.budget - self.queries}: {self.queries} of {self.budget} are used; raise "
                "the budget or ask less"
            )

    def state_dict(self) -> dict[str, Any]:
        """The number of queries so far, so that a resumed run cannot start counting anew."""
        return {"queries": self.queries}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.queries = int(state["queries"])

    def _scores(self, answer: Any) -> Tensor:
        scores = Prediction.of(answer).logits.detach()
        if scores.is_floating_point():
            if self.access is Access.SCORES:
                return scores
            best, count = scores.argmax(1), scores.shape[1]
        elif self.access is Access.LABELS and self._num_classes is not None:
            best, count = scores.long(), self._num_classes
        else:
            raise ShapeError(
                f"got answers of dtype {scores.dtype} and shape {tuple(scores.shape)}, expected "
                "floating-point scores (B, K); for a model that names classes set access='labels' "
                "and num_classes"
            )
        return functional.one_hot(best, count).movedim(-1, 1).float()

    def _device(self, inputs: Tensor) -> torch.device:
        if isinstance(self._model, nn.Module):
            for tensor in (*self._model.parameters(), *self._model.buffers()):
                return tensor.device
        return inputs.device
