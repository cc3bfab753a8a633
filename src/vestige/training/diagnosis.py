"""Tell, without any data, whether a run learns.

Everything comes from the batches that the student is trained on anyway: before an update the batch
is fresh, so the student's agreement with the teacher on it is an honest score, and the teacher's
answers on it tell which classes the source makes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vestige.core.functional import functional
from vestige.core.types import Loss, predict


@dataclass(frozen=True)
class Finding:
    """One thing that was noticed: what it is, what it means and the knob to turn."""

    code: str
    level: str
    message: str
    knob: str

    def as_dict(self) -> dict[str, str]:
        """Plain strings for summary.json."""
        return asdict(self)


@dataclass(frozen=True)
class RoundRecord:
    """What was seen in one round.

    Attributes:
        agreement: share of fresh inputs on which student and teacher gave the same class.
        classes: how often the teacher answered each class, (K,).
        train_eval_agreement: share of the last inputs on which the student gives the same class in
            train and in eval mode; None where it was not measured.
    """

    agreement: float
    classes: tuple[int, ...]
    train_eval_agreement: float | None = None


class Diagnosis:
    """Collects over a round, without reading a value off the device, and judges at the end."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.records: list[RoundRecord] = []
        self._counts: Tensor | None = None
        self._agreed: Tensor | None = None
        self._seen = 0
        self._last_inputs: Tensor | None = None

    def observe(self, loss: Loss) -> None:
        """Take in one student update: its teacher's and student's predictions before the step."""
        if loss.teacher is None or loss.student is None:
            return
        teacher, student = loss.teacher.logits, loss.student.logits
        if teacher.shape != student.shape or teacher.dim() < 2:
            return
        if teacher.shape[1] != self.num_classes:
            return
        answers = teacher.argmax(1)
        agreed = (answers == student.argmax(1)).double().mean()
        counts = torch.zeros(self.num_classes, dtype=torch.float64, device=answers.device)
        counts.scatter_add_(
            0, answers.flatten(), torch.ones_like(answers.flatten(), dtype=torch.float64)
        )
        self._counts = counts if self._counts is None else self._counts + counts
        self._agreed = agreed if self._agreed is None else self._agreed + agreed
        self._seen += 1
        self._last_inputs = loss.inputs

    def end_round(self, student: nn.Module | None) -> RoundRecord | None:
        """Close the round; returns what was seen, None if no student update offered predictions."""
        if self._counts is None or self._agreed is None:
            return None
        record = RoundRecord(
            float(self._agreed) / self._seen,
            tuple(int(count) for count in self._counts.tolist()),
            None
            if student is None or self._last_inputs is None
            else train_eval_agreement(student, self._last_inputs),
        )
        self.records.append(record)
        self._counts = self._agreed = self._last_inputs = None
        self._seen = 0
        return record

    def state_dict(self) -> Mapping[str, Any]:
        """The records; at a round's end, when checkpoints are written, nothing is pending."""
        return {"records": [list(asdict(record).values()) for record in self.records]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the records of an earlier part of the run."""
        self.records = [RoundRecord(a, tuple(c), t) for a, c, t in state["records"]]
        self._counts = self._agreed = self._last_inputs = None
        self._seen = 0

    def findings(self) -> list[Finding]:
        """What the second half of the run shows; empty for a run too short to judge."""
        records = self.records[len(self.records) // 2 :]
        if len(self.records) < 4 or self.num_classes < 2:
            return []
        checks: Sequence[Callable[[Sequence[RoundRecord]], Finding | None]] = (
            _few_classes,
            _wandering,
            _low_agreement,
            _swinging_agreement,
            _modes_differ,
        )
        return [finding for check in checks if (finding := check(records)) is not None]


def train_eval_agreement(student: nn.Module, inputs: Tensor) -> float:
    """Share of `inputs` that get the same class in train and in eval mode.

    Neither the live running statistics nor the training flags are changed.
    """
    flags = {module: module.training for module in student.modules()}
    devices = [inputs.device] if inputs.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            # At the flags it is trained with: a BatchNorm that the user froze stays frozen.
            training = predict(functional(student, {}), inputs).logits.argmax(1)
            student.eval()
            evaluated = predict(student, inputs).logits.argmax(1)
    finally:
        for module, flag in flags.items():
            module.training = flag
    return float((training == evaluated).double().mean())


def _shares(record: RoundRecord) -> Tensor:
    counts = torch.tensor(record.classes, dtype=torch.float64)
    return counts / counts.sum().clamp_min(1)


def _few_classes(records: Sequence[RoundRecord]) -> Finding | None:
    shares = torch.stack([_shares(record) for record in records])
    effective = torch.exp(-torch.special.xlogy(shares, shares).sum(1)).mean()
    classes = shares.shape[1]
    if effective >= 0.5 * classes:
        return None
    top = int(shares.mean(0).argmax())
    return Finding(
        "few-classes",
        "warning",
        f"the inputs cover about {float(effective):.1f} of {classes} classes within a round, by "
        f"the teacher's answers (most often class {top}); the source has collapsed",
        "raise config.balance_weight (for example to 1) or config.bn_weight (for example to 1)",
    )


def _wandering(records: Sequence[RoundRecord]) -> Finding | None:
    shares = torch.stack([_shares(record) for record in records])
    if len(shares) < 2:
        return None
    drift = float(0.5 * (shares[1:] - shares[:-1]).abs().sum(1).mean())
    if drift < 0.35:
        return None
    return Finding(
        "wandering-source",
        "warning",
        f"from one round to the next {drift:.0%} of the inputs move to other classes; the student "
        "forgets what it saw before",
        "set config.replay (for example to 0.5), raise config.bn_weight, or lower "
        "config.generator_lr",
    )


def _low_agreement(records: Sequence[RoundRecord]) -> Finding | None:
    mean = sum(record.agreement for record in records) / len(records)
    if mean >= 0.5:
        return None
    return Finding(
        "low-agreement",
        "warning",
        f"on fresh inputs the student gives the teacher's class for only {mean:.0%}",
        "train longer (config.rounds), raise config.student_steps or config.student_lr, "
        "or take a larger student",
    )


def _swinging_agreement(records: Sequence[RoundRecord]) -> Finding | None:
    values = [record.agreement for record in records]
    if max(values) - min(values) < 0.25:
        return None
    return Finding(
        "swinging-agreement",
        "warning",
        f"agreement on fresh inputs swings between {min(values):.0%} and {max(values):.0%}; where "
        "the run happens to end decides the result",
        "set config.replay, raise config.bn_weight, or let the rates decay "
        "(config.schedule: cosine)",
    )


def _modes_differ(records: Sequence[RoundRecord]) -> Finding | None:
    values = [r.train_eval_agreement for r in records if r.train_eval_agreement is not None]
    if not values or sum(values) / len(values) >= 0.8:
        return None
    return Finding(
        "modes-differ",
        "warning",
        f"in train and in eval mode the student gives the same class for only "
        f"{sum(values) / len(values):.0%} of its training inputs; its BatchNorm statistics do not "
        "fit what it will see",
        "raise config.batch_size, or set config.student_mode: eval for the source's step",
    )
