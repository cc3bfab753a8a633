"""A teacher whose weights, activations and gradients can be used."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vestige.core import parallel
from vestige.core.protocols import Teacher
from vestige.core.types import Access, Prediction, count_rows
from vestige.errors import AccessError, TeacherError
from vestige.teachers.folding import Shortcut


class WhiteBoxTeacher(nn.Module):
    """Freezes a network and keeps it in eval mode, whatever happens around it.

    The network itself is frozen, not a copy: its parameters no longer ask for gradients and all of
    its sub-modules are in eval mode from now on. Gradients still flow to the inputs.

    Attributes:
        queries: rows that were asked so far.
        gradients: of them the rows whose answer carried a graph back to the inputs. Each is taken
            to be gone through once.
        shortcut: a faster way to the same answers for calls in which nobody looks inside; it is
            off unless the trainer, or you, switch it on (`shortcut.fold = True`).

    Args:
        module: the trained network.

    Raises:
        TeacherError: a weight or a buffer holds NaN or infinity.
    """

    access = Access.WHITE_BOX

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        check_finite(module)
        self.module = module.requires_grad_(False)
        self.queries = 0
        self.gradients = 0
        self.shortcut = Shortcut()
        self.eval()

    def forward(self, *inputs: Tensor, **named: Tensor) -> Prediction:
        """Prediction for inputs (B, ...), attached to them; taken as the network takes them."""
        rows = parallel.rows_of_all(count_rows(inputs[0] if inputs else named))
        self.queries += rows
        answer = Prediction.of(self.shortcut.call(self.module, inputs, named))
        # Its weights are frozen, so a graph can only lead to the inputs.
        self.gradients += rows if answer.logits.requires_grad else 0
        return answer

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: a parent's `train()` must not move BatchNorm statistics."""
        return super().train(False)


def module_of(teacher: Teacher) -> nn.Module:
    """The network inside a teacher, where hooks may be put.

    Raises:
        AccessError: the teacher does not show it.
    """
    if not isinstance(teacher, nn.Module):
        raise AccessError(
            f"got a teacher with {teacher.access} access, expected white_box access to look "
            "inside; hand in the network itself"
        )
    return teacher


def layers_of(teacher: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Names of layers as the user's network has them, as the teacher around it has them."""
    known = dict(teacher.named_modules())
    inner = {name: f"module.{name}" for name in names}
    return tuple(
        inner[name] if name not in known and inner[name] in known else name for name in names
    )


def check_finite(module: nn.Module) -> None:
    """Refuse a network with NaN or infinite values; lazy layers without weights are passed over.

    Raises:
        TeacherError: names the tensor.
    """
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor) or is_lazy(tensor) or not tensor.is_floating_point():
            continue
        broken = int((~torch.isfinite(tensor)).sum())
        if broken:
            raise TeacherError(
                f"got {broken} NaN or infinite values of {tensor.numel()} in '{name}' of teacher "
                f"{type(module).__name__}, expected finite weights; load another checkpoint or "
                "train the teacher again"
            )
