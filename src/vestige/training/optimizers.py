"""A run's persistent optimizers by name: their schedules and their state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vestige.core.schedules import Schedule
from vestige.errors import CheckpointError, ContractError


@dataclass
class Scheduled:
    """A persistent optimizer with its base rates and the number of steps it took."""

    optimizer: Optimizer
    schedule: Schedule | None
    base_rates: list[float]
    steps: int = 0

    def set_rates(self, share: float) -> None:
        """Rates of the finished share of the loop, or of the schedule's own steps."""
        if self.schedule is not None:
            factor = self.schedule.factor(share)
            for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = rate * factor

    def stepped(self) -> None:
        """Count a step."""
        self.steps += 1
        if self.schedule is not None and self.schedule.per == "step":
            self.set_rates(self.steps / self.schedule.steps)


class Optimizers:
    """Those that a checkpoint keeps; one that is made after a restore takes its state over then.

    Attributes:
        by_name: in the order in which they were asked for.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Scheduled] = {}
        self._saved: dict[str, Any] = {}

    def add(self, name: str, optimizer: Optimizer, schedule: Schedule | None) -> None:
        """Keep the optimizer.

        Raises:
            ContractError: there is one of this name.
            CheckpointError: it does not fit what was saved for it.
        """
        if name in self.by_name:
            raise ContractError(
                f"optimizer {name!r} exists already; give every optimizer its own name"
            )
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        entry = self.by_name[name] = Scheduled(optimizer, schedule, rates)
        if name in self._saved:
            self._take_over(name)
        elif schedule is not None:
            entry.set_rates(0.0)

    def set_round_rates(self, share: float) -> None:
        """Rates of the schedules that are stepped by rounds."""
        for entry in self.by_name.values():
            if entry.schedule is not None and entry.schedule.per == "round":
                entry.set_rates(share)

    def stepped(self, optimizer: Optimizer) -> None:
        """Count a step of `optimizer`; of one that is not kept, nothing."""
        for entry in self.by_name.values():
            if entry.optimizer is optimizer:
                entry.stepped()

    def state(self) -> dict[str, Any]:
        """Steps and state by name."""
        return {
            name: {"steps": entry.steps, "state": entry.optimizer.state_dict()}
            for name, entry in self.by_name.items()
        }

    def restore(self, saved: Mapping[str, Any], *, complete: bool) -> None:
        """Take over what `state` gave; `complete`: every saved optimizer must exist by now."""
        self._saved = dict(saved)
        for name in self.by_name:
            if name in self._saved:
                self._take_over(name)
        missing = sorted(set(self._saved) - set(self.by_name))
        if complete and missing:
            raise CheckpointError(
                f"the checkpoint holds optimizers {missing} that this run does not ask for; it is "
                "of another method or version"
            )

    def _take_over(self, name: str) -> None:
        saved, entry = self._saved[name], self.by_name[name]
        try:
            entry.optimizer.load_state_dict(saved["state"])
        except ValueError as error:
            raise CheckpointError(
                f"optimizer {name!r} does not fit the checkpoint: {error}"
            ) from error
        # Fused kernels walk memory as it lies: moments must lie as their weight does, also for
        # channels-last weights, whose layout a checkpoint does not keep.
        for weight, values in entry.optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    values[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
        entry.steps = int(saved["steps"])


def parameters_of(optimizers: Sequence[Optimizer]) -> list[nn.Parameter]:
    """What the optimizers move, each once.

    Raises:
        ContractError: there is no optimizer, or none of them holds what takes a gradient.
    """
    if not optimizers:
        raise ContractError("an update got no optimizer; name the one that owns what moves")
    seen: dict[int, nn.Parameter] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    seen[id(parameter)] = parameter
    if not seen:
        raise ContractError(
            "an update's optimizers hold no parameter that takes a gradient; unfreeze some"
        )
    return list(seen.values())
