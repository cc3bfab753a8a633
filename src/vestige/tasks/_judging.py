"""What tasks have in common: asking a network in batches, and looking at what it was handed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vestige.core.modes import evaluating
from vestige.core.types import InputSpec
from vestige.errors import AccessError, DataError, ShapeError, TeacherError

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Tables of classes by classes are drawn and written up to here.
CONFUSION_CLASSES = 20


@contextmanager
def quiet(*models: Any) -> Iterator[None]:
    """No gradients, and every module among `models` in eval mode."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in models:
            # A black-box teacher is no module: it has no training flags to care for.
            if isinstance(model, nn.Module):
                stack.enter_context(evaluating(model))
        yield


def batches(count: int, batch_size: int) -> Iterator[slice]:
    """Rows 0 to `count` in turn."""
    for start in range(0, count, batch_size):
        yield slice(start, start + batch_size)


def device_of(model: Any, inputs: Tensor) -> torch.device:
    """Where `model` lies; where the inputs do for one without weights."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return inputs.device


def check_inputs(inputs: Tensor, spec: InputSpec) -> None:
    """Raise unless `inputs` are (N, ...) of `spec` with N above 0."""
    if len(inputs) == 0:
        raise DataError("got no inputs to evaluate on, expected at least one; hand in data")
    if tuple(inputs.shape[1:]) != spec.shape:
        raise ShapeError(
            f"got inputs of shape {tuple(inputs.shape)}, expected (N, "
            f"{', '.join(map(str, spec.shape))}) as in the input spec; resize the inputs "
            "or correct the spec"
        )


def check_answers(
    model: nn.Module,
    spec: InputSpec,
    ask: Callable[[nn.Module, Tensor], Tensor],
    *,
    inputs: Tensor | None = None,
) -> None:
    """Ask `model` for two inputs, in eval mode, and look at the answer.

    Args:
        model: to be asked.
        spec: of its inputs.
        ask: gives the logits of a model for inputs, or raises ShapeError.
        inputs: (2, ...) of the spec; None takes zeros.

    Raises:
        ShapeError: it cannot take the spec's inputs, or its logits have another shape.
        TeacherError: its logits are not finite.
    """
    zeros = inputs is None
    inputs = torch.zeros((2, *spec.shape)) if inputs is None else inputs
    with quiet(model):
        try:
            answers = ask(model, inputs)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, ShapeError | AccessError):
                raise
            raise ShapeError(
                f"{type(model).__name__} cannot take inputs of shape {spec.shape}, as the "
                f"input spec says: {error}"
            ) from error
    if not torch.isfinite(answers).all():
        raise TeacherError(
            f"{type(model).__name__} answers NaN or infinity to inputs{' of zeros' * zeros}, "
            "expected finite logits; check its weights and the normalisation"
        )
