"""Classification: one label per input, judged by accuracy."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core.types import InputSpec, predict
from vestige.errors import DataError, ShapeError
from vestige.tasks._judging import (
    CONFUSION_CLASSES,
    INTEGERS,
    batches,
    check_answers,
    check_inputs,
    device_of,
    quiet,
)

Labelled = tuple[Tensor, Tensor]

_CONFUSED = 10


@dataclass(frozen=True, eq=False)
class ClassReport:
    """How a model does on each class.

    Attributes:
        per_class: (K,), share of each class's inputs that was right; NaN where it has no inputs.
        confusion: (K, K), int64; entry [i, j] counts inputs of class i that were taken for j.
    """

    per_class: Tensor
    confusion: Tensor


class Classification:
    """The task of naming the class of an input.

    Args:
        spec: what one input looks like.
        num_classes: number of classes K; labels are in [0, K).
    """

    kind = "classification"
    metric = "accuracy"
    higher_is_better = True

    def __init__(self, spec: InputSpec, num_classes: int) -> None:
        if num_classes < 2:
            raise DataError(f"got num_classes={num_classes}, expected at least 2; name the classes")
        self.spec = spec
        self.num_classes = num_classes

    def evaluate(
        self, model: nn.Module, data: Labelled, *, batch_size: int = 512
    ) -> dict[str, float]:
        """Accuracy and mean cross entropy of `model`.

        Every sub-module runs in eval mode and gets its own training flag back, also on an error;
        weights and buffers stay as they are.

        Args:
            model: maps inputs to logits (B, K); batches are moved to its device.
            data: inputs (N, ...) in the teacher's normalised space and labels (N,) int64.
            batch_size: rows per forward; changes no result beyond rounding.

        Returns:
            "accuracy" in [0, 1] and "loss", the cross entropy in nats, mean over the N inputs.

        Raises:
            ShapeError: inputs do not fit the spec, or logits do not fit `num_classes`.
            DataError: there are no inputs, or labels are no integers in [0, K).
        """
        inputs, labels = self.check_examples(data)
        right = torch.zeros((), dtype=torch.int64)
        loss = torch.zeros((), dtype=torch.float64)
        with quiet(model):
            for rows in batches(len(inputs), batch_size):
                logits = self._logits(model, inputs[rows])
                answers = labels[rows].to(logits.device)
                right += (logits.argmax(1) == answers).sum().cpu()
                loss += functional.cross_entropy(logits, answers, reduction="sum").cpu()
        return {"accuracy": right.item() / len(inputs), "loss": loss.item() / len(inputs)}

    def report(self, model: nn.Module, data: Labelled, *, batch_size: int = 512) -> ClassReport:
        """Accuracy per class and the confusion matrix; arguments and errors as in `evaluate`."""
        inputs, labels = self.check_examples(data)
        return self._class_report(labels, self._answers(model, inputs, batch_size))

    def agreement(
        self, model_a: nn.Module, model_b: nn.Module, inputs: Tensor, *, batch_size: int = 512
    ) -> float:
        """Share of `inputs` (N, ...), in [0, 1], for which both models name the same class."""
        check_inputs(inputs, self.spec)
        first, second = (self._answers(one, inputs, batch_size) for one in (model_a, model_b))
        return int((first == second).sum()) / len(inputs)

    def details(
        self, student: nn.Module, teacher: Any, data: Labelled, *, batch_size: int = 512
    ) -> dict[str, Any]:
        """What `evaluation.json` says: each class, who is right where, and who is taken for whom.

        Args:
            student: as in `evaluate`.
            teacher: any callable that `evaluate` takes, or None where nobody may be asked.
            data: as in `evaluate`.
            batch_size: rows per forward; changes no result beyond rounding.

        Returns:
            Plain lists and numbers:
            "inputs", N, and "inputs_per_class", (K,);
            "student" and "teacher", each with "accuracy" in [0, 1] and "per_class", (K,), None for
            a class without inputs; the teacher's is None where it was not asked;
            "agreement", None without a teacher, else "share" in [0, 1] of inputs with the same
            answer and the counts "both_right", "student_alone_right", "teacher_alone_right",
            "same_wrong", "different_wrong", which add up to N;
            "confusion", (K, K) counts by true class and answer of each of the two, None for more
            than 20 classes;
            "confused", the student's 10 most frequent mistakes: "class", "taken_for", "count".
        """
        inputs, labels = self.check_examples(data)
        answers = {"student": self._answers(student, inputs, batch_size)}
        if teacher is not None:
            answers["teacher"] = self._answers(teacher, inputs, batch_size)
        labels = labels.cpu()
        reports = {who: self._class_report(labels, found) for who, found in answers.items()}
        drawn = self.num_classes <= CONFUSION_CLASSES
        return {
            "inputs": len(labels),
            "inputs_per_class": torch.bincount(labels, minlength=self.num_classes).tolist(),
            **{
                who: _scores(reports[who], len(labels)) if who in reports else None
                for who in ("student", "teacher")
            },
            "agreement": _agreement(labels, answers["student"], answers["teacher"])
            if "teacher" in answers
            else None,
            "confusion": {who: one.confusion.tolist() for who, one in reports.items()}
            if drawn
            else None,
            "confused": _confused(reports["student"].confusion),
        }

    def check(self, model: nn.Module) -> None:
        """Ask `model` for two inputs of zeros, in eval mode, and look at the answer.

        Raises:
            ShapeError: it cannot take the spec's inputs, or its logits are not (2, K).
            TeacherError: its logits are not finite.
        """
        check_answers(model, self.spec, self._logits)

    def _answers(self, model: Any, inputs: Tensor, batch_size: int) -> Tensor:
        """Class numbers (N,) that `model` names, on the CPU."""
        with quiet(model):
            parts = [
                self._logits(model, inputs[rows]).argmax(1).cpu()
                for rows in batches(len(inputs), batch_size)
            ]
        return torch.cat(parts)

    def _class_report(self, labels: Tensor, answers: Tensor) -> ClassReport:
        count = self.num_classes
        cells = torch.bincount(labels.cpu() * count + answers, minlength=count * count)
        confusion = cells.view(count, count)
        return ClassReport(confusion.diagonal() / confusion.sum(1), confusion)

    def _logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Float32 logits (B, K) of `model`, on its device."""
        logits = predict(model, inputs.to(device_of(model, inputs))).logits
        expected = (len(inputs), self.num_classes)
        if logits.shape != expected:
            raise ShapeError(
                f"got logits of shape {tuple(logits.shape)} from {type(model).__name__}, expected "
                f"{expected}: {len(inputs)} inputs, {self.num_classes} classes; set num_classes to "
                "the number of the model's outputs"
            )
        return logits.float()

    def check_examples(self, data: Labelled) -> Labelled:
        """The inputs, and the labels in int64, of what `evaluate` and a training take.

        Raises:
            ShapeError: inputs do not fit the spec, or there is not one label each.
            DataError: there are no inputs, or labels are no integers in [0, K).
        """
        inputs, labels = data
        check_inputs(inputs, self.spec)
        if labels.shape != inputs.shape[:1]:
            raise ShapeError(
                f"got labels of shape {tuple(labels.shape)}, expected ({len(inputs)},) for "
                f"{len(inputs)} inputs; hand in one class number per input"
            )
        if labels.dtype not in INTEGERS:
            raise DataError(f"got labels of dtype {labels.dtype}, expected int64 class numbers")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(
                f"got labels from {low} to {high}, expected 0 to {self.num_classes - 1}; "
                "number the classes from 0 or correct num_classes"
            )
        return inputs, labels.long()


