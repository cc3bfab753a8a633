"""Devices, processes and memory: what a run needs to know of the machine."""

import os
import platform
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from vestige.errors import RecipeError


def device(name: str) -> torch.device:
    """The device that `name` stands for; "auto" takes a GPU if there is one.

    Raises:
        RecipeError: a GPU is asked for and there is none, or the name is not known.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"got device {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"got device {name!r}, but torch sees no GPU; set trainer.device: auto")
    return found


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` CPU threads inside the block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def average_gradients(params: Sequence[nn.Parameter]) -> None:
    """Average gradients over the processes of a torch.distributed group; alone, do nothing."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    world = torch.distributed.get_world_size()
    for parameter in params:
        if parameter.grad is None:
            # Every process must take part in every reduction, or the group hangs.
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= world


def peak_memory_mib(where: torch.device) -> float:
    """The largest amount of memory this process has held, on the GPU if it ran there."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def machine() -> dict[str, Any]:
    """What the run ran on, without anything that names a user or a host."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in ("vestige", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
