"""Segmentation: a class for each pixel, judged by the mean intersection over union."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core.types import InputSpec, predict
from vestige.errors import DataError, ShapeError
from vestige.tasks._colours import class_colours, overlay
from vestige.tasks._confusion import mask_details, mask_scores, overlaps
from vestige.tasks._judging import (
    CONFUSION_CLASSES,
    INTEGERS,
    batches,
    check_answers,
    check_inputs,
    device_of,
    quiet,
)

Masked = tuple[Tensor, Tensor]

_LISTED = 10


@dataclass(frozen=True, eq=False)
class MaskReport:
    """How a model does on each class.

    Attributes:
        per_class: (K,), intersection over union of each class; NaN for one that is neither in the
            masks nor among the answers.
        confusion: (K, K), int64; entry [i, j] counts pixels of class i that were taken for j.
    """

    per_class: Tensor
    confusion: Tensor


class Segmentation:
    """The task of naming the class of every pixel.

    Args:
        spec: what one input looks like, (C, H, W).
        num_classes: number of classes K; masks hold 0 to K - 1.
        ignore_index: value of the pixels of a mask that nobody is judged on, nor trained.
    """

    kind = "segmentation"
    metric = "miou"
    higher_is_better = True

    def __init__(self, spec: InputSpec, num_classes: int, *, ignore_index: int = 255) -> None:
        if num_classes < 2:
            raise DataError(f"got num_classes={num_classes}, expected at least 2; name the classes")
        if len(spec.shape) != 3:
            raise ShapeError(
                f"got an input spec of shape {spec.shape}, expected (C, H, W), whose pixels are "
                "classified; make it with InputSpec.image"
            )
        self.spec = spec
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def evaluate(self, model: nn.Module, data: Masked, *, batch_size: int = 64) -> dict[str, float]:
        """Mean intersection over union, share of right pixels and mean cross entropy of `model`.

        All come from one confusion matrix over all pixels that are not ignored. Every sub-module
        runs in eval mode and gets its own training flag back, also on an error; weights and buffers
        stay as they are.

        Args:
            model: maps inputs to logits (B, K, H, W); batches are moved to its device.
            data: inputs (N, C, H, W) in the teacher's normalised space and masks (N, H, W) of
                integers.
            batch_size: rows per forward; changes no result beyond rounding.

        Returns:
            "miou" in [0, 1], the mean over the classes that are in the masks or among the answers
            of intersection over union; "pixel_accuracy" in [0, 1]; and "loss", the cross entropy
            in nats, mean over the counted pixels.

        Raises:
            ShapeError: inputs do not fit the spec, masks the inputs, or logits the masks.
            DataError: there are no inputs, nothing but ignored pixels, or masks hold anything but
                integers in [0, K) and `ignore_index`.
        """
        inputs, masks = self.check_examples(data)
        table = self._empty()
        loss = torch.zeros((), dtype=torch.float64)
        with quiet(model):
            for rows in batches(len(inputs), batch_size):
                logits = self._logits(model, inputs[rows])
                truth = masks[rows].to(logits.device)
                table += self._table(truth, logits.argmax(1))
                loss += functional.cross_entropy(
                    logits, truth, ignore_index=self.ignore_index, reduction="sum"
                ).cpu()
        return {**mask_scores(table), "loss": loss.item() / int(table.sum())}

    def report(self, model: nn.Module, data: Masked, *, batch_size: int = 64) -> MaskReport:
        """IoU of each class and the confusion matrix; arguments and errors as in `evaluate`."""
        tables, _ = self._compared({"model": model}, *self.check_examples(data), batch_size)
        return MaskReport(overlaps(tables["model"]).float(), tables["model"])

    def agreement(
        self, model_a: nn.Module, model_b: nn.Module, inputs: Tensor, *, batch_size: int = 64
    ) -> float:
        """Share of all pixels of `inputs` (N, C, H, W), for which both models name one class."""
        check_inputs(inputs, self.spec)
        same = torch.zeros((), dtype=torch.int64)
        with quiet(model_a, model_b):
            for rows in batches(len(inputs), batch_size):
                first, second = (
                    self._logits(one, inputs[rows]).argmax(1).cpu() for one in (model_a, model_b)
                )
                same += (first == second).sum()
        return same.item() / (len(inputs) * self.spec.shape[1] * self.spec.shape[2])

    def details(
        self, student: nn.Module, teacher: Any, data: Masked, *, batch_size: int = 64
    ) -> dict[str, Any]:
        """What `evaluation.json` says: each class, and which pixels are taken for which.

        Args:
            student: as in `evaluate`.
            teacher: any callable that `evaluate` takes, or None where nobody may be asked.
            data: as in `evaluate`.
            batch_size: rows per forward; changes no result beyond rounding.

        Returns:
            Plain lists and numbers:
            "inputs", N; "pixels", how many are counted; "pixels_per_class", (K,), of the masks;
            "student" and "teacher", each with "miou" and "pixel_accuracy" in [0, 1] and
            "per_class", (K,) intersections over union, None for a class that is neither in the
            masks nor among the answers; the teacher's is None where it was not asked;
            "agreement", None without a teacher, else "share" in [0, 1] of the counted pixels with
            the same answer;
            "confusion", (K, K) counts of pixels by true class and answer of each of the two, None
            for more than 20 classes.
        """
        inputs, masks = self.check_examples(data)
        asked = {"student": student, **({} if teacher is None else {"teacher": teacher})}
        tables, same = self._compared(asked, inputs, masks, batch_size)
        pixels = int(tables["student"].sum())
        drawn = self.num_classes <= CONFUSION_CLASSES
        return {
            "inputs": len(inputs),
            "pixels": pixels,
            "pixels_per_class": tables["student"].sum(1).tolist(),
            **{
                who: mask_details(tables[who]) if who in tables else None
                for who in ("student", "teacher")
            },
            "agreement": {"share": same / pixels} if "teacher" in tables else None,
            "confusion": {who: table.tolist() for who, table in tables.items()} if drawn else None,
        }

    def answers(
        self, student: nn.Module, teacher: Any, data: Masked, *, count: int = 6
    ) -> Mapping[str, Tensor]:
        """Pictures of what is answered, evenly spaced over `data`, not the best of it.

        Args:
            student: as in `evaluate`.
            teacher: any callable that `evaluate` takes, or None, which leaves its column out.
            data: as in `evaluate`.
            count: rows n; fewer where there are fewer inputs.

        Returns:
            Images (n, 3, H, W) in [0, 1]: "input", and the classes as colours over it of
            "teacher", "student" and "truth", where ignored pixels are black. The colours are
            those of `tasks._colours.class_colours`.

        Raises:
            DataError: `count` is below 1, or as in `evaluate`.
            ShapeError: as in `evaluate`.
        """
        inputs, masks = self.check_examples(data)
        if count < 1:
            raise DataError(f"got count={count}, expected at least 1; ask for a picture")
        rows = min(count, len(inputs))
        chosen = torch.arange(rows) * len(inputs) // rows
        inputs, truth = inputs[chosen.to(inputs.device)], masks[chosen.to(masks.device)].cpu()
        images = self.spec.denormalize(inputs.float()).cpu()[:, :3]
        # Two channels are no colour.
        images = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
        colours = class_colours(self.num_classes)
        asked = {"teacher": teacher, "student": student}
        shown = {"input": images}
        with quiet(teacher, student):
            for who, model in asked.items():
                if model is not None:
                    found = self._logits(model, inputs).argmax(1).cpu()
                    shown[who] = overlay(images, found, colours)
        # Within [0, K) it is a class like any other to `overlay`.
        truth = truth.masked_fill(truth == self.ignore_index, -1)
        return {**shown, "truth": overlay(images, truth, colours)}

    def check(self, model: nn.Module) -> None:
        """Ask `model` for two inputs of zeros, in eval mode, and look at the answer.

        Raises:
            ShapeError: it cannot take the spec's inputs, or its logits are not (2, K, H, W).
            TeacherError: its logits are not finite.
        """
        check_answers(model, self.spec, self._logits)

    def check_examples(self, data: Masked) -> Masked:
        """The inputs, and the masks in int64, of what `evaluate` and a training take.

        Raises:
            ShapeError: inputs do not fit the spec, or masks the inputs.
            DataError: there are no inputs, nothing but ignored pixels, or masks hold anything but
                integers in [0, K) and `ignore_index`.
        """
        inputs, masks = data
        check_inputs(inputs, self.spec)
        expected = (len(inputs), *self.spec.shape[1:])
        if tuple(masks.shape) != expected:
            raise ShapeError(
                f"got masks of shape {tuple(masks.shape)}, expected {expected}: a class for each "
                f"pixel of {len(inputs)} inputs; resize the masks by nearest neighbour"
            )
        if masks.dtype not in INTEGERS:
            raise DataError(
                f"got masks of dtype {masks.dtype}, expected integers, class numbers from 0; "
                "convert them"
            )
        # First: a negative index has no place among bytes.
        masks = masks.long()
        counted = masks != self.ignore_index
        strange = counted & ((masks < 0) | (masks >= self.num_classes))
        if bool(strange.any()):
            values = masks[strange].unique().tolist()
            listed = ", ".join(map(str, values[:_LISTED])) + (", ..." * (len(values) > _LISTED))
            raise DataError(
                f"got masks with the values {listed}, expected 0 to {self.num_classes - 1}, or "
                f"{self.ignore_index} for pixels that are ignored; set ignore_index to the value "
                "of unlabelled pixels (task_config: {ignore_index: ...}), or correct num_classes"
            )
        if not bool(counted.any()):
            raise DataError(
                f"got masks of nothing but ignored pixels ({self.ignore_index}), expected classes "
                "to judge on; correct the masks or ignore_index"
            )
        return inputs, masks

    def _compared(
        self, asked: Mapping[str, Any], inputs: Tensor, masks: Tensor, batch_size: int
    ) -> tuple[dict[str, Tensor], int]:
        """The confusion of each model, and on how many counted pixels all answer the same."""
        tables = {who: self._empty() for who in asked}
        same = 0
        with quiet(*asked.values()):
            for rows in batches(len(inputs), batch_size):
                truth = masks[rows].cpu()
                equal = truth != self.ignore_index
                first: Tensor | None = None
                for who, model in asked.items():
                    answers = self._logits(model, inputs[rows]).argmax(1).cpu()
                    tables[who] += self._table(truth, answers)
                    first = answers if first is None else first
                    equal &= answers == first
                same += int(equal.sum())
        return tables, same

    def _logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Float32 logits (B, K, H, W) of `model`, on its device."""
        logits = predict(model, inputs.to(device_of(model, inputs))).logits
        height, width = self.spec.shape[1:]
        if logits.dim() != 4 or logits.shape[:2] != (len(inputs), self.num_classes):
            expected = (len(inputs), self.num_classes, height, width)
            raise ShapeError(
                f"got logits of shape {tuple(logits.shape)} from {type(model).__name__}, expected "
                f"{expected}: {len(inputs)} inputs, {self.num_classes} classes, one answer for "
                "each pixel; set num_classes to the number of the model's outputs, or take a "
                "network for segmentation"
            )
        if logits.shape[2:] != (height, width):
            raise ShapeError(
                f"got logits of {logits.shape[2]}x{logits.shape[3]} pixels from "
                f"{type(model).__name__}, expected {height}x{width} as the masks have, since "
                "logits are not resized here; let the network upsample its logits to the size of "
                "its input"
            )
        return logits.float()

    def _empty(self) -> Tensor:
        return torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)

    def _table(self, truth: Tensor, answers: Tensor) -> Tensor:
        """Counts (K, K) of the pixels of two (B, H, W) that are not ignored, on the CPU."""
        counted = truth != self.ignore_index
        cells = truth[counted] * self.num_classes + answers[counted]
        table = torch.bincount(cells, minlength=self.num_classes**2)
        return table.view(self.num_classes, self.num_classes).cpu()
