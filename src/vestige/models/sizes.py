"""Buffers whose size is not known before their contents are."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def take_sizes(module: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Give the buffers in `module.sized_by_state` the sizes that they have in `state`.

    To be called first in a module's `_load_from_state_dict`, which then copies into them. Another
    dtype or number of dimensions is left to be refused there.

    Args:
        module: a `core.protocols.SizedByState`; the buffers are its own.
        state: with names behind `prefix`.
        prefix: of the module in the state.
    """
    names: tuple[str, ...] = getattr(module, "sized_by_state", ())
    for name in names:
        own, found = getattr(module, name), state.get(f"{prefix}{name}")
        if isinstance(found, Tensor) and (found.dtype, found.dim()) == (own.dtype, own.dim()):
            setattr(module, name, own.new_zeros(found.shape))