def _scores(report: ClassReport, inputs: int) -> dict[str, Any]:
    """Accuracy over all inputs and per class, for JSON."""
    # Divided as doubles: 0.9 is to be 0.9 in the file.
    right, asked = report.confusion.diagonal().tolist(), report.confusion.sum(1).tolist()
    return {
        "accuracy": sum(right) / inputs,
        "per_class": [hit / all_ if all_ else None for hit, all_ in zip(right, asked, strict=True)],
    }


def _agreement(labels: Tensor, student: Tensor, teacher: Tensor) -> dict[str, Any]:
    """Who is right where, from class numbers (N,)."""
    same, right, taught = student == teacher, student == labels, teacher == labels
    cases = {
        "both_right": right & taught,
        "student_alone_right": right & ~taught,
        "teacher_alone_right": ~right & taught,
        "same_wrong": same & ~right,
        "different_wrong": ~same & ~right & ~taught,
    }
    counts = {name: int(where.sum()) for name, where in cases.items()}
    return {"share": int(same.sum()) / len(labels), **counts}


def _confused(confusion: Tensor) -> list[dict[str, int]]:
    """The most frequent mistakes in (K, K) counts, those of the lowest classes first if equal."""
    wrong = confusion.clone().fill_diagonal_(0)
    count = len(wrong)
    order = wrong.flatten().argsort(descending=True, stable=True)[:_CONFUSED]
    return [
        {"class": cell // count, "taken_for": cell % count, "count": int(wrong.flatten()[cell])}
        for cell in order.tolist()
        if wrong.flatten()[cell] > 0
    ]
