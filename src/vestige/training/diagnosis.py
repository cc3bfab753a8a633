"""Tell, without any data, whether a run learns.

Everything comes from the batches that the student is trained on anyway: before an update the batch
is fresh, so the student's agreement with the teacher on it is an honest score, and the teacher's
answers on it tell which classes the source makes. Rows that a method replays are left out where it
says which they are (`Loss.fresh`).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vestige.core import modes
from vestige.core.functional import functional
from vestige.core.types import Inputs, Loss, predict

# Set on runs of adversarial and plain distillation of a digit classifier: healthy runs cover at
# least 95 % of the classes and drift by less than 5 % a round, collapsed ones cover at most 65 % or
# drift by more than 15 %. An adversarial source keeps agreement near 65 % though all is well.
_COVERED, _DRIFT, _AGREED, _SWING, _SAME_MODES = 0.75, 0.12, 0.5, 0.25, 0.8


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
        self._in_parts = False
        self._counts: Tensor | None = None
        self._agreed: Tensor | None = None
        # Updates with new rows; those that only replay tell no agreement.
        self._seen: int | Tensor = 0
        self._last_inputs: Inputs | None = None

    def observe(self, loss: Loss) -> None:
        """Take in one student update: its teacher's and student's predictions before the step."""
        if loss.teacher is None or loss.student is None:
            return
        teacher, student = loss.teacher.logits, loss.student.logits
        # Of sequences (B, T, V) nobody says here which tokens count; their methods tell themselves.
        if teacher.shape != student.shape or teacher.dim() in (0, 1, 3):
            return
        if teacher.shape[1] != self.num_classes:
            return
        answers = teacher.argmax(1)
        self._in_parts = answers.dim() > 1
        if self._counts is None or self._agreed is None:
            self._counts = answers.new_zeros(self.num_classes, dtype=torch.float64)
            self._agreed = self._counts.new_zeros(())
        same = answers == student.argmax(1)
        counted = torch.ones_like(answers, dtype=torch.float64)
        if loss.fresh is None:
            self._agreed += same.double().mean()
            self._seen = self._seen + 1
        else:
            # A product, not a selection: how many rows are left must not be read off the device.
            counted = counted * loss.fresh.view(-1, *(1,) * (answers.dim() - 1))
            self._agreed += (same * counted).sum() / counted.sum().clamp_min(1)
            self._seen = self._seen + loss.fresh.any()
        self._counts.scatter_add_(0, answers.flatten(), counted.flatten())
        self._last_inputs = loss.inputs

    def end_round(self, student: nn.Module | None) -> RoundRecord | None:
        """Close the round; returns what was seen.

        None if no student update offered predictions, or none on new inputs.
        """
        if self._counts is None or self._agreed is None:
            return None
        updates = int(self._seen)
        if not updates:
            self._forget()
            return None
        record = RoundRecord(
            float(self._agreed) / updates,
            tuple(int(count) for count in self._counts.tolist()),
            None
            if student is None or self._last_inputs is None
            else train_eval_agreement(student, self._last_inputs),
        )
        self.records.append(record)
        self._forget()
        return record

    def coverage(self) -> dict[str, float] | None:
        """Which classes the inputs of the whole run were of, by the teacher's answers.

        Returns:
            "largest", the share in (0, 1] of the class that it answered most, and "effective", the
            exponential of the entropy of all shares: K where all are as frequent. None where no
            update offered predictions.
        """
        if not self.records:
            return None
        counts = torch.tensor([one.classes for one in self.records], dtype=torch.float64).sum(0)
        shares = counts / counts.sum().clamp_min(1)
        entropy = -torch.special.xlogy(shares, shares).sum()
        return {"largest": float(shares.max()), "effective": float(entropy.exp())}

    def state_dict(self) -> Mapping[str, Any]:
        """The records; at a round's end, when checkpoints are written, nothing is pending."""
        return {
            "records": [list(asdict(record).values()) for record in self.records],
            "in_parts": self._in_parts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the records of an earlier part of the run."""
        self.records = [RoundRecord(a, tuple(c), t) for a, c, t in state["records"]]
        # Absent in checkpoints from before there were such tasks.
        self._in_parts = bool(state.get("in_parts", False))
        self._forget()

    def _forget(self) -> None:
        self._counts = self._agreed = self._last_inputs = None
        self._seen = 0

    def findings(self, settings: Collection[str] | None = None) -> list[Finding]:
        """What the run shows after its first quarter; empty for a run too short to judge.

        Args:
            settings: names of the method's settings, so that only knobs that exist are named; None
                names all.
        """
        records = self.records[len(self.records) // 4 :]
        if len(self.records) < 4:
            return []
        found = [
            (code, message)
            for code, check in _CHECKS.items()
            # Parts of an input, such as pixels, are of few classes in real data, too.
            if not (self._in_parts and code == _OF_WHOLE_INPUTS)
            if (message := check(records)) is not None
        ]
        return [Finding(code, "warning", text, _knob(code, settings)) for code, text in found]


def train_eval_agreement(student: nn.Module, inputs: Inputs) -> float:
    """Share of `inputs` that get the same class in train and in eval mode.

    Neither the live running statistics nor the training flags are changed.
    """
    first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
    devices = [first.device] if first.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        # At the flags it is trained with: a BatchNorm that the user froze stays frozen.
        training = predict(functional(student, {}), inputs).logits.argmax(1)
        with modes.evaluating(student):
            evaluated = predict(student, inputs).logits.argmax(1)
    return float((training == evaluated).double().mean())


def _shares(record: RoundRecord) -> Tensor:
    counts = torch.tensor(record.classes, dtype=torch.float64)
    return counts / counts.sum().clamp_min(1)


def _few_classes(records: Sequence[RoundRecord]) -> str | None:
    shares = torch.stack([_shares(record) for record in records])
    effective = float(torch.exp(-torch.special.xlogy(shares, shares).sum(1)).mean())
    classes = shares.shape[1]
    # With few inputs per class a sample of an even source looks uneven, too.
    if min(sum(record.classes) for record in records) < 5 * classes:
        return None
    if effective >= _COVERED * classes:
        return None
    return (
        f"within a round the inputs cover about {effective:.1f} of {classes} classes, by the "
        f"teacher's answers (most often class {int(shares.mean(0).argmax())})"
    )


def _wandering(records: Sequence[RoundRecord]) -> str | None:
    shares = torch.stack([_shares(record) for record in records])
    if len(shares) < 2:
        return None
    drift = float(0.5 * (shares[1:] - shares[:-1]).abs().sum(1).mean())
    inputs = max(1, min(sum(record.classes) for record in records))
    # What two samples of one even source differ by on average.
    chance = math.sqrt(shares.shape[1] / (math.pi * inputs))
    if drift < _DRIFT + chance:
        return None
    return (
        f"from one round to the next {drift:.0%} of the inputs move to other classes, so the "
        "student forgets what it saw before"
    )


def _low_agreement(records: Sequence[RoundRecord]) -> str | None:
    mean = sum(record.agreement for record in records) / len(records)
    if mean >= _AGREED:
        return None
    return f"on fresh inputs the student gives the teacher's class for only {mean:.0%}"


def _swinging_agreement(records: Sequence[RoundRecord]) -> str | None:
    values = [record.agreement for record in records]
    if max(values) - min(values) < _SWING:
        return None
    return (
        f"agreement with the teacher on fresh inputs swings between {min(values):.0%} and "
        f"{max(values):.0%}, so where the run happens to end decides the result"
    )


def _modes_differ(records: Sequence[RoundRecord]) -> str | None:
    values = [r.train_eval_agreement for r in records if r.train_eval_agreement is not None]
    if not values or sum(values) / len(values) >= _SAME_MODES:
        return None
    return (
        "in train and in eval mode the student gives the same class for only "
        f"{sum(values) / len(values):.0%} of its inputs, so its BatchNorm statistics do not fit"
    )


_CHECKS: Mapping[str, Callable[[Sequence[RoundRecord]], str | None]] = {
    "few-classes": _few_classes,
    "wandering-source": _wandering,
    "low-agreement": _low_agreement,
    "swinging-agreement": _swinging_agreement,
    "modes-differ": _modes_differ,
}
_OF_WHOLE_INPUTS = "few-classes"
# Each with the setting that it turns; those that a method lacks are not named.
_BN = ("bn_weight", "raise config.bn_weight (for example to 1, with relative units to 10)")
_BALANCE = ("balance_weight", "raise config.balance_weight (for example to 1)")
_REPLAY = ("replay", "set config.replay (for example to 0.5)")
_KNOBS: Mapping[str, Sequence[tuple[str, str]]] = {
    "few-classes": (_BN, _BALANCE),
    "wandering-source": (_BN, _REPLAY, ("generator_lr", "lower config.generator_lr")),
    "low-agreement": (
        ("rounds", "train longer (config.rounds)"),
        ("student_lr", "change config.student_lr"),
        ("student_steps", "raise config.student_steps"),
    ),
    "swinging-agreement": (_BN, _REPLAY, ("schedule", "let the rates decay (config.schedule)")),
    "modes-differ": (("batch_size", "raise config.batch_size"),),
}


def _knob(code: str, settings: Collection[str] | None) -> str:
    known = [text for name, text in _KNOBS[code] if settings is None or name in settings]
    if not known:
        return "take other inputs or another method"
    if known[0] == _BN[1] and len(known) > 1:
        # Measured in benchmarks/claims/dfad-remedies.json, on networks with BatchNorm.
        return f"{known[0]}; other knobs, which alone did not help where we measured: " + (
            ", ".join(known[1:])
        )
    return " or ".join(known)
