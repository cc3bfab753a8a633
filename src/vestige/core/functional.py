"""Evaluate a network at other weights without touching the live one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def functional(model: nn.Module, params: Mapping[str, Tensor]) -> Callable[..., Any]:
    """A callable that runs `model` at the weights `params`.

    The callable works on clones of the buffers, made here and kept between its calls, so live
    BatchNorm statistics and other running values never move through it.

    Args:
        model: the live network; its training flags decide the mode.
        params: tensors by parameter name, with gradient; names left out keep the live weight.

    Returns:
        A callable with the signature of `model`'s forward.

    Raises:
        KeyError: a name that `model` does not have.
    """
    known = {name for name, _ in model.named_parameters()}
    unknown = sorted(set(params) - known)
    if unknown:
        raise KeyError(
            f"got weights for {unknown}, expected names of {type(model).__name__}'s parameters"
        )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = {**buffers, **params}

    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, state, args, kwargs)

    return call
