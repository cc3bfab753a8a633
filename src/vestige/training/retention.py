"""How much of what a student could do it has forgotten at the end of a run.

A generator that moves on trains the student on a stream that changes, and nobody has test data to
see what is lost. So some inputs of earlier rounds are kept with the teacher's answers: how often
the student agreed with them when they were new, and how often it does at the end.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vestige.core import modes
from vestige.core.types import Inputs, Loss, count_rows, pick_rows, predict

_KEPT, _ROWS, _BYTES = 16, 128, 16 * 2**20


@dataclass(frozen=True)
class Early:
    """Inputs of one round.

    Attributes:
        inputs: (n, ...), in the teacher's normalised space, on the CPU.
        classes: (n,) or (n, ...), int64, the teacher's answers.
        agreed: share of them that the student gave, too, at the end of that round.
    """

    inputs: Inputs
    classes: Tensor
    agreed: float


class Retention:
    """Keeps new inputs of at most 16 rounds, evenly spaced whatever the length of the run.

    The student is asked in eval mode. Nothing is drawn by chance.
    """

    def __init__(self) -> None:
        self._seen: Loss | None = None
        self._kept: list[Early] = []
        self._stride = 1
        self._rounds = 0

    def observe(self, loss: Loss) -> None:
        """Take note of the newest student update; no copy. Not of sequences of tokens."""
        if loss.teacher is not None and loss.teacher.logits.dim() == 3:
            return
        if loss.inputs is not None and loss.teacher is not None:
            self._seen = loss

    def end_round(self, student: nn.Module | None) -> None:
        """Keep what was observed last in this round; nothing where there was nothing."""
        loss, self._seen = self._seen, None
        if loss is None or student is None or loss.inputs is None or loss.teacher is None:
            return
        if self._rounds % self._stride == 0 and (early := _early(loss, student)) is not None:
            self._kept.append(early)
            if len(self._kept) == _KEPT:
                del self._kept[1::2]
                self._stride *= 2
        self._rounds += 1

    def figures(self, student: nn.Module) -> dict[str, float] | None:
        """What became of the rounds before the last quarter; None for a run too short to tell.

        Returns:
            "then", the mean share of inputs on which `student` agreed with the teacher when they
            were new, "now", the same at this moment, "lost", their difference, and "rounds", how
            many were asked about.
        """
        early = self._kept[: len(self._kept) * 3 // 4]
        if len(early) < 3:
            return None
        then = sum(one.agreed for one in early) / len(early)
        now = sum(_agreement(student, one.inputs, one.classes) for one in early) / len(early)
        return {"then": then, "now": now, "lost": then - now, "rounds": float(len(early))}

    def state_dict(self) -> dict[str, Any]:
        """Everything that is kept; at a round's end, when checkpoints are written, all there is."""
        return {
            "kept": [astuple(one) for one in self._kept],
            "stride": self._stride,
            "rounds": self._rounds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._seen = None
        self._kept = [Early(*values) for values in state["kept"]]
        self._stride, self._rounds = int(state["stride"]), int(state["rounds"])


def _early(loss: Loss, student: nn.Module) -> Early | None:
    """The first new rows of an update, within the bounds of memory."""
    if loss.inputs is None or loss.teacher is None:
        return None
    inputs, classes = loss.inputs, loss.teacher.logits.argmax(1)
    if count_rows(inputs) != len(classes):
        return None
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    row = sum(one[0].numel() * one.element_size() for one in tensors)
    most = max(1, min(_ROWS, _BYTES // (_KEPT * max(1, row))))
    new = torch.arange(len(classes), device=classes.device)
    if loss.fresh is not None:
        new = loss.fresh.nonzero()[:, 0]
    if len(new) == 0:
        return None
    rows = pick_rows(inputs, new[:most])
    kept = rows.cpu() if isinstance(rows, Tensor) else {n: one.cpu() for n, one in rows.items()}
    answers = classes[new[:most]].cpu()
    return Early(kept, answers, _agreement(student, kept, answers))


def _agreement(student: nn.Module, inputs: Inputs, classes: Tensor) -> float:
    device = next((weight.device for weight in student.parameters()), torch.device("cpu"))
    if isinstance(inputs, Tensor):
        moved: Inputs = inputs.to(device)
    else:
        moved = {name: one.to(device) for name, one in inputs.items()}
    with torch.no_grad(), modes.evaluating(student):
        answers = predict(student, moved).logits.argmax(1)
    return float((answers.cpu() == classes).double().mean())
