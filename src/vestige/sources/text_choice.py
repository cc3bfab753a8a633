"""Which of the texts that were written are learned from, with what targets."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core.filtering import Rule
from vestige.core.modes import evaluating
from vestige.core.texts import PAIR, to_bytes
from vestige.core.types import predict
from vestige.sources.text_pool import TextPool

logger = logging.getLogger(__name__)


class TextChoice:
    """Texts of a pool that a student learns from, and those that judge it on the way.

    Attributes:
        places: (N,) int64, numbers of records.
        labels: (N,) int64, what they are learned as.
        targets: (N, K), probabilities in place of the labels; (0, 0) where labels are taken.
        held: (N,) bool, texts that are not learned from but judge the student.
    """

    def __init__(self) -> None:
        self.places = torch.zeros(0, dtype=torch.long)
        self.labels = torch.zeros(0, dtype=torch.long)
        self.targets = torch.zeros(0, 0)
        self.held = torch.zeros(0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.places)

    def choose(self, pool: TextPool, names: Sequence[str], *, each: int, held_share: float) -> None:
        """Take `each` texts of every label, or as many as there are, and hold some of them back.

        Which ones depends on the texts alone and not on the order in which they were written.

        Raises:
            DataError: a label has no text; says what became of those that were asked for.
        """
        pool.check_any_kept("texts")
        places, labels, held = [], [], []
        for number, name in enumerate(names):
            own = pool.of_label(name)[:each]
            pool.check_any_kept("texts", name)
            if len(own) < each:
                logger.warning(
                    "got %d texts of the label %r, expected %d; the student sees fewer of it. Ask "
                    "for more rounds, or look at why the others were dropped",
                    *(len(own), name, each),
                )
            spared = min(round(held_share * len(own)), len(own) - 1)
            places += own
            labels += [number] * len(own)
            held += [True] * spared + [False] * (len(own) - spared)
        self.places, self.labels = torch.tensor(places), torch.tensor(labels)
        self.held = torch.tensor(held)
        self.targets = torch.zeros(0, 0)

    def keep(self, kept: Tensor) -> None:
        """Go on with the texts of `kept` (N,) bool alone."""
        self.places, self.labels = self.places[kept], self.labels[kept]
        self.held = self.held[kept]
        if len(self.targets):
            self.targets = self.targets[kept]

    def keep_believed(self, student: nn.Module, rows: Tensor, fraction: float) -> None:
        """Go on with the share of each label's texts that the student believes most.

        Args:
            student: a classifier.
            rows: of `rows`.
            fraction: in (0, 1].
        """
        kept = torch.zeros(len(self), dtype=torch.bool)
        shares = _answers(student, rows).softmax(1).gather(1, self.labels[:, None])[:, 0]
        for label in self.labels.unique().tolist():
            own = (self.labels == label).nonzero()[:, 0]
            kept[own] = Rule("high", keep_fraction=fraction).kept(shares[own])
        self.keep(kept)

    def judged(self, student: nn.Module, rows: Tensor) -> tuple[float, ...]:
        """Accuracy and minus the loss on the texts that are held back; () without any."""
        if not bool(self.held.any()):
            return ()
        logits, labels = _answers(student, rows[self.held.to(rows.device)]), self.labels[self.held]
        right = (logits.argmax(1) == labels).float().mean()
        return float(right), -float(functional.cross_entropy(logits, labels))

    def rows(self, pool: TextPool, length: int) -> Tensor:
        """The texts as rows of bytes (N, length); of pairs, the context is the first text."""
        return to_bytes([_text(pool, place) for place in self.places.tolist()], length)

    def state_dict(self) -> dict[str, Any]:
        """What was chosen."""
        names = ("places", "labels", "targets", "held")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name in self.state_dict():
            setattr(self, name, state[name].cpu())


def _answers(student: nn.Module, rows: Tensor) -> Tensor:
    """Logits (N, K) of a student in eval mode, on the CPU."""
    with evaluating(student), torch.no_grad():
        return torch.cat([predict(student, part).logits.cpu() for part in rows.split(256)])


def _text(pool: TextPool, place: int) -> str:
    record = pool.records[place]
    return record.text if not pool.pairs else f"{record.context or ''}{PAIR}{record.text}"
