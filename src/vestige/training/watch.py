"""What the steps of a run showed: losses, scores, the latest inputs, and what they tell."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from vestige.core.protocols import Progress, Task
from vestige.core.types import (
    Inputs,
    Loss,
    Step,
    at_least_float32,
    join_rows,
    pick_rows,
)
from vestige.errors import NonFiniteLossError
from vestige.training.diagnosis import Diagnosis, RoundRecord
from vestige.training.made import Made
from vestige.training.moments import NO_CLASS, Moments
from vestige.training.retention import Retention
from vestige.training.tracking.metrics import MetricsFile

_TOTALS = 1024
_SAMPLE_BATCHES, _SAMPLE_ROWS, _SAMPLE_BYTES = 8, 64, 16 * 2**20


class Watch:
    """Looks at each step without waiting for the device, and writes down what it saw in `log`.

    Args:
        task: says how many classes there are and what one input is.

    Attributes:
        diagnosis: of the student's updates.
        moments: inputs over time.
        retention: what the student still knows of earlier inputs.
        made: how many inputs were made for the student.
        scores: one entry per evaluation, "step" and the metrics.
        student_steps: number of student updates.
    """

    def __init__(self, task: Task) -> None:
        self.diagnosis = Diagnosis(task.num_classes)
        self.moments = Moments(task.spec)
        self.retention = Retention()
        self.made = Made()
        self.scores: list[dict[str, float]] = []
        self.student_steps = 0
        self._samples: list[tuple[Inputs, Tensor]] = []
        self._pending: dict[str, Loss] = {}
        self._totals: list[tuple[int, Tensor]] = []
        self._bad_step = -1

    def observe(self, step: Step, number: int) -> None:
        """Take note of the step; `number` counts those of the run."""
        self.student_steps += step.role == "student"
        if step.loss is None:
            return
        # Looked at together: one small operation a step is one too many for small networks.
        self._totals.append((number, step.loss.total))
        if len(self._totals) == _TOTALS:
            self._look()
        self._pending[step.role] = step.loss
        if step.role == "student":
            self.diagnosis.observe(step.loss)
            self.retention.observe(step.loss)
            self.made.observe(step.loss)

    def log(
        self, metrics: MetricsFile, progress: Progress, seconds: float, kept_step: int
    ) -> dict[str, dict[str, float]]:
        """Write the latest losses into the curves.

        Args:
            metrics: gets a row for each role.
            progress: of the run.
            seconds: of the run.
            kept_step: of the last checkpoint, for the message.

        Returns:
            Loss terms by role.

        Raises:
            NonFiniteLossError: a loss became NaN or infinite since the last call.
        """
        self._look()
        if self._bad_step >= 0:
            raise NonFiniteLossError(
                f"the loss became NaN or infinite at step {self._bad_step}, expected a finite one; "
                "lower the learning rates or set a gradient clip. The last checkpoint, at step "
                f"{kept_step}, is kept"
            )
        written: dict[str, dict[str, float]] = {}
        for role, loss in self._pending.items():
            written[role] = {name: float(term) for name, term in loss.terms.items()}
            metrics.add(
                "step",
                step=progress.steps,
                role=role,
                loop=progress.loop,
                round=progress.round,
                seconds=round(seconds, 3),
                terms=written[role],
                total=float(loss.total),
            )
        student = self._pending.get("student")
        if student is not None:
            self._keep_samples(student)
        self._pending.clear()
        return written

    def _look(self) -> None:
        """Find the first step since the last call whose loss was not finite."""
        if self._totals and self._bad_step < 0:
            sound = torch.isfinite(torch.stack([total for _, total in self._totals]))
            if not bool(sound.all()):
                self._bad_step = self._totals[int((~sound).nonzero()[0])][0]
        self._totals.clear()

    def _keep_samples(self, loss: Loss) -> None:
        """Remember some of the latest inputs for the contact sheet, at a bounded size."""
        inputs, teacher = loss.inputs, loss.teacher
        if teacher is None or inputs is None or teacher.logits.dim() < 2:
            return
        parts = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
        row = sum(part[0].numel() * part.element_size() for part in parts)
        rows = max(1, min(_SAMPLE_ROWS, _SAMPLE_BYTES // (_SAMPLE_BATCHES * row)))
        # Copies: a slice would keep the whole batch alive.
        first = pick_rows(inputs, slice(rows))
        kept: Inputs
        if isinstance(first, Tensor):
            kept = at_least_float32(first.clone())
        else:
            kept = {name: at_least_float32(part.clone()) for name, part in first.items()}
        logits = teacher.logits[:rows]
        whole = logits.dim() == 2
        classes = logits.argmax(1) if whole else logits.new_full((len(logits),), NO_CLASS).long()
        if self._samples and not _alike(self._samples[-1][0], kept):
            self._samples.clear()
        self._samples.append((kept, classes))
        del self._samples[:-_SAMPLE_BATCHES]
        if isinstance(kept, Tensor):
            self.moments.observe(kept, classes)

    def end_round(
        self, student: nn.Module | None, metrics: MetricsFile, progress: Progress, seconds: float
    ) -> RoundRecord | None:
        """What the round showed, as a row of the metrics; None without student updates."""
        self.moments.end_round(progress.loop, progress.round, progress.steps)
        self.retention.end_round(student)
        record = self.diagnosis.end_round(student)
        if record is not None:
            metrics.add(
                "round",
                loop=progress.loop,
                round=progress.round,
                step=progress.steps,
                seconds=round(seconds, 3),
                agreement=record.agreement,
                classes=record.classes,
                train_eval_agreement=record.train_eval_agreement,
            )
        return record

    def latest_samples(self) -> tuple[Inputs, Tensor] | None:
        """(inputs, the teacher's classes) of the latest student batches, on the CPU, or None.

        The classes are `NO_CLASS` where the teacher answers for each part of an input.
        """
        if not self._samples:
            return None
        inputs, classes = zip(*self._samples, strict=True)
        # Those of an earlier part of the run were read back to the CPU.
        return reduce(join_rows, map(_on_cpu, inputs)), torch.cat([x.cpu() for x in classes])

    def state_dict(self) -> dict[str, Any]:
        """Everything that is kept; at a round's end, after `log`, all there is."""
        return {
            "diagnosis": self.diagnosis.state_dict(),
            "scores": self.scores,
            "samples": self._samples,
            "moments": self.moments.state_dict(),
            "retention": self.retention.state_dict(),
            "made": self.made.state_dict(),
            "student_steps": self.student_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.diagnosis.load_state_dict(state["diagnosis"])
        self.scores[:] = state["scores"]
        self._samples = state["samples"]
        self.moments.load_state_dict(state["moments"])
        self.retention.load_state_dict(state["retention"])
        self.made.load_state_dict(state["made"])
        self.student_steps = int(state["student_steps"])


def _on_cpu(inputs: Inputs) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.cpu()
    return {name: part.cpu() for name, part in inputs.items()}


def _alike(first: Inputs, second: Inputs) -> bool:
    """Whether inputs can be told in one batch: texts and audio may differ in length."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return type(first) is type(second) and _shapes(first) == _shapes(second)
    return first.keys() == second.keys() and _shapes(first) == _shapes(second)


def _shapes(inputs: Inputs) -> list[tuple[int, ...]]:
    parts = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    return [tuple(part.shape[1:]) for part in parts]
