"""Train and eval mode that respect what the user froze."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def train_mode(module: nn.Module) -> None:
    """Put `module` into train mode, but leave frozen layers as they are.

    In a module that is in train mode already, a layer in eval mode was put there on purpose. In one
    that is in eval mode as a whole, a layer is frozen when none of its own weights takes a gradient
    although it has some. A BatchNorm that somebody froze keeps its statistics.
    """
    if module.training:
        return
    for layer in module.modules():
        own = list(layer.parameters(recurse=False))
        if layer.training or not own or any(weight.requires_grad for weight in own):
            layer.training = True


def flags(module: nn.Module) -> dict[str, bool]:
    """The training flag of every sub-module by name."""
    return {name: layer.training for name, layer in module.named_modules()}


def set_flags(module: nn.Module, saved: Mapping[str, bool]) -> None:
    """Put the flags back to what `flags` returned."""
    for name, layer in module.named_modules():
        if name in saved:
            layer.training = saved[name]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each sub-module's own flag as before."""
    saved = flags(module)
    module.eval()
    try:
        yield
    finally:
        set_flags(module, saved)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Leave running statistics as they are inside the block.

    A BatchNorm in train mode still normalises by its batch; one in eval mode is as it was.
    """
    moving = [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats
    ]
    for layer in moving:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in moving:
            layer.track_running_stats = True
