"""What a plug-in sees of the trainer."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from vestige.core.protocols import OptimizerFactory, Progress
from vestige.core.schedules import Schedule
from vestige.training.context import RunContext


class ScopedContext:
    """The context as a plug-in sees it: its names do not meet the method's or another plug-in's."""

    def __init__(self, ctx: RunContext, scope: str) -> None:
        self._ctx = ctx
        self._scope = scope

    @property
    def rng(self) -> torch.Generator:
        """A stream of the plug-in's own: what it draws changes nothing that the method draws."""
        return self.generator("rng")

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return self._ctx.progress

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self._ctx.device

    def generator(self, name: str) -> torch.Generator:
        """A further stream of the plug-in's own."""
        return self._ctx.generator(f"{self._scope}/{name}")

    def optimizer(
        self,
        name: str,
        params: Iterable[nn.Parameter],
        factory: OptimizerFactory,
        schedule: Schedule | None = None,
        *,
        fresh: bool = False,
    ) -> Optimizer:
        """An optimizer of the plug-in's own."""
        return self._ctx.optimizer(f"{self._scope}/{name}", params, factory, schedule, fresh=fresh)
