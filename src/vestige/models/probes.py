"""Reading a network's inside while it runs, with hooks that live only inside a `with`."""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from vestige.core import parallel
from vestige.errors import ContractError, NoBatchNormError
from vestige.losses.statistics import Stats


def batchnorm_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm layers of `module` that store running statistics.

    Returns:
        Layers by qualified name, in the order of definition; a layer that is registered twice
        appears once.
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm)
        and layer.running_mean is not None
        and layer.running_var is not None
    }


class BatchNormProbe:
    """Observes what enters each BatchNorm layer of a network.

    Use it as `with BatchNormProbe(teacher) as probe: teacher(inputs); probe.observed()`. Hooks
    exist only inside the `with` and are removed however it is left; what was observed stays
    readable until the probe is entered again. Several probes may watch one network.

    Attributes:
        names: qualified names of the layers, in the order of `observed` and `stored`.
    """

    def __init__(self, module: nn.Module) -> None:
        """Finds the layers; hooks nothing yet.

        Raises:
            NoBatchNormError: no BatchNorm layer of `module` stores running statistics.
        """
        self._layers = batchnorm_layers(module)
        if not self._layers:
            total = sum(isinstance(layer, _BatchNorm) for layer in module.modules())
            raise NoBatchNormError(
                f"got a {type(module).__name__} with {total} BatchNorm layers, 0 of them with "
                "running statistics; expected at least 1; use a method that needs none "
                "(vestige list methods --without batchnorm) or set bn_weight: 0"
            )
        self.names: tuple[str, ...] = tuple(self._layers)
        self._module = module
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, Stats] = {}

    def __enter__(self) -> "BatchNormProbe":
        if self._handles:
            raise ContractError(
                "got a BatchNormProbe that is entered already, expected one `with` at a time; make "
                "a second probe for a nested one"
            )
        self._seen = {}
        # Without this a layer that the next forward skips would keep the last batch's statistics.
        self._handles.append(self._module.register_forward_pre_hook(self._forget))
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._recorder(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def observed(self) -> tuple[Stats, ...]:
        """Statistics of each layer's input in the last forward.

        Returns:
            Per layer mean (C,) and biased variance (C,) over batch and positions, at least float32,
            with gradient to the inputs unless the forward ran without.

        Raises:
            ContractError: no forward ran inside the `with`, or the last one skipped a layer.
        """
        missing = [name for name in self.names if name not in self._seen]
        if missing:
            raise ContractError(
                f"got no statistics of {len(missing)} of {len(self.names)} BatchNorm layers (first "
                f"{missing[0]!r}), expected one forward through all of them; call the network "
                "inside the `with` before reading"
            )
        return tuple(self._seen[name] for name in self.names)

    def stored(self) -> tuple[Stats, ...]:
        """Running mean (C,) and variance (C,) of each layer, no gradient; views, not copies."""
        return tuple(
            Stats(layer.running_mean.detach(), layer.running_var.detach())
            for layer in self._layers.values()
            if layer.running_mean is not None and layer.running_var is not None
        )

    def _forget(self, module: nn.Module, args: Any) -> None:
        self._seen = {}

    def _recorder(self, name: str) -> Any:
        def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0]
            # bfloat16 has 8 bits of mantissa: too few for a variance that is compared.
            if values.dtype in (torch.float16, torch.bfloat16):
                values = values.float()
            self._seen[name] = Stats(*parallel.batch_moments(values))

        return record
